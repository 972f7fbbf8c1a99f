"""Feature pickles in the schemas of the MMSA toolkit and of MulT, small enough for tests."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {"text": 6, "audio": 4, "vision": 3}
STEPS = {"text": 7, "audio": 11, "vision": 9}


def split(name: str, samples: int, seed: int = 0, aligned: bool = False, unimodal: bool = False) -> dict[str, Any]:
    """One split: ragged normal noise, padded with zeros; the last real step is never all zero."""
    rng = np.random.default_rng([seed, samples])
    top = 1.0 if unimodal else 3.0
    steps = dict.fromkeys(STEPS, STEPS["text"]) if aligned else STEPS
    text = rng.integers(2, STEPS["text"] + 1, samples)
    lengths = {"text": text} | {
        m: text if aligned else rng.integers(1, STEPS[m] + 1, samples) for m in ("audio", "vision")
    }
    content: dict[str, Any] = {"id": [f"{name}{n // 3}$_${n % 3}" for n in range(samples)]}
    for modality, width in WIDTHS.items():
        values = rng.standard_normal((samples, steps[modality], width)).astype(np.float32)
        values *= np.arange(steps[modality])[None, :, None] < lengths[modality][:, None, None]
        if aligned and modality != "text":
            values[:, 0] = 0  # [CLS] and [SEP] have no sound and no picture
            values[np.arange(samples), text - 1] = 0
        content[modality] = values
    mask = np.arange(STEPS["text"])[None] < text[:, None]
    ids = rng.integers(1000, 30000, (samples, STEPS["text"])) * mask
    content["text_bert"] = np.stack([ids, mask, np.zeros_like(ids)], axis=1)
    content["raw_text"] = np.array([f"words of {name} {n}" for n in range(samples)])
    content["regression_labels"] = np.round(rng.uniform(-top, top, samples), 1).astype(np.float32)
    content["classification_labels"] = np.sign(content["regression_labels"]) + 1
    content["annotations"] = np.array(["Neutral"] * samples)
    if not aligned:
        content |= {f"{m}_lengths": lengths[m].tolist() for m in ("audio", "vision")}
    if unimodal:
        content |= {f"regression_labels_{t}": np.round(rng.uniform(-1, 1, samples), 1) for t in "TAV"}
    return content


def content(**options: Any) -> dict[str, Any]:
    """All three splits."""
    return {name: split(name, count, **options) for name, count in (("train", 12), ("valid", 4), ("test", 5))}


def written(folder: Path, data: Any, protocol: int = 4) -> Path:
    """`data` as a pickle."""
    path = folder / "features.pkl"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


def mult_split(
    name: str, samples: int, seed: int = 0, aligned: bool = False, emotions: bool = False
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """One split as MulT has it, padded in front, and the samples without padding."""
    rng = np.random.default_rng([seed, samples])
    steps = dict.fromkeys(STEPS, STEPS["text"]) if aligned else STEPS
    real: dict[str, list[np.ndarray]] = {}
    content: dict[str, Any] = {}
    words = rng.integers(1, steps["text"] + 1, samples)
    for modality, width in WIDTHS.items():
        lengths = words if aligned or modality == "text" else rng.integers(1, steps[modality] + 1, samples)
        real[modality] = [rng.standard_normal((length, width)).astype(np.float32) for length in lengths]
        content[modality] = np.zeros((samples, steps[modality], width), np.float32)
        for row, values in zip(content[modality], real[modality], strict=True):
            row[len(row) - len(values) :] = values
    if emotions:
        has = rng.integers(0, 2, (samples, 4))
        content["labels"] = np.stack([1 - has, has], axis=-1).astype(np.int64)
    else:
        content["labels"] = np.round(rng.uniform(-3, 3, (samples, 1, 1)), 1)
        content["id"] = np.array([[f"{name}_{n}", f"{n}.5", f"{n + 1}.25"] for n in range(samples)], dtype="S")
    return content, real
