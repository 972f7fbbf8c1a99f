"""One record: an utterance with its modalities and labels.

Shapes: T time steps of a modality (real steps only, no padding), D its width.
"""

from dataclasses import dataclass

import numpy as np

MODALITIES = ("text", "audio", "vision")
"""Order of modalities everywhere: t, a, v."""

TASKS = ("M", "T", "A", "V")
"""M: the multimodal label. T, A, V: the unimodal labels, where a data set has them."""

EMOTIONS = ("neutral", "happy", "sad", "angry")
"""Tasks of IEMOCAP: each a class, 1 where the utterance has the emotion and 0 where it has not."""

UNIMODAL_TASK = {"text": "T", "audio": "A", "vision": "V"}

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One utterance.

    Attributes:
        key: the data set's own id, e.g. ``video$_$clip``; unique in a data set, any unicode.
        split: one of `SPLITS`.
        modalities: name -> (T, D) float array without padding; an absent modality is not in the mapping.
        labels: task -> label in the data set's units (MOSI, MOSEI: -3..3; SIMS: -1..1; a class: its number).
        raw_text: the transcript, where there is one.
        tokens: (T,) int32 token ids of the data set's own tokenizer with its special tokens, where there are some.
        remarks: what is odd about it but not wrong, as sentences with ``{:,}`` where the report after packing puts the
            number of samples of which the same is true.
    """

    key: str
    split: str
    modalities: dict[str, np.ndarray]
    labels: dict[str, float]
    raw_text: str | None = None
    tokens: np.ndarray | None = None
    remarks: tuple[str, ...] = ()
