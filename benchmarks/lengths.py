"""What sorting by length saves (`data.length_pool`): padding, and training samples per CPU-second.

A plain torch loop, one process and one thread, over an epoch of our loader's batches at each pool, in turn: forward,
loss, backward, AdamW, update of the generated labels. Padding is the share of the steps computed that are not real, of
all modalities together. Generated data has lengths that are drawn for each modality by itself, so that a batch alike in
one is not alike in another: real utterances, whose lengths go together, gain more. With ``--real``, the folder of real
CMU-MOSI (docs/your-data.md), transcripts go through a fine-tuned MiniLM, as papers train: there nearly all is text.
"""

import argparse
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import MINILM
from benchmarks.real import SPLITS
from benchmarks.record import Row, record
from benchmarks.render import measured, table, wanted
from mmsa_dist.worker import take_cores

POOLS = (0, 1, 16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=900, help="generated utterances over all splits")
    parser.add_argument("--epochs", type=int, default=2, help="counted epochs, after one that is not")
    parser.add_argument("--systems", nargs="+", default=["ufen_mtfn", "self_mm"])
    parser.add_argument("--real", type=Path, help="folder with MOSI's utterances.csv and features.npz")
    parser.add_argument(
        "--real-steps", type=int, default=16, help="steps of an epoch with the encoder that are counted"
    )
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    take_cores(1)
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        mosi = real(options.real, Path(name)) if options.real else None
        data = generated(Path(name), options.samples)
        for system in options.systems:
            raw[f"{system}, generated like MOSI"] = compare(system, data, [], options.epochs, None)
        if mosi:
            words = ["--text.encoder", MINILM, "--batch-size", "32"]
            raw["self_mm, real MOSI, MiniLM fine-tuned"] = compare("self_mm", mosi, words, 1, options.real_steps)
    rows = [row for name, found in raw.items() for row in report(name, found)]
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    if not options.no_record:
        record("lengths", rows, raw=raw)


def report(name: str, found: dict[str, Any]) -> list[Row]:
    """Padding at each pool, and how much faster the largest is than none."""
    rows = []
    for pool in POOLS:
        figures = found[str(pool)]
        what = f"{name}: " + (f"sorted in pools of {pool}" if pool else "not sorted")
        rows.append(Row(f"{what}: padding", 100 * figures["padding"], "% of steps"))
        rate = figures["samples"] / statistics.median(figures["cpu_s"])
        rows.append(Row(f"{what}: training", rate, "samples / CPU s", how=f"median of {len(figures['cpu_s'])}"))
    none, most = found["0"], found[str(POOLS[-1])]
    gain = statistics.median(none["cpu_s"]) * most["samples"] / (statistics.median(most["cpu_s"]) * none["samples"])
    rows.append(Row(f"{name}: samples per CPU-second, pools of {POOLS[-1]} / not sorted", gain, headline=True))
    return rows


def compare(system: str, data: Path, words: list[str], epochs: int, steps: int | None) -> dict[str, Any]:
    """One system over the same data at each pool, epoch by epoch in turn."""
    trainers = {str(pool): Trainer(system, data, [*words, "--data.length-pool", str(pool)]) for pool in POOLS}
    found: dict[str, Any] = {}
    for epoch in range(1, epochs + 2):
        for pool, trainer in trainers.items():
            figures = trainer.epoch(epoch, steps)
            if epoch > 1:
                kept = found.setdefault(pool, {**figures, "cpu_s": []})
                kept["cpu_s"].append(figures["cpu_s"])
    return found


class Trainer:
    """A system, its data and a plain loop."""

    def __init__(self, system: str, data: Path, words: list[str]) -> None:
        from mmsa_dist.learning_rates import parameter_groups
        from mmsa_dist.recipe import load_recipe
        from mmsa_dist.session import batch_spec, data_spec, label_generator, open_index
        from mmsa_dist.systems import get_system
        from shards.loader import Loader
        from shards.mix import open_reader

        self.recipe = load_recipe(system, "mosi", ["--data", str(data), *words])
        self.index = open_index(self.recipe)
        self.spec = data_spec(self.recipe, self.index)
        torch.manual_seed(1)
        self.system = get_system(system)(self.recipe.model, self.spec)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.system, self.recipe.optim), fused=True)
        self.labels = label_generator(self.recipe, self.index, self.system, torch.device("cpu"))
        self.loader = Loader(open_reader(self.index), batch_spec(self.recipe, self.index, self.spec), readers=0)

    def epoch(self, epoch: int, steps: int | None) -> dict[str, Any]:
        """One epoch, or its first `steps`: samples, CPU seconds, and the share of padding."""
        from mmsa_dist.session import plan_of

        plan = plan_of(self.recipe, self.index, self.spec, epoch)
        samples = real = padded = 0
        began = cpu_seconds()
        self.system.train()
        for step, (batch,) in enumerate(self.loader.train(plan, 0, 1)):
            if step == steps:
                break
            self.optimizer.zero_grad()
            prediction = self.system(batch)
            self.system.loss(prediction, batch, self.labels.targets(batch)).total.backward()
            self.optimizer.step()
            self.labels.observe(epoch, [batch], [prediction])
            samples += batch.size
            real += sum(int(lengths.sum()) for lengths in batch.lengths.values())
            padded += sum(batch.size * values.shape[1] for values in batch.values.values())
        return {"samples": samples, "cpu_s": cpu_seconds() - began, "padding": 1 - real / padded}


def generated(folder: Path, samples: int) -> Path:
    from shards.sources.generated import GeneratedSource
    from shards.write import pack

    pack(GeneratedSource("mosi", samples), folder / "generated")
    return folder / "generated"


def real(source: Path, folder: Path) -> Path:
    """Real MOSI, packed."""
    from mmsa_dist.__main__ import main as run

    out, files = folder / "real", [str(source / "utterances.csv"), str(source / "features.npz")]
    code = run(["pack", "table", *files, "--out", str(out), *SPLITS["poria"][1]])
    assert code == 0, code
    return out


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
