"""CPU time of one ULGM step, with running sums (ours) and with both centres computed from all samples (the definition).

Features as wide as Self-MM's on MOSEI, a batch of 32, epoch 2, one thread. Both do all that a step needs; the other
one is written as the public code does it: a mean over the samples of each class, for each task, after every batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import Row, record
from mmsa_dist.label_generators import ULGM, make_generator
from mmsa_dist.systems.base import Prediction
from shards.batch import Batch

WIDTHS = {"M": 128, "T": 32, "A": 16, "V": 32}
BATCH = 32
MODALITIES = ("text", "audio", "vision")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.label_generators", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--repeats", type=int, default=50, help="steps of ours, after 5 to warm up; a fifth of the other"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, raw = [], {}
    for samples in options.samples:
        ours, theirs = measured(samples, options.repeats)
        raw[str(samples)] = {"running_sums": ours, "all_samples": theirs}
        how = ", CPU time of one thread"
        what = f"ULGM, a step of {BATCH} among {samples:,} samples"
        rows += [
            Row(
                f"{what}: running sums",
                round(statistics.median(ours) * 1e3, 3),
                "ms",
                how=f"median of {len(ours)} after 5{how}",
            ),
            Row(
                f"{what}: centres over all samples",
                round(statistics.median(theirs) * 1e3, 3),
                "ms",
                how=f"median of {len(theirs)} after 1{how}",
            ),
        ]
        print(*(f"{row.what}: {row.value:.3f} {row.unit}" for row in rows[-2:]), sep="\n", flush=True)
    first, last = rows[0].value, rows[-2].value
    size = ULGM.state_bytes(options.samples[-1], WIDTHS) / 2**20
    growth = (
        f"ULGM with running sums: a step among {options.samples[-1]:,} samples over one among {options.samples[0]:,}"
    )
    rows.append(Row(growth, round(last / first, 2), wanted="< 2", met=last / first < 2))
    rows.append(Row(f"ULGM's state for {options.samples[-1]:,} samples, on every rank", round(size), "MiB"))
    print(*(f"{row.what}: {row.value:g} {row.unit}" for row in rows[-2:]), sep="\n")
    record("label_generators", rows, raw={"seconds": raw})


def measured(samples: int, repeats: int) -> tuple[list[float], list[float]]:
    """CPU seconds of each step: ours, then with centres over all samples."""
    rng = np.random.default_rng(0)
    labels = rng.uniform(-3, 3, samples).astype(np.float32)
    numbers = np.arange(samples)
    generator = make_generator(
        "ulgm", numbers=numbers, ids=numbers, labels=labels, widths=WIDTHS, label_range=(-3.0, 3.0)
    )
    chunk = 4096
    for begin in range(0, samples, chunk):  # epoch 1: every sample is seen once
        generator.observe(1, *step(numbers[begin : begin + chunk], labels, rng))
    steps = [step(rng.choice(samples, BATCH, replace=False), labels, rng) for _ in range(repeats)]
    ours = [seconds(lambda s=s: generator.observe(2, *s)) for s in [*steps[:5], *steps]][5:]  # type: ignore[misc]
    state = generator.state_dict()
    some = steps[: max(3, repeats // 5)]
    theirs = [seconds(lambda s=s: recompute(state, torch.from_numpy(labels), *s)) for s in [some[0], *some]][1:]  # type: ignore[misc]
    return ours, theirs


def step(numbers: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[list[Batch], list[Prediction]]:
    """A micro-batch with features as a ReLU gives them."""
    size = len(numbers)
    batch = Batch(
        values={},
        lengths={},
        present=dict.fromkeys(MODALITIES, torch.ones(size, dtype=torch.bool)),
        labels={"M": torch.from_numpy(labels[numbers])},
        numbers=torch.from_numpy(numbers.astype(np.int64)),
        weight=torch.ones(size),
        norm=float(size),
        keys=[""] * size,
    )
    features = {k: torch.from_numpy(rng.normal(size=(size, d)).astype(np.float32)).relu() for k, d in WIDTHS.items()}
    return [batch], [Prediction(tasks={}, features=features)]


def recompute(state: dict[str, Tensor], truth: Tensor, batches: list[Batch], predictions: list[Prediction]) -> None:
    """The step by its definition: new labels of the batch, its features stored, every centre from all samples."""
    rows, features = batches[0].numbers, predictions[0].features
    alpha = {}
    for k in WIDTHS:
        centres = (state[f"sum.{k}"] / state[f"count.{k}"][:, None]).float()
        to_positive, to_negative = (features[k] - centres[:, None]).norm(dim=2)
        alpha[k] = (to_negative - to_positive) / (to_positive + 1e-8)
    y_m = truth[rows]
    for k in WIDTHS:
        if k != "M":
            new = 0.5 * alpha[k] / (alpha["M"] + 1e-8) * y_m + 0.5 * (y_m + alpha[k] - alpha["M"])
            state[f"label.{k}"][rows] = state[f"label.{k}"][rows] / 3 + 2 / 3 * new.clamp(-3, 3)
        state[f"feature.{k}"][rows] = features[k]
        labels = truth if k == "M" else state[f"label.{k}"]
        for i, members in enumerate((labels > 0, labels < 0)):
            state[f"sum.{k}"][i] = state[f"feature.{k}"][members].mean(0)
            state[f"count.{k}"][i] = 1.0


def seconds(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


if __name__ == "__main__":
    main()
