"""CPU time of one step of each label generator as the data set grows.

With running sums (ours), and for ULGM beside it with both centres computed from all samples (the definition).
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
from mmsa_dist.label_generators import SUGRM, ULAG, ULGM, LabelGenerator, make_generator
from mmsa_dist.systems.base import Prediction
from mmsa_dist.worker import take_cores
from shards.batch import Batch

WIDTHS = {"M": 128, "T": 32, "A": 16, "V": 32}
BATCH = 32
MODALITIES = ("text", "audio", "vision")
GENERATORS = (ULGM, SUGRM, ULAG)
OURS, DEFINITION = "running sums", "centres over all samples"
WARM = {OURS: 5, DEFINITION: 1}
"""Steps before the first that counts."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.label_generators", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--repeats", type=int, default=50, help="steps of ours, after 5 to warm up; a fifth of the other"
    )
    options = parser.parse_args()
    take_cores(1)
    rows: list[Row] = []
    raw: dict[str, dict[str, list[float]]] = {}
    for cls in GENERATORS:
        steps = {samples: measured(cls, samples, options.repeats) for samples in options.samples}
        raw |= {f"{cls.name}, {samples}": seconds for samples, seconds in steps.items()}
        rows += rows_of(cls, steps)
    record("label_generators", rows, raw={"seconds": raw})


def rows_of(cls: type[LabelGenerator], steps: dict[int, dict[str, list[float]]]) -> list[Row]:
    """Of one generator, from seconds by number of samples and way; printed too."""
    name, rows = cls.name.upper(), []
    for samples, ways in steps.items():
        for way, seconds in ways.items():
            how = f"median of {len(seconds)} after {WARM[way]}, CPU time of one thread"
            what = f"{name}, a step of {BATCH} among {samples:,} samples: {way}"
            rows.append(Row(what, round(statistics.median(seconds) * 1e3, 3), "ms", how=how))
    least, most = min(steps), max(steps)
    ratio = statistics.median(steps[most][OURS]) / statistics.median(steps[least][OURS])
    growth = f"{name} with running sums: a step among {most:,} samples over one among {least:,}"
    rows.append(Row(growth, round(ratio, 2), wanted="< 2", met=ratio < 2))
    size = cls.state_bytes(most, WIDTHS) / 2**20
    rows.append(Row(f"{name}'s state for {most:,} samples, on every rank", round(size), "MiB"))
    print(*(f"{row.what}: {row.value:g} {row.unit}" for row in rows), sep="\n", flush=True)
    return rows


def measured(cls: type[LabelGenerator], samples: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each step: ours, and of ULGM with centres over all samples."""
    rng = np.random.default_rng(0)
    labels = rng.uniform(-3, 3, samples).astype(np.float32)
    numbers = np.arange(samples)
    generator = make_generator(
        cls.name, numbers=numbers, ids=numbers, labels=labels, widths=WIDTHS, label_range=(-3.0, 3.0)
    )
    layers = generator.layers is not None
    chunk = 4096
    for begin in range(0, samples, chunk):  # epoch 1: every sample is seen once
        generator.observe(1, *step(numbers[begin : begin + chunk], labels, rng, layers))
    steps = [step(rng.choice(samples, BATCH, replace=False), labels, rng, layers) for _ in range(repeats)]
    ours = [seconds(lambda s=s: generator.observe(2, *s)) for s in [*steps[:5], *steps]][5:]  # type: ignore[misc]
    if cls is not ULGM:
        return {OURS: ours}
    state = generator.state_dict()
    some = steps[: max(3, repeats // 5)]
    theirs = [seconds(lambda s=s: recompute(state, torch.from_numpy(labels), *s)) for s in [some[0], *some]][1:]  # type: ignore[misc]
    return {OURS: ours, DEFINITION: theirs}


def step(
    numbers: np.ndarray, labels: np.ndarray, rng: np.random.Generator, layers: bool
) -> tuple[list[Batch], list[Prediction]]:
    """A micro-batch with features as a ReLU gives them, and what the generator's own layers say where it has some."""
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
    learned = {k: torch.from_numpy(rng.normal(size=size).astype(np.float32)) for k in WIDTHS if layers and k != "M"}
    return [batch], [Prediction(tasks={}, features=features, learned=learned)]


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
