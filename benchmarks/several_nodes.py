"""What training over several machines moves and costs, and what it costs to send a command to a cluster and follow it.

The machines are network namespaces of this one (`tests.nodes`; it takes root), one CPU and one rank each. As they share
its cores, it is CPU-seconds and bytes that say something here, not speed-up.

- Bytes: what a node's network card sends while whole epochs pass, a step, beside what gradients (ZeRO 0: an all-reduce;
  1: and the weights gathered again) come to by formula, 2 (N - 1) / N x 4 bytes a number and node.
- CPU-seconds a sample: of the ranks' processes, beside those of one node. Communication is booked from the ranks' own
  traces: for how long of a step one has a collective under way.
- `mmsa-dist submit` to the first step, beside `mmsa-dist train` on the same head, in turn.
- Following a log: CPU-seconds of the command that follows and of the head, a thousand lines.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import ROOT, Row, Table, record
from benchmarks.recovery import Started
from benchmarks.steps import COLLECTIVES, covered
from tests.nodes import Network, Node, ip, lacking

COMMAND = [sys.executable, "-m", "mmsa_dist"]
PATIENCE = 900.0
DASHBOARD = "http://127.0.0.1:8265"
"""Of a head, on the head."""
LINES = 5_000
TALK = f"import time\nfor number in range({LINES}):\n    print(f'line {{number}}', flush=True)\n    time.sleep(0.004)\n"
"""A job that says a line every few milliseconds."""


@dataclass(frozen=True)
class Trained:
    """Whole epochs in the middle of a run.

    Attributes:
        cpu: CPU-seconds of all ranks a sample. sent: bytes that a node's network card sent, a step, the mean of nodes.
        step: seconds, of rank 0. collectives: of them with a collective under way, from another run's trace.
        numbers: that learn.
    """

    nodes: int
    stage: int
    cpu: float
    sent: float
    step: float
    collectives: float
    numbers: int

    @property
    def formula(self) -> float:
        """Bytes of a step that a node has to send: each of the N parts of the gradients goes N - 1 times one place on
        to be added up, and the sums (ZeRO 1: the new weights) N - 1 times to be known everywhere."""
        return 2 * (self.nodes - 1) / self.nodes * 4 * self.numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="(default: %(default)s)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1], help="ZeRO stages (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="measured, after two (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of submit and train in turn (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    if why := lacking():
        raise SystemExit(f"error: {why}")
    with tempfile.TemporaryDirectory(prefix="mmsa-nodes-") as made:
        folder = Path(made)
        command = [*COMMAND, "pack", "generated", "--like", "mosi", "--samples", "1200", "--out", str(folder / "data")]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        trained = [each for nodes in options.nodes for each in over(folder, nodes, options.stages, options.epochs)]
        submitted, direct, followed = sent_to_a_head(folder, options.repeats)
    rows = [*rows_of(trained), *rows_of_submitting(submitted, direct, followed)]
    for row in rows:
        print(f"{row.what}: {row.value:.3g} {row.unit} ({row.how})")
    raw = {"trained": [vars(each) for each in trained], "submit": submitted, "train": direct, "followed": followed}
    if not options.no_record:
        record("several_nodes", rows, raw=raw, tables=[table_of(trained)])


# --- training over nodes ----------------------------------------------------------------------------------------------


def over(folder: Path, nodes: int, stages: list[int], epochs: int) -> Iterator[Trained]:
    """The same run at each ZeRO stage over a cluster of `nodes`."""
    with Network() as network:
        machines = [network.node(f"node{number}") for number in range(nodes)]
        machines[0].start_ray()
        for machine in machines[1:]:
            machine.start_ray(machines[0])
        for stage in stages:
            place = folder / f"{nodes}-{stage}"
            words = ["--workers", str(nodes), "--zero", str(stage)]
            numbers, collectives = traced(machines[0], folder, place / "traced", words)
            with started(machines[0], folder, place / "run", [*words, "--epochs", "9999"]) as run:
                first = measured(run, machines, 2)
                last = measured(run, machines, 2 + epochs)
            plan = json.loads((run.folder / "plan.json").read_text())
            steps, samples = plan["steps_per_epoch"] * epochs, plan["train_samples"] * epochs
            cpu = sum(last["cpu"]) - sum(first["cpu"])
            sent = statistics.fmean(after - before for before, after in zip(first["sent"], last["sent"], strict=True))
            step = (last["step"] - first["step"]) / steps
            yield Trained(nodes, stage, cpu / samples, sent / steps, step, collectives, numbers)


class OnNodes(Started):
    """A run that is under way on the cluster of a head.

    Args:
        runs: a folder of its own.
    """

    def __init__(self, head: Node, folder: Path, runs: Path, words: list[str]) -> None:
        runs.mkdir(parents=True)
        self.runs = runs
        place = ["--data", str(folder / "data"), "--runs-dir", str(runs), "--address", head.ray_address]
        more = ["--tracking.no-enabled", "--train.no-test", "--train.patience", "9999", "--batch-size", "32"]
        name = f"run-{runs.parent.name}-{runs.name}"
        self.process = head.start(name, *COMMAND, "train", "self_mm", *place, *more, *words)
        self.log = head.log(name)


@contextmanager
def started(head: Node, folder: Path, runs: Path, words: list[str]) -> Iterator[OnNodes]:
    """A run, which is told to end afterwards."""
    run = OnNodes(head, folder, runs, words)
    try:
        yield run
    finally:
        run.process.terminate()
        run.process.wait()


def measured(run: OnNodes, nodes: list[Node], epoch: int) -> dict[str, Any]:
    """CPU-seconds of each rank and bytes that each node has sent, as soon as rank 0 is through with an epoch."""
    ended = run.wait("epoch", epoch)
    pids = [run.events("start", rank)[-1]["pid"] for rank in range(len(nodes))]
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    card = "/sys/class/net/eth0/statistics/tx_bytes"
    sent = [int(node.run("cat", card).stdout) for node in nodes]
    return {"cpu": [each.user + each.system for each in times], "sent": sent, "step": ended["booked"].get("step", 0.0)}


def traced(head: Node, folder: Path, runs: Path, words: list[str], steps: int = 10) -> tuple[int, float]:
    """How many numbers learn, and for how many seconds of a step rank 0 has a collective under way."""
    with started(head, folder, runs, [*words, "--epochs", "1", "--profile", str(steps)]) as run:
        if code := run.process.wait():
            raise SystemExit(f"error: a run ended with {code}:\n{run.log.read_text()}")
    trace = json.loads((run.folder / "profile" / "rank-0.json").read_text())
    spans = [
        (event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event["name"].startswith(COLLECTIVES)
    ]
    return learning(run.folder), covered(spans) / 1e6 / steps


def learning(folder: Path) -> int:
    """How many numbers of a run's system learn."""
    import torch

    from mmsa_dist.data_card import DataCard
    from mmsa_dist.divided import build
    from mmsa_dist.engine import count_parameters
    from mmsa_dist.recipe import read_recipe

    recipe = read_recipe(folder / "recipe.yaml")
    return count_parameters(
        build(recipe.system, recipe.model, DataCard.load(folder).spec(), torch.device("cpu"), in_parts=False)
    )[1]


# --- sending commands -------------------------------------------------------------------------------------------------


def sent_to_a_head(folder: Path, repeats: int) -> tuple[list[float], list[float], dict[str, dict[str, float]]]:
    """Seconds until the first step of `submit` and of `train` in turn; CPU-seconds of a log that is followed
    and of one that is not."""
    with Network() as network:
        head = network.node("head")
        head.start_ray(dashboard=True)
        submitted, direct = list[float](), list[float]()
        for number in range(repeats + 1):
            for kind, taken in (("submit", submitted), ("train", direct)):
                taken.append(to_first_step(head, folder, folder / f"first-{kind}-{number}", kind))
        followed = {kind: talked(head, kind == "followed") for kind in ("detached", "followed")}
    return submitted[1:], direct[1:], followed


def to_first_step(head: Node, folder: Path, runs: Path, kind: str) -> float:
    """Seconds from the command to rank 0's first step."""
    began = time.time()
    words = ["train", "self_mm", "--data", str(folder / "data"), "--runs-dir", str(runs), "--workers", "1"]
    words += ["--tracking.no-enabled", "--train.no-test", "--epochs", "1"]
    more = ["submit", "--working-dir", str(ROOT), "--"] if kind == "submit" else []
    words += [] if more else ["--address", head.ray_address]
    done = head.run(*COMMAND, *more, *words, timeout=PATIENCE)
    if done.returncode:
        raise SystemExit(f"error: {kind} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    (file,) = runs.glob("*/events/rank-0.jsonl")
    events = map(json.loads, file.read_text().splitlines())
    return float(next(event["time"] for event in events if event["event"] == "first_step")) - began


def talked(head: Node, followed: bool) -> dict[str, float]:
    """CPU-seconds of the head's own processes while a job says its lines, and of the command that follows it."""
    job = f"talk-{followed}"
    ray = str(Path(sys.executable).with_name("ray"))
    before = cpu_of(head)
    words = ["--address", DASHBOARD, "--no-wait", "--submission-id", job, "--", sys.executable, "-c", TALK]
    done = head.run(ray, "job", "submit", *words)
    if done.returncode:
        raise SystemExit(f"error: ray job submit ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    own = 0.0
    if followed:
        said = head.run("sh", "-c", f"{shlex.join([*COMMAND, 'jobs', 'logs', job, '--follow'])} | wc -l; times")
        lines, *_, children = said.stdout.splitlines()
        if int(lines) < LINES:
            raise SystemExit(f"error: {lines} of {LINES} lines came:\n{said.stdout}{said.stderr}")
        own = sum(int(part.partition("m")[0]) * 60 + float(part.partition("m")[2][:-1]) for part in children.split())
    while "succeeded" not in (told := head.run(ray, "job", "status", "--address", DASHBOARD, job).stdout):
        if "failed" in told or "stopped" in told:
            raise SystemExit(f"error: the job that talks ended badly:\n{told}")
        time.sleep(1.0)
    return {"head": cpu_of(head) - before, "command": own}


def cpu_of(head: Node) -> float:
    """CPU-seconds of the dashboard and its agent so far, which read logs and send them."""
    whole = 0.0
    for pid in ip("netns", "pids", head.namespace).split():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if "dashboard" in " ".join(process.cmdline()) or "DashboardAgent" in process.name():
                whole += sum(process.cpu_times()[:2])
    return whole


# --- what is shown ----------------------------------------------------------------------------------------------------


def rows_of(trained: list[Trained]) -> list[Row]:
    one = {each.stage: each for each in trained if each.nodes == 1}
    rows = []
    for each in trained:
        if each.nodes == 1:
            continue
        what = f"self_mm over {each.nodes} nodes, ZeRO {each.stage}"
        how = f"{each.numbers:,} numbers that learn"
        rows.append(Row(f"{what}: bytes that a node sends a step / by formula", each.sent / each.formula, "x", how=how))
        if each.stage in one:
            ratio = each.cpu / one[each.stage].cpu
            rows.append(Row(f"{what}: CPU-seconds a sample / over one node", ratio, "x", how="all ranks together"))
    return rows


def rows_of_submitting(submitted: list[float], direct: list[float], followed: dict[str, dict[str, float]]) -> list[Row]:
    how = f"median of {len(submitted)} in turn after 1; 1 rank, its cluster is there"
    more = followed["followed"]["head"] - followed["detached"]["head"]
    return [
        Row("`mmsa-dist submit` to the job's first step", statistics.median(submitted), "s", how=how, headline=True),
        Row("`mmsa-dist submit` / `mmsa-dist train` on that head, to the first step",
            statistics.median(submitted) / statistics.median(direct), "x", how=how),
        Row("following a log: CPU of the command, a thousand lines", 1e3 * followed["followed"]["command"] / LINES, "s",
            how=f"{LINES:,} lines, one every 4 ms; imports too"),
        Row("following a log: CPU of the head, a thousand lines", 1e3 * max(0.0, more) / LINES, "s",
            how="beside the same job with nobody following"),
    ]  # fmt: skip


def table_of(trained: list[Trained]) -> Table:
    head = ["nodes", "ZeRO", "CPU-ms a sample", "kB sent a step and node", "by formula", "ms a step", "in collectives"]
    rows = [
        [
            str(each.nodes), str(each.stage), f"{1e3 * each.cpu:.2f}", f"{each.sent / 1e3:,.0f}",
            f"{each.formula / 1e3:,.0f}", f"{1e3 * each.step:.0f}", f"{1e3 * each.collectives:.0f} ms",
        ]
        for each in trained
    ]  # fmt: skip
    return Table("Self-MM over network namespaces of one machine, one rank each", head, rows)


if __name__ == "__main__":
    main()
