"""SUGRM: unimodal labels from how far a modality's feature lies from the fused one, in one common space.

Source: Y. Hwang and J. Kim, "Self-Supervised Unimodal Label Generation Strategy Using Recalibrated Modality
Representations for Multimodal Sentiment Analysis", Findings of EACL 2023. F_m is the newest fused feature of a sample,
C+ and C- the mean F_m of the samples with a positive and a negative label y_m, H the greatest possible label:

    D         = |mean F_m (y_m = +H) - mean F_m (y_m = -H)|, over the most extreme labels there are
    magnitude = 2 H min(|F_m - F_s|, D) / D
    r_k       = |F_k - C+| / |F_k - C-|
    y_new     = y_m - magnitude where r_s > r_m, y_m + magnitude where r_s < r_m, else y_m

Clamp, momentum and the order of a step are those of `label_generators.state`.

Distances between features of different tasks need one width. SUGRM's own network gives it; for a system whose features
differ in width the narrower ones are filled up with zeros, which keeps every distance within a task as it is.
As in ULGM, and unlike the public code: a label of zero is in neither class (there it is positive:
`labels.zero_is_positive`), and labels and centres move once an optimizer step (there once a micro-batch).
Ratios are compared as products, so that a feature that lies on C- has a ratio too: the greatest.

Shapes: N training samples, B rows of the global batch, d width of a feature; 2 classes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmsa_dist.config import Strict
from mmsa_dist.label_generators.base import TrainSplit, label_generator
from mmsa_dist.label_generators.samples import TrainSamples
from mmsa_dist.label_generators.state import GeneratedLabels, Seen

EXTREMES = "extremes"
"""Name of the centres of the samples with the highest and with the lowest label."""


@label_generator("sugrm")
class SUGRM(GeneratedLabels):
    """SUGRM's unimodal label generation; of the features the fused ones alone are kept."""

    paper = "Hwang & Kim, Findings of EACL 2023"

    def __init__(self, config: Strict, split: TrainSplit) -> None:
        super().__init__(config, split)
        self._width = max(self._widths.values())
        self._keep("M")
        self._average("M", of="M")
        self._average(EXTREMES, of="M")
        truth = self._samples.truth[:-1]
        self._lowest, self._highest = truth.min(), truth.max()

    def _new_labels(self, seen: Seen) -> dict[str, Tensor]:
        extent = torch.linalg.vector_norm(self._centres[EXTREMES].means.diff(dim=0))  # D, ()
        fused = self._common(seen.features["M"])
        return {s: self._new_label(seen.truth, fused, self._common(seen.features[s]), extent) for s in self._tasks}

    def _new_label(self, y_m: Tensor, fused: Tensor, own: Tensor, extent: Tensor) -> Tensor:
        """(B,) float64 y_new of one modality from y_m (B,), F_m and F_s (B, d) and D ()."""
        low, high = self._range
        apart = torch.linalg.vector_norm(fused - own, dim=1)
        magnitude = (high - low) * torch.minimum(apart, extent) / extent  # 0 / 0 is NaN: the label stays
        fused_to_positive, fused_to_negative = self._to_centres(fused)
        own_to_positive, own_to_negative = self._to_centres(own)
        gap = own_to_positive * fused_to_negative - fused_to_positive * own_to_negative  # as r_s - r_m
        # the sign of NaN is zero: without a class there is no label, not y_m
        return (y_m - gap.sign() * magnitude).where(~gap.isnan(), torch.nan)

    def _to_centres(self, features: Tensor) -> Tensor:
        """(B, d) -> (2, B) distances to C+ and C-, NaN where a class has no sample."""
        return (features - self._common(self._centres["M"].means)[:, None]).norm(dim=2)

    def _common(self, features: Tensor) -> Tensor:
        """(..., d) -> (..., greatest d) float64: zeros are added."""
        return F.pad(features.double(), (0, self._width - features.shape[-1]))

    def _class_of(self, name: str, slots: Tensor) -> Tensor:
        if name != EXTREMES:
            return super()._class_of(name, slots)
        truth = self._samples.truth[slots]
        highest = truth == self._highest
        return highest.to(torch.int8) + 2 * (~highest & (truth == self._lowest)).to(torch.int8)

    @classmethod
    def state_bytes(cls, samples: int, widths: Mapping[str, int]) -> int:
        labels, classes, fused = 4 * (len(widths) - 1), 2, 4 * widths.get("M", 0)
        return TrainSamples.bytes(samples) + samples * (labels + classes + fused)
