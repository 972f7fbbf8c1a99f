"""Both systems on real ragged sequences: the word-aligned valid split of CMU-MOSI (2 to 44 steps an utterance)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mmsa_dist.systems import DataSpec, get_system
from shards.batch import Batch, pad
from tests.mmsa_dist.batches import build, loss_of, padded, rows

FILE = (
    Path(os.environ.get("MMSA_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data")
    / "mosi"
    / "valid_word_aligned.npz"
)
pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason=f"needs real CMU-MOSI at {FILE}; set MMSA_REAL_DATA to the folder that holds mosi/"
)


@pytest.fixture(scope="module")
def real() -> Batch:
    """The 48 first utterances: Facet as vision, COVAREP as audio, each scaled by its largest value."""
    with np.load(FILE, allow_pickle=False) as file:
        ends = np.cumsum(file["length"])[:48]
        labels = torch.from_numpy(file["label"][:48].astype(np.float32))
        features = {"audio": file["audio_covarep"], "vision": file["vision_facet"]}
    values, lengths, present = {}, {}, {}
    for name, steps in features.items():
        finite = np.nan_to_num(steps.astype(np.float32), posinf=0.0, neginf=0.0)
        scaled = finite / np.maximum(np.abs(finite).max(0), 1e-6)
        arrays = np.split(scaled[: ends[-1]], ends[:-1])
        values[name], lengths[name], present[name] = pad(list(arrays), scaled.shape[1])
    return Batch(
        values=values,
        lengths=lengths,
        present=present,
        labels=dict.fromkeys("MTAV", labels),
        numbers=torch.arange(48),
        weight=torch.ones(48),
        norm=48.0,
        keys=[str(row) for row in range(48)],
    )


@pytest.mark.parametrize("name", ["self_mm", "ufen_mtfn"])
def test_padding_is_nothing_and_halves_make_the_whole(name: str, real: Batch) -> None:
    assert int(real.lengths["audio"].max()) > 2 * int(real.lengths["audio"].min())
    widths = {modality: values.shape[2] for modality, values in real.values.items()}
    system = build(get_system(name), DataSpec(widths, (-3.0, 3.0), ("M",))).eval()
    with torch.no_grad():
        whole = system(real).tasks["M"]
        more = system(padded(real, {"audio": 31, "vision": 6}, None)).tasks["M"]
        alone = torch.cat([system(rows(real, slice(row, row + 1), 1.0)).tasks["M"] for row in range(48)])
        halves = [loss_of(system, rows(real, half, 24.0)) for half in (slice(0, 24), slice(24, 48))]
    assert (whole - more).abs().max() <= 1e-6
    assert (whole - alone).abs().max() <= 1e-6
    assert ((halves[0] + halves[1]) / 2).item() == pytest.approx(loss_of(system, real).item(), rel=1e-6)
