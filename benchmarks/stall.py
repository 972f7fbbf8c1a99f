"""What training waits for data: Self-MM and UFEN-MTFN from their packaged MOSI recipes, engine and loader as in a run.

Both without a text encoder, which hides what reading costs: Self-MM then computes little for what it reads. As papers
train it, behind a fine-tuned text encoder (a small one, MiniLM), it is a case of its own: there readers tokenize too.

Three figures a case, at 1 and at 2 ranks, epochs of the two kinds in turn, after one that is not counted:

- waiting: the share of an epoch that a rank spends asking for its next batch, the slowest rank's;
- against resident batches: how much longer an epoch is, by the clock and by CPU seconds, than one over the very same
  batches, in memory before the clock starts. What reading costs is CPU; where every core trains already (as many ranks
  as cores), that much longer is the least that an epoch can be.

As in a run, where the epoch before is evaluated meanwhile, the first batches are read before the clock of an epoch
starts; the CPU seconds of it are counted. Where a process's memory happens to lie moves its epochs by several percent,
so there are several sessions, each of new processes. Each rank trains on one thread and reads with one, the default.
Generated data like MOSI, in the page cache.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import MINILM
from benchmarks.record import ROOT, Row, record


@dataclass(frozen=True)
class Case:
    """In how many sessions of how many counted epochs of each kind a system is trained: of short epochs more."""

    what: str
    system: str
    sessions: int
    epochs: int
    words: tuple[str, ...] = ()
    """More of its command line."""


CASES = {
    "self_mm": Case("self_mm", "self_mm", 5, 6),
    "ufen_mtfn": Case("ufen_mtfn", "ufen_mtfn", 3, 2),
    "self_mm_encoder": Case("self_mm with a text encoder", "self_mm", 1, 2, ("--text.encoder", MINILM)),
}
BOUND = 0.02
EVALUATION = 0.3
"""Seconds that stand for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2199, help="generated utterances over all splits")
    parser.add_argument("--epochs", type=int, help="counted epochs of each kind, after one that is not")
    parser.add_argument("--sessions", type=int, help="each of new processes")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="(default: all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(json.loads(options.rank.read_text()))
        return
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mmsa-stall-") as made:
        folder = Path(made)
        words = ["--data", str(pack(folder / "data", options.samples))]
        for name, world in itertools.product(options.cases, options.ranks):
            case = CASES[name]
            epochs = (options.epochs or case.epochs) + 1
            sessions = [folder / f"{name}-{world}-{session}" for session in range(options.sessions or case.sessions)]
            told = [trained(case.system, [*words, *case.words], session, world, epochs) for session in sessions]
            raw[f"{case.what}, {world} ranks"] = told
            rows += figures(case.what, world, told)
            for row in rows[-3:]:
                print(f"{row.what}: {row.value:.2f} {row.unit} ({row.how})", flush=True)
    if not options.no_record:
        record("stall", rows, raw)


def pack(folder: Path, samples: int) -> Path:
    from shards.sources.generated import GeneratedSource
    from shards.write import pack as write

    write(GeneratedSource("mosi", samples), folder)
    return folder


def trained(system: str, words: list[str], run: Path, world: int, epochs: int) -> list[dict[str, list[float]]]:
    """What each rank measured."""
    from mmsa_dist.places import RANK_ENVIRONMENT

    run.mkdir()
    processes = []
    for rank in range(world):
        told = {"system": system, "words": words, "run": str(run), "rank": rank, "world": world, "epochs": epochs}
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
    from mmsa_dist.worker import end_with, join_group, take_cores

    end_with(told["launcher"])
    take_cores(1)
    rank, world, run = told["rank"], told["world"], Path(told["run"])
    words = [*told["words"], "--tracking.no-enabled", "--epochs", str(told["epochs"])]
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
            cpu = time.process_time()
            if kind == "loaded":
                source = session.loader.train(plan, rank, world, recipe.optim.accumulation)
            time.sleep(EVALUATION)
            dist.barrier()
            waited, seconds = one_epoch(session, epoch, source)
            cpu = time.process_time() - cpu
            found[kind].append(seconds)
            found[f"{kind} cpu"].append(cpu)
            if kind == "loaded":
                found["waiting"].append(waited)
        found["steps"].append(plan.num_steps)
    (run / f"answer-{rank}.json").write_text(json.dumps(found))
    session.close()
    dist.destroy_process_group()


def one_epoch(session: Any, epoch: int, source: Iterable[Any]) -> tuple[float, float]:
    """Trains on the batches of `source` as `mmsa_dist.loop` does; seconds of waiting for them, and of all."""
    from mmsa_dist.loop import seed_step

    recipe, engine, generator = session.recipe, session.engine, session.generator
    waited = 0.0
    began = asked = time.perf_counter()
    for batches in source:
        waited += time.perf_counter() - asked
        seed_step(recipe.seed, engine.steps, session.rank)
        done = engine.step(batches, lambda p, b: session.system.loss(p, b, generator.targets(b, p)))
        generator.observe(epoch, batches, done.predictions)
        asked = time.perf_counter()
    return waited, time.perf_counter() - began


def figures(name: str, world: int, sessions: list[list[dict[str, list[float]]]]) -> list[Row]:
    """The shares of an epoch, of the rank that waits longest: medians over a session's epochs, then over sessions."""
    counted = [[{name: values[1:] for name, values in rank.items()} for rank in ranks] for ranks in sessions]
    waiting = statistics.median(
        max(statistics.median(w / e for w, e in zip(rank["waiting"], rank["loaded"], strict=True)) for rank in ranks)
        for ranks in counted
    )

    def longer(suffix: str = "") -> float:
        pairs = [[(rank[f"resident{suffix}"], rank[f"loaded{suffix}"]) for rank in ranks] for ranks in counted]
        return statistics.median(
            max(statistics.median(1 - r / e for r, e in zip(*pair, strict=True)) for pair in ranks) for ranks in pairs
        )

    steps, epochs = int(sessions[0][0]["steps"][0]), len(counted[0][0]["loaded"])
    step = 1000 * statistics.median(second for ranks in counted for second in ranks[0]["loaded"]) / steps
    at = f"{name} at {world} rank{'s' if world > 1 else ''}"
    often = f"{len(counted)} session{'s' if len(counted) > 1 else ''}"
    how = f"median of {often} of {epochs} epochs after 1; {steps} steps of {step:,.0f} ms"
    wanted = f"< {BOUND:.0%}"
    return [
        Row(f"{at}: waiting for data", 100 * waiting, "%", wanted, how, waiting < BOUND),
        Row(f"{at}: an epoch longer than over resident batches", 100 * longer(), "%", wanted, how, longer() < BOUND),
        Row(f"{at}: CPU of reading, of all of an epoch's", 100 * longer(" cpu"), "%", how=how),
    ]


if __name__ == "__main__":
    main()
