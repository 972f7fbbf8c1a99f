"""What a step costs: our loop beside a bare torch loop, and where the time of a step goes.

- **Steady state.** The loop of `mmsa-dist train`, under Ray Train and DeepSpeed at ZeRO 0 and 1, and what one would
  write by hand (`benchmarks.bare_loops`): torch's DistributedDataParallel (at one rank the module itself), forward,
  loss, backward, the same fused Adam, the update of the generated labels; and the same with DeepSpeed's engine in place
  of DistributedDataParallel, which tells what of the difference is DeepSpeed's. After each epoch of ours comes the same
  epoch of the bare ones, in the same processes, on the same batches, which they find in memory while ours reads them
  from shards. What is compared is CPU seconds of all ranks, ours with reading, records and agreeing; not evaluation,
  nor checkpoints, which are waited for and of which `benchmarks.recovery` tells. First epochs are left out. Reading
  begins an epoch early, so that of about two batches an epoch the reading is not counted. Losses of the first steps are
  compared too: all learn the same.
- **A step by ranks and ZeRO stage.** One global batch by 1, 2 and 4 ranks: seconds by the clock, seconds in which a
  collective was under way (waiting for a slower rank is part of that), CPU seconds of all ranks; beside it an
  all-reduce of as many numbers as the system has, which data-parallel training cannot do without.

With a GPU seconds by the clock take the place of CPU seconds; ``--launcher local`` does without Ray.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import MINILM
from benchmarks.record import ROOT, Row, Table, record
from benchmarks.render import measured, table, wanted
from mmsa_dist.places import RANK_ENVIRONMENT

if TYPE_CHECKING:
    from benchmarks.bare_loops import Bare
    from mmsa_dist.ledger import Ledger
    from mmsa_dist.session import Session

CASES = {"self_mm": (900, None), "ufen_mtfn": (900, None), "self_mm behind MiniLM": (200, MINILM)}
"""Name, which begins with the system's -> generated utterances, text encoder that is fine-tuned."""
WANTED = 0.95
COUNTED = ("step", "data", "other")
"""What of our loop is its own (`mmsa_dist.ledger`)."""
SAME_LOSSES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="(default: all)")
    parser.add_argument("--epochs", type=int, default=5, help="counted, after one that is not (default: %(default)s)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1], help="of the steady state (default: 0 1)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="of the steady state (default: 1 2)")
    parser.add_argument("--steps", type=int, default=10, help="counted of each kind of step (default: %(default)s)")
    parser.add_argument("--step-ranks", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="(default: %(default)s)")
    parser.add_argument("--launcher", default="ray", choices=["ray", "local"], help="(default: %(default)s)")
    parser.add_argument("--name", default="training", help="of the result's file (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return rank(json.loads(options.rank))
    rows: list[Row] = []
    shown: list[list[str]] = []
    raw: dict[str, list[dict[str, Any]]] = {"steady": [], "steps": []}
    with tempfile.TemporaryDirectory(prefix="mmsa-training-") as name:
        folder = Path(name)
        for case in options.cases:
            data = generated(folder, CASES[case][0])
            for ranks in options.ranks:
                stages = [stage for stage in options.stages if stage or options.precision == "fp32"]
                found = steady(folder, case, data, ranks, stages, options)
                raw["steady"].append(found)
                fresh = [row for stage in map(str, stages) for row in compared(found, stage, options.epochs)]
                print(*(f"{each.what}: {each.value:.3f}" for each in fresh), sep="\n", flush=True)
                rows += fresh
            for ranks in options.step_ranks:
                found = {"case": case, "ranks": ranks} | in_group(
                    folder, ranks, job("step_costs", case, data, options, steps=options.steps), "local"
                )
                raw["steps"].append(found)
                shown += lines(found)
    head = ["a step of", "ranks", "ZeRO", "ms", "ms in collectives", "ms of an all-reduce alone", "CPU ms, all ranks"]
    tables = [Table("A step of one global batch", head, shown)]
    print(table(head, shown))
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    if not options.no_record:
        record(options.name, rows, raw=raw, tables=tables)
    return None


def compared(found: dict[str, Any], stage: str, epochs: int) -> list[Row]:
    """Samples a CPU second (on a GPU, a second), ours by each bare loop's, of the median epoch."""
    seconds = found["stages"][stage]
    case = f"{found['case']}, {found['ranks']} rank{'s' * (found['ranks'] > 1)}, ZeRO {stage}"
    how = f"median of {epochs} epochs in turn after 1"
    rows = []
    for name, bound in (("torch DDP", WANTED), ("DeepSpeed", None)):
        if name not in seconds:
            continue
        ratio = statistics.median(b / o for o, b in zip(seconds["ours"], seconds[name], strict=True))
        what = f"{case}: samples a {found['unit']}, our loop / bare {name}"
        wanted, met = (f"at least {bound}", ratio >= bound) if bound else ("", None)
        rows.append(Row(what, ratio, "", wanted, how, met, headline=True))
    return rows


def lines(found: dict[str, Any]) -> list[list[str]]:
    of = [[found["case"], str(found["ranks"]), stage] for stage in found["stages"]]
    keys = ("wall", "collectives", "alone", "cpu")
    return [what + [f"{1000 * found['stages'][what[2]][key]:.1f}" for key in keys] for what in of]


def generated(folder: Path, samples: int) -> Path:
    from shards.sources.generated import GeneratedSource
    from shards.write import pack

    target = folder / f"mosi-{samples}"
    if not target.exists():
        pack(GeneratedSource("mosi", samples), target)
    return target


def job(kind: str, case: str, data: Path, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a rank is told."""
    words = ["--data", str(data), "--tracking.no-enabled", "--engine.precision", options.precision, "--train.no-test"]
    if encoder := CASES[case][1]:
        words += ["--text.encoder", encoder]
    return {"kind": kind, "system": case.split()[0], "words": words, **more}


def steady(
    folder: Path, case: str, data: Path, ranks: int, stages: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    """Both loops at each stage, in the same processes."""
    told = job("both_loops", case, data, options, stages=stages, epochs=options.epochs)
    return {"case": case, "ranks": ranks} | in_group(folder, ranks, told, options.launcher)


def in_group(folder: Path, ranks: int, told: dict[str, Any], launcher: str) -> dict[str, Any]:
    """What rank 0 of a group of `ranks` answers."""
    place = Path(tempfile.mkdtemp(dir=folder))
    told = {**told, "ranks": ranks, "place": str(place)}
    if launcher == "ray":
        _under_ray(told)
    else:
        _as_processes(told)
    return dict(json.loads((place / "answer.json").read_text()))


def _under_ray(told: dict[str, Any]) -> None:
    import torch
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from mmsa_dist import places

    places.connect(recipe_of(told, 0))
    TorchTrainer(
        measure,
        train_loop_config=told,
        scaling_config=ScalingConfig(num_workers=told["ranks"], use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(name="measured", storage_path=f"{told['place']}/ray"),
    ).fit()


def _as_processes(told: dict[str, Any]) -> None:
    processes = []
    for number in range(told["ranks"]):
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(told["ranks"])}
        one_thread = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment = {**os.environ, **RANK_ENVIRONMENT, **one_thread, **place}
        command = [sys.executable, "-m", "benchmarks.training", "--rank", json.dumps({**told, "rank": number})]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    if max(process.wait() for process in processes):
        raise SystemExit("error: a rank failed")


def rank(told: dict[str, Any]) -> None:
    """One process of a group that Ray did not start."""
    import torch
    import torch.distributed as dist

    store = dist.FileStore(f"{told['place']}/store", told["ranks"])
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=told["rank"], world_size=told["ranks"])
    measure(told)
    os._exit(0)


def measure(told: dict[str, Any]) -> None:
    """One rank, within a process group; the first one writes the answer."""
    import torch.distributed as dist

    from benchmarks.steps import step_costs
    from mmsa_dist.worker import take_cores

    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    take_cores(1)
    answer = {"both_loops": both_loops, "step_costs": step_costs}[told["kind"]](told)
    if dist.get_rank() == 0:
        Path(told["place"], "answer.json").write_text(json.dumps(answer))


def recipe_of(told: dict[str, Any], stage: int) -> Any:
    from mmsa_dist.recipe import load_recipe

    epochs = ["--epochs", str(told.get("epochs", 1) + 1), "--train.patience", "1000"]
    own = ["--zero", str(stage), "--workers", str(told["ranks"])]
    return load_recipe(told["system"], None, [*told["words"], *epochs, *own])


def opened(told: dict[str, Any], stage: int) -> "Session":
    import torch.distributed as dist

    from mmsa_dist.session import open_session

    folder = Path(told["place"]) / f"zero-{stage}"
    for part in ("events", "checkpoints", "predictions"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return open_session(recipe_of(told, stage), folder, dist.get_rank(), dist.get_world_size())


def clock() -> tuple[Callable[[], float], str]:
    """What counts, and its name: CPU seconds of this process; with a GPU, seconds."""
    import torch

    if torch.cuda.is_available():

        def seconds() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return seconds, "second"
    return cpu_seconds, "CPU second"


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def both_loops(told: dict[str, Any]) -> dict[str, Any]:
    """Ours to its end at each stage; whenever it reports an epoch, the bare loops take that epoch too."""
    from benchmarks.bare_loops import BARE
    from mmsa_dist.ledger import Ledger
    from mmsa_dist.loop import fit
    from mmsa_dist.tracking import NullTracker

    now, unit = clock()
    answer: dict[str, Any] = {"unit": unit, "stages": {}}
    for stage in told["stages"]:
        session = opened(told, stage)
        narrow = session.recipe.engine.precision != "fp32"  # then DeepSpeed alone does not take our batches
        bare = {name: kind(session) for name, kind in BARE.items() if not (narrow and name == "DeepSpeed")}
        ledger, events = Ledger(clock=now), heard(session)
        turns = Turns(ledger, bare, now)
        fit(session, events, NullTracker(), turns, ledger)
        session.close()
        first = list(zip(events.losses, *(each.losses for each in bare.values()), strict=True))[:SAME_LOSSES]
        if any(max(step) - min(step) > 1e-4 * max(1.0, abs(step[0])) for step in first):
            raise SystemExit(f"error: the loops do not learn the same: {first}")
        for each in bare.values():
            each.close()
        summed = {name: over_ranks(seconds)[1:] for name, seconds in turns.spent.items()}
        answer["stages"][str(stage)] = {**summed, "losses": first}
    return answer


class Turns:
    """Told of each epoch of our loop: books what it took, and lets the bare loops take it."""

    def __init__(self, ledger: "Ledger", bare: "dict[str, Bare]", now: Callable[[], float]) -> None:
        self.ledger, self.bare, self.now = ledger, bare, now
        self.spent: dict[str, list[float]] = {name: [] for name in ("ours", *bare)}
        self.before = 0.0

    def __call__(self, summary: dict[str, Any]) -> None:
        self.spent["ours"].append(self.counted() - self.before)
        for name, each in self.bare.items():
            each.wait_for_checkpoint(summary["step"])
            self.spent[name].append(each.epoch(summary["epoch"], self.now))
        self.before = self.counted()

    def counted(self) -> float:
        return sum(seconds for name, seconds in self.ledger.booked().items() if name in COUNTED)


def heard(session: "Session") -> Any:
    """The run's events, which keep each step's loss besides."""
    from mmsa_dist.run_folder import Events

    class Heard(Events):
        def __init__(self) -> None:
            super().__init__(session.folder, session.rank)
            self.losses: list[float] = []

        def step(self, epoch: int, step: int, of: int, loss: float) -> None:
            super().step(epoch, step, of, loss)
            self.losses.append(loss)

    return Heard()


def over_ranks(seconds: list[float]) -> list[float]:
    """Of CPU seconds the sum over ranks, which are their cost; of others the mean."""
    import torch
    import torch.distributed as dist

    gathered = torch.tensor(seconds, dtype=torch.float64)
    if torch.cuda.is_available():
        gathered = gathered.cuda() / dist.get_world_size()
    dist.all_reduce(gathered)
    return [float(value) for value in gathered]


if __name__ == "__main__":
    main()
