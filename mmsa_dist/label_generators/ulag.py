"""ULAG: ULGM's labels, mixed half and half with labels that layers of its own learn from the features' similarity.

Source: Q. Sun and L. Wang, "Self-supervised Multimodal Emotion Recognition Combining Temporal Attention Mechanism and
Unimodal Label Automatic Generation Strategy" (TAM-ULAG), J. Electronics & Information Technology 46(2), 2024. With y^c
ULGM's label and F_k the features of a batch, k in m, t, a, v; for each task s in t, a, v:

    e_k    = ReLU(W_k F_k), 16 wide                    expert features
    m_s    = sum over k of (e_s . e_k) e_k             mixed by their similarity to the task's own
    c_s    = two linear layers of m_s                  confidence
    y^f_s  = y_m (2 sigmoid(c_s) - 1)                  in [-|y_m|, |y_m|]
    target = 1/2 y^c_s + 1/2 y^f_s                     in epoch n > 1; y_m in the first

The task's loss is weighed by tanh|y^c_s - y_m|, so in the first epoch it is exactly zero.

As in the public code, gradients flow from the target through c_s and the experts into the features, and no
non-linearity stands between the two layers. Five things differ from it:

- The confidence layers are part of the model and of its optimizer (there they keep their random weights).
- W_k has no bias: the feature of an absent modality is zero here, and so it has no part in the others' mixtures.
- In the first epoch the target is y_m, as the paper says, and not only the loss zero.
- A label of zero is in neither class of the centres; there it is positive (`labels.zero_is_positive`).
- With fewer unimodal tasks (the paper's table 7) the experts of the others are gone from the mixture; there they stay.

Shapes: N training samples, B rows of a batch, d width of a feature, K tasks with M, E width of an expert feature.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmsa_dist.config import Strict
from mmsa_dist.label_generators.base import WEIGHING, TrainSplit, label_generator
from mmsa_dist.label_generators.state import Seen
from mmsa_dist.label_generators.ulgm import ULGM
from shards.batch import Batch

if TYPE_CHECKING:
    from mmsa_dist.systems.base import Prediction

EXPERT = 16
"""E: width of an expert feature."""


class Confidence(nn.Module):
    """Features of all tasks -> confidence c_s of each unimodal one.

    Args:
        widths: task -> d, ``M`` among them.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({k: nn.Linear(d, EXPERT, bias=False) for k, d in widths.items()})
        self.confidence = nn.ModuleDict(
            {s: nn.Sequential(nn.Linear(EXPERT, EXPERT), nn.Linear(EXPERT, 1)) for s in widths if s != "M"}
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """task -> (B, d), zero where a modality is absent -> task -> (B,) float32."""
        dtype = next(self.parameters()).dtype  # narrower under bf16 than features may be
        experts = {k: layer(features[k].to(dtype)).relu() for k, layer in self.experts.items()}
        stacked = torch.stack(list(experts.values()), dim=1)  # (B, K, E)
        return {s: layers(mixed(experts[s], stacked)).squeeze(-1).float() for s, layers in self.confidence.items()}


def mixed(own: Tensor, experts: Tensor) -> Tensor:
    """m_s (B, E): `experts` (B, K, E), each as much as it resembles the task's own (B, E)."""
    return ((experts @ own[:, :, None]) * experts).sum(1)


def similar(y_m: Tensor, confidence: Tensor) -> Tensor:
    """y^f (B,): y_m, its opposite, or anything between, by the confidence c_s (B,)."""
    return y_m * (2 * confidence.sigmoid() - 1)


@label_generator("ulag")
class ULAG(ULGM):
    """TAM-ULAG's unimodal label generation.

    Beside ULGM's y^c it keeps y^f as it was when the sample was last seen, and whether the first epoch is over.
    """

    paper = "Sun & Wang, J. Electronics & Information Technology 2024"
    stay = "ULGM's half of unimodal labels stays equal to it, and their losses, which it weighs, stay zero"

    def __init__(self, config: Strict, split: TrainSplit) -> None:
        super().__init__(config, split)
        self._layers = Confidence(self._widths)
        self._similarity = {task: self._samples.truth.clone() for task in self._tasks}
        self._epochs = torch.zeros((), dtype=torch.int64, device=self._device)  # that are over

    @property
    def layers(self) -> nn.Module:
        return self._layers

    def targets(self, batch: Batch, prediction: "Prediction | None" = None) -> dict[str, Tensor]:
        y_m = batch.labels["M"]
        y_c, y_f = self._current(batch, self._labels), self._current(batch, self._similarity)
        for s, c in ({} if prediction is None else prediction.learned).items():
            # in the first epoch the gradient of the layers is zero, but there: ranks must reduce the same gradients
            y_f[s] = torch.where(self._epochs > 0, similar(y_m, c), y_f[s])
        mixture = {s: 0.5 * y_c[s] + 0.5 * y_f[s] for s in self._tasks}
        return {"M": y_m, **mixture, **{WEIGHING + s: y_c[s] for s in self._tasks}}

    def end_epoch(self) -> None:
        super().end_epoch()
        self._epochs += 1

    def _relabel(self, epoch: int, seen: Seen) -> None:
        super()._relabel(epoch, seen)
        for s, c in seen.learned.items():
            slots, new = seen.slots[s], similar(seen.truth, c)
            kept = self._similarity[s][slots]
            self._similarity[s][slots] = torch.where(seen.part[s] & ~new.isnan(), new.float(), kept)

    def _named(self) -> list[tuple[str, Tensor, bool]]:
        similarity = [(f"similarity.{s}", labels, True) for s, labels in self._similarity.items()]
        return [*super()._named(), *similarity, ("epochs", self._epochs, False)]

    @classmethod
    def labels_in(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {s: 0.5 * y_c + 0.5 * state[f"similarity.{s}"] for s, y_c in super().labels_in(state).items()}

    @classmethod
    def state_bytes(cls, samples: int, widths: Mapping[str, int]) -> int:
        return super().state_bytes(samples, widths) + samples * 4 * (len(widths) - 1)
