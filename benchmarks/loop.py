"""Steady state: our loop under Ray and DeepSpeed beside a bare torch loop of the same system, same batches.

Both train Self-MM and UFEN-MTFN from their packaged MOSI recipes on generated MOSI-size data, one rank, one thread,
ZeRO-1. The bare loop is what one would write by hand: forward, loss, backward, torch AdamW, update of the generated
labels, over batches that our loader made in memory beforehand. CPU-seconds of the training process are compared, epoch
by epoch in turn; first epochs are left out.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import Row, record

SYSTEMS = ("self_mm", "ufen_mtfn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=900, help="generated utterances over all splits")
    parser.add_argument("--epochs", type=int, default=5, help="counted epochs, after one that is not")
    parser.add_argument("--encoder", help="fine-tune this text encoder too, as papers do; recorded as loop_encoder")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    how = f"median of {options.epochs} epochs in turn after 1"
    kind = f", {options.encoder.rpartition(':')[2].partition('/')[0]} fine-tuned" if options.encoder else ""
    rows, raw = [], {}
    with tempfile.TemporaryDirectory(prefix="mmsa-") as folder:
        data = pack(Path(folder), options.samples)
        for system in options.systems:
            measured = compare(system, data, Path(folder), options.epochs, options.encoder)
            raw[system] = measured
            ratio = statistics.median(
                b / o for o, b in zip(measured["ours_cpu_s"], measured["bare_cpu_s"], strict=True)
            )
            rows.append(
                Row(
                    f"{system}{kind}: samples per CPU-second, our loop under Ray + DeepSpeed / bare torch loop",
                    round(ratio, 3),
                    wanted="at least 0.9",
                    how=how,
                    met=ratio >= 0.9,
                )
            )
            ours = measured["train_samples"] / statistics.median(measured["ours_cpu_s"])
            what = f"{system}{kind}: training samples per CPU-second, our loop"
            rows.append(Row(what, round(ours, 1), "samples / CPU s"))
    for row in rows:
        print(f"{row.what}: {row.value} {row.unit}")
    if not options.no_record:
        record("loop_encoder" if options.encoder else "loop", rows, raw)


def pack(folder: Path, samples: int) -> Path:
    from shards.sources.generated import GeneratedSource
    from shards.write import pack as write

    write(GeneratedSource("mosi", samples), folder / "mosi")
    return folder / "mosi"


def compare(system: str, data: Path, folder: Path, epochs: int, encoder: str | None) -> dict[str, Any]:
    """Both loops in one Ray Train worker, epoch by epoch in turn."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from mmsa_dist import places
    from mmsa_dist.recipe import load_recipe

    words = ["--data", str(data), "--tracking.no-enabled", "--epochs", str(epochs + 1)]
    recipe = load_recipe(system, None, [*words, *(["--text.encoder", encoder] if encoder else [])])
    places.connect(recipe)
    answer = folder / f"{system}.json"
    trainer = TorchTrainer(
        both_loops,
        train_loop_config={"recipe": recipe.dump(), "folder": str(folder / system), "answer": str(answer)},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name=system, storage_path=str(folder / "ray")),
    )
    trainer.fit()
    return dict(json.loads(answer.read_text()))


def both_loops(config: dict[str, Any]) -> None:
    """The Ray Train worker."""
    import torch

    from mmsa_dist.engine import parameter_groups
    from mmsa_dist.loop import seed_step
    from mmsa_dist.recipe import from_dict
    from mmsa_dist.session import label_generator, open_session
    from mmsa_dist.systems import get_system
    from mmsa_dist.worker import share_cores
    from shards.plan import share

    share_cores(1)
    recipe = from_dict(config["recipe"])
    folder = Path(config["folder"])
    folder.mkdir()
    session = open_session(recipe, folder, 0, 1)
    torch.manual_seed(recipe.seed)
    bare = get_system(recipe.system)(recipe.model, session.spec)
    kind = torch.optim.AdamW if recipe.optim.name == "adamw" else torch.optim.Adam
    optimizer = kind(parameter_groups(bare, recipe.optim), fused=True)
    labels = label_generator(recipe, session.index, bare, session.engine.device)
    ours, theirs, losses = [], [], []
    for epoch in range(1, recipe.train.epochs + 1):
        plan = session.plan(epoch)
        began = cpu_seconds()
        total = 0.0
        for batches in session.loader.train(plan, 0, 1, recipe.optim.accumulation):
            seed_step(recipe.seed, session.engine.steps, 0)
            done = session.engine.step(batches, lambda p, b: session.system.loss(p, b, session.generator.targets(b, p)))
            session.generator.observe(epoch, batches, done.predictions)
            total += done.loss
        ours.append(cpu_seconds() - began)
        # the same batches, in memory before the clock starts
        ready = list(itertools.chain.from_iterable(session.loader.train(plan, 0, 1, 1)))
        assert len(ready) == plan.num_steps and len(share(plan.step(0), 0, 1, 1)) == 1
        began = cpu_seconds()
        bare.train()
        bare_total = 0.0
        for batch in ready:
            optimizer.zero_grad()
            prediction = bare(batch)
            loss = bare.loss(prediction, batch, labels.targets(batch)).total
            loss.backward()
            optimizer.step()
            labels.observe(epoch, [batch], [prediction])
            bare_total += loss.item()
        theirs.append(cpu_seconds() - began)
        losses.append([total / plan.num_steps, bare_total / plan.num_steps])
    answer = {
        "train_samples": plan.num_samples,
        "batch": recipe.data.batch_size,
        "ours_cpu_s": ours[1:],
        "bare_cpu_s": theirs[1:],
        "losses": losses,
        "wall": time.time(),
        "pid": os.getpid(),
    }
    Path(config["answer"]).write_text(json.dumps(answer))
    session.close()


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
