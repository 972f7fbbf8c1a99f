"""What training waits for data: Self-MM and UFEN-MTFN from their packaged MOSI recipes, engine and loader as in a run.

Three figures a system, at 1 and at 2 ranks, epochs of the two kinds in turn, after one that is not counted:

- waiting: the share of an epoch that a rank spends asking for its next batch, the slowest rank's;
- against resident batches: how much longer an epoch is, by the clock and by CPU seconds, than one over the very same
  batches, in memory before the clock starts. What reading costs is CPU; where every core trains already (as many ranks
  as cores), that much longer is the least that an epoch can be.

Each rank trains on one thread and reads with one, the default. Generated data like MOSI, in the page cache.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Row, record

EPOCHS = {"self_mm": 9, "ufen_mtfn": 3}
"""Counted epochs of each kind: a short one is measured more often."""
BOUND = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2199, help="generated utterances over all splits")
    parser.add_argument("--epochs", type=int, help=f"counted epochs of each kind, after one that is not: {EPOCHS}")
    parser.add_argument("--systems", nargs="+", default=list(EPOCHS), choices=EPOCHS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(json.loads(options.rank.read_text()))
        return
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mmsa-stall-") as name:
        folder = Path(name)
        data = pack(folder / "data", options.samples)
        for system, world in itertools.product(options.systems, options.ranks):
            told = trained(system, data, folder, world, (options.epochs or EPOCHS[system]) + 1)
            raw[f"{system}, {world} ranks"] = told
            rows += figures(system, world, told)
    for row in rows:
        print(f"{row.what}: {row.value:.2f} {row.unit} ({row.how})")
    if not options.no_record:
        record("stall", rows, raw)


def pack(folder: Path, samples: int) -> Path:
    from shards.sources.generated import GeneratedSource
    from shards.write import pack as write

    write(GeneratedSource("mosi", samples), folder)
    return folder


def trained(system: str, data: Path, folder: Path, world: int, epochs: int) -> list[dict[str, list[float]]]:
    """What each rank measured."""
    from mmsa_dist.launch import RANK_ENVIRONMENT

    run = folder / f"{system}-{world}"
    run.mkdir()
    processes = []
    for rank in range(world):
        told = {"system": system, "data": str(data), "run": str(run), "rank": rank, "world": world, "epochs": epochs}
        told["launcher"] = os.getpid()
        (run / f"rank-{rank}.json").write_text(json.dumps(told))
        environment = {
            **os.environ,
            **RANK_ENVIRONMENT,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MMSA_RENDEZVOUS": str(run / "rendezvous"),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        command = [sys.executable, "-m", "benchmarks.stall", "--rank", str(run / f"rank-{rank}.json")]
        with (run / f"rank-{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    codes = [process.wait() for process in processes]
    if any(codes):
        logs = "\n".join((run / f"rank-{rank}.log").read_text() for rank in range(world))
        raise SystemExit(f"error: {system} at {world} ranks ended with {codes}:\n{logs}")
    return [json.loads((run / f"answer-{rank}.json").read_text()) for rank in range(world)]


def rank_main(told: dict[str, Any]) -> None:
    """One rank."""
    import torch.distributed as dist

    from mmsa_dist.recipe import load_recipe
    from mmsa_dist.session import open_session
    from mmsa_dist.worker import end_with, join_group, share_cores

    end_with(told["launcher"])
    share_cores(1)
    rank, world, run = told["rank"], told["world"], Path(told["run"])
    words = ["--data", told["data"], "--tracking.no-enabled", "--epochs", str(told["epochs"])]
    recipe = load_recipe(told["system"], None, [*words, "--workers", str(world)])
    join_group(rank, world, recipe.launch.timeout)
    session = open_session(recipe, run, rank, world)
    found: dict[str, list[float]] = {name: [] for name in ("waiting", "steps")}
    for kind in ("loaded", "resident"):
        found |= {kind: [], f"{kind} cpu": []}
    for epoch in range(1, recipe.train.epochs + 1):
        plan = session.plan(epoch)
        resident = list(session.loader.train(plan, rank, world, recipe.optim.accumulation))
        # in turn, and each kind first every other time
        for kind in ("loaded", "resident") if epoch % 2 else ("resident", "loaded"):
            source: Iterable[Any] = resident
            if kind == "loaded":
                source = session.loader.train(plan, rank, world, recipe.optim.accumulation)
            dist.barrier()
            waited, seconds, cpu = one_epoch(session, epoch, source)
            found[kind].append(seconds)
            found[f"{kind} cpu"].append(cpu)
            if kind == "loaded":
                found["waiting"].append(waited)
        found["steps"].append(plan.num_steps)
    (run / f"answer-{rank}.json").write_text(json.dumps(found))
    session.close()
    dist.destroy_process_group()


def one_epoch(session: Any, epoch: int, source: Iterable[Any]) -> tuple[float, float, float]:
    """Trains on the batches of `source` as `mmsa_dist.loop` does; seconds of waiting for them, of all, and of CPU."""
    from mmsa_dist.loop import seed_step

    recipe, engine, generator = session.recipe, session.engine, session.generator
    waited, cpu = 0.0, time.process_time()
    began = asked = time.perf_counter()
    for batches in source:
        waited += time.perf_counter() - asked
        seed_step(recipe.seed, engine.steps, session.rank)
        done = engine.step(batches, lambda p, b: session.system.loss(p, b, generator.targets(b, p)))
        generator.observe(epoch, batches, done.predictions)
        asked = time.perf_counter()
    return waited, time.perf_counter() - began, time.process_time() - cpu


def figures(system: str, world: int, ranks: list[dict[str, list[float]]]) -> list[Row]:
    """The shares of an epoch, of the rank that waits longest."""
    counted = [{name: values[1:] for name, values in rank.items()} for rank in ranks]
    waiting = max(
        statistics.median(w / e for w, e in zip(rank["waiting"], rank["loaded"], strict=True)) for rank in counted
    )

    def longer(suffix: str = "") -> float:
        kinds = [(rank[f"resident{suffix}"], rank[f"loaded{suffix}"]) for rank in counted]
        return max(statistics.median(1 - r / e for r, e in zip(*pair, strict=True)) for pair in kinds)

    steps, epochs = int(ranks[0]["steps"][0]), len(counted[0]["loaded"])
    step = 1000 * statistics.median(counted[0]["loaded"]) / steps
    at = f"{system} at {world} rank{'s' if world > 1 else ''}"
    how = f"median of {epochs} epochs after 1; {steps} steps of {step:,.0f} ms"
    wanted = f"< {BOUND:.0%}"
    return [
        Row(f"{at}: waiting for data", 100 * waiting, "%", wanted, how, waiting < BOUND),
        Row(f"{at}: an epoch longer than over resident batches", 100 * longer(), "%", wanted, how, longer() < BOUND),
        Row(f"{at}: CPU of reading, of all of an epoch's", 100 * longer(" cpu"), "%", how=how),
    ]


if __name__ == "__main__":
    main()
