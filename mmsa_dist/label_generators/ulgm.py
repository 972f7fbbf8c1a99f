"""ULGM: unimodal labels from how much nearer a sample's feature lies to the positive than to the negative samples.

Source: W. Yu et al., "Learning Modality-Specific Representations with Self-Supervised Multi-Task Learning for
Multimodal Sentiment Analysis" (Self-MM), AAAI 2021, section 3.3. For k in m, t, a, v: F_k is the newest feature of a
sample, C+_k and C-_k the mean F_k of the samples whose current label y_k is positive or negative (y_m for F_m):

    alpha_k = (|F_k - C-_k| - |F_k - C+_k|) / (|F_k - C+_k| + 1e-8)
    y_new   = 1/2 alpha_s / (alpha_m + 1e-8) y_m + 1/2 (y_m + alpha_s - alpha_m)

Clamp, momentum and the order of a step are those of `label_generators.state`.

Three things differ from the public code. Centres are kept as running sums, so a step costs O(B d) and not O(N d).
Samples that were not visited yet take no part in them (there: zero vectors). And labels and centres move once an
optimizer step, by all rows of the global batch (there once a micro-batch, of which an optimizer step has four).

Shapes: N training samples, B rows of the global batch, d width of a feature; 2 classes, positive then negative.
"""

from collections.abc import Mapping

from torch import Tensor

from mmsa_dist.config import Strict
from mmsa_dist.label_generators.base import TrainSplit, label_generator
from mmsa_dist.label_generators.samples import TrainSamples
from mmsa_dist.label_generators.state import GeneratedLabels, Seen

EPS = 1e-8


@label_generator("ulgm")
class ULGM(GeneratedLabels):
    """Self-MM's unimodal label generation module."""

    paper = "Yu et al., AAAI 2021"

    def __init__(self, config: Strict, split: TrainSplit) -> None:
        super().__init__(config, split)
        for k in self._widths:
            self._keep(k)
            self._average(k, of=k)

    def _new_labels(self, seen: Seen) -> dict[str, Tensor]:
        alpha = {k: self._alpha(k, features) for k, features in seen.features.items()}
        y_m, alpha_m = seen.truth, alpha["M"]
        return {s: 0.5 * (alpha[s] / (alpha_m + EPS)) * y_m + 0.5 * (y_m + alpha[s] - alpha_m) for s in self._tasks}

    def _alpha(self, k: str, features: Tensor) -> Tensor:
        """(B, d) -> (B,) float64, NaN where a class has no sample and so no centre."""
        to_positive, to_negative = (features.double() - self._centres[k].means[:, None]).norm(dim=2)
        return (to_negative - to_positive) / (to_positive + EPS)

    @classmethod
    def state_bytes(cls, samples: int, widths: Mapping[str, int]) -> int:
        labels, classes, features = 4 * (len(widths) - 1), len(widths), 4 * sum(widths.values())
        return TrainSamples.bytes(samples) + samples * (labels + classes + features)
