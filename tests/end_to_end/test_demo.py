"""`make demo DATA=file.pkl` on a small file of MMSA's schema: the script that a new user runs first."""

import csv
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo.sh"
COUNTS = {"train": 24, "valid": 8, "test": 10}


def features(split: str, n: int) -> dict[str, Any]:
    """One split of an unaligned_50.pkl: padded to 6 steps, widths 8, 4 and 3."""
    rng = np.random.default_rng(n)
    lengths = rng.integers(2, 7, n)
    inside = np.arange(6)[None, :] < lengths[:, None]
    tokens = np.zeros((n, 3, 6), dtype=np.int64)
    tokens[:, 0], tokens[:, 1] = rng.integers(5, 50, (n, 6)) * inside, inside
    labels = np.round(rng.uniform(-3, 3, n) * 5) / 5
    return {
        "raw_text": np.array([f"words {i}" for i in range(n)]),
        "id": [f"{split}{i // 4}$_${i % 4}" for i in range(n)],
        **{
            name: (rng.standard_normal((n, 6, width)) * inside[:, :, None]).astype(np.float32)
            for name, width in (("text", 8), ("audio", 4), ("vision", 3))
        },
        "text_bert": tokens,
        "audio_lengths": lengths.tolist(),
        "vision_lengths": lengths.tolist(),
        "annotations": np.array(["Negative" if y < 0 else "Positive" if y > 0 else "Neutral" for y in labels]),
        "classification_labels": (np.sign(labels) + 1).astype(np.float32),
        "regression_labels": labels.astype(np.float32),
    }


@pytest.mark.ray
def test_demo_goes_from_a_pickle_to_predictions(tmp_path: Path) -> None:
    file = tmp_path / "unaligned_50.pkl"
    with file.open("wb") as out:
        pickle.dump({split: features(split, n) for split, n in COUNTS.items()}, out, protocol=4)
    command = ["sh", str(SCRIPT), str(Path(sys.executable).parent), "2", "1", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # the commands as they run, the test table, what to do next
    for words in (
        "$ mmsa-dist pack mmsa",
        "--workers 2 --zero 2",
        "mlflow ui --workers 1 --backend-store-uri sqlite:///",
        "README.md",
    ):
        assert words in done.stdout
    # nothing that is said of generated data only, and no colours in a log
    for words in ("data was generated", "make demo DATA=", "\033["):
        assert words not in done.stdout
    with (tmp_path / "demo" / "predictions.csv").open(newline="") as rows:
        predicted = list(csv.DictReader(rows))
    assert sorted(row["key"] for row in predicted) == sorted(features("test", COUNTS["test"])["id"])
    # everything lies under demo/
    assert {path.name for path in tmp_path.iterdir()} == {"unaligned_50.pkl", "demo"}
