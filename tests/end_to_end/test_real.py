"""A smoke of `make real`: a part of real CMU-MOSI, a pretrained encoder fine-tuned, both systems, the whole way.

The metrics of the whole set are not for a test: `make real` writes them into README.md.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MOSI = Path(os.environ.get("MMSA_REAL_DATA") or REPOSITORY.parent / "shared" / "data") / "mosi"
ROWS = {"train": 320, "valid": 80, "test": 80}

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (MOSI / "utterances.csv").is_file(),
        reason=f"needs real CMU-MOSI at {MOSI}; set MMSA_REAL_DATA to the folder that holds mosi/",
    ),
]


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """A folder as `make real` takes it, with the first rows of each official split."""
    folder = tmp_path / "mosi"
    folder.mkdir()
    (folder / "features.npz").symlink_to(MOSI / "features.npz")
    left = dict(ROWS)
    with (MOSI / "utterances.csv").open(newline="") as source, (folder / "utterances.csv").open("w") as target:
        rows = csv.DictReader(source)
        out = csv.DictWriter(target, rows.fieldnames or [])
        out.writeheader()
        for row in rows:
            if left[row["split_official"]] > 0:
                left[row["split_official"]] -= 1
                out.writerow(row)
    return folder


@pytest.mark.parametrize(
    ("system", "options"),
    [("self_mm", ["--launcher", "local"]), pytest.param("ufen_mtfn", [], marks=[pytest.mark.ray, pytest.mark.slow])],
)
def test_real_text_and_audio_are_learnt_from(system: str, options: list[str], part: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.real", "--data", str(part), "--out", str(tmp_path / "real")]
    command += ["--splits", "official", "--seeds", "1", "--systems", system, "--no-record", "--", "--epochs", "2"]
    done = subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (result,) = (tmp_path / "real" / "runs").glob("*/result.json")
    found = json.loads(result.read_text())
    assert found["valid"]["corr"] > 0.2 and found["test"]["corr"] > 0.2, "audio alone reaches nothing like it"
    assert json.loads((tmp_path / "real" / "official" / "index.json").read_text())["splits"] == ROWS
    assert "vision" not in json.loads((result.parent / "data.json").read_text())["widths"]
