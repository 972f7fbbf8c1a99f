"""What is sent to a cluster: the description's command with all that its cluster decides, as words of a command line.

The cluster's own part is done by ``mmsa-dist cluster run`` (`cluster.run`), which stands before the command: it asks
for nodes, waits for them, and goes on with a run that was begun already.
"""

import re
import shlex

from cluster.description import Description
from cluster.errors import ConfigError

DECIDED = {
    "--workers": "workers.least, workers.most and workers.ranks",
    "--launch.workers": "workers.most and workers.ranks",
    "--launch.min-workers": "workers.least and workers.ranks",
    "--launch.cpus-per-worker": "workers.cpus and workers.ranks",
    "--launch.gpus-per-worker": "workers.gpus and workers.ranks",
    "--launcher": "the cluster, which is Ray's",
    "--launch.launcher": "the cluster, which is Ray's",
    "--address": "the cluster",
    "--launch.address": "the cluster",
    "--runs-dir": "shared.path and name",
    "--resume": "`mmsa-dist cluster run`, which finds the run",
    "--tracking-uri": "mlflow",
    "--tracking.uri": "mlflow",
    "--checkpoint.mirror": "storage",
    "--checkpoint.every-seconds": "checkpoint",
}
"""Options of a command that the description decides -> by what."""

STOP = 100
"""Seconds that a job has to end in, once it was told to: for the step and the checkpoint. Ray's own is 3."""

KEEPS_RUNS = ("train", "sweep", "reproduce")
"""Commands that write run folders."""


def words(description: Description, *, nodes: str | None = None) -> list[str]:
    """The command line of the job, without `mmsa-dist`.

    Args:
        nodes: how many there are, LEAST:MOST, where a shell variable says so; None for the description's.

    Raises:
        ConfigError: the command says what the description decides.
    """
    workers = description.workers
    run = ["cluster", "run", "--nodes", nodes or span(workers.least, workers.most), "--cpus", str(workers.cpus)]
    run += ["--gpus", str(workers.gpus)] if workers.gpus else []
    return [*run, "--", *command(description)]


def command(description: Description) -> list[str]:
    """The description's command with the options that its cluster decides.

    Raises:
        ConfigError: it has one of them already.
    """
    given = list(description.command)
    for word in given:
        name = word.partition("=")[0].replace("_", "-")
        if name in DECIDED:
            raise ConfigError(f"command: {name} is decided by {DECIDED[name]}; leave it out of the command")
    if given[0] not in KEEPS_RUNS:
        return given
    workers, ranks = description.workers, description.workers.ranks_each
    decided = ["--runs-dir", description.runs, "--launch.cpus-per-worker", str(workers.cpus // ranks)]
    if workers.gpus:
        decided += ["--launch.gpus-per-worker", f"{workers.gpus / ranks:g}"]
    if given[0] == "train":
        decided += ["--workers", span(workers.least * ranks, workers.most * ranks)]
        decided += ["--checkpoint.mirror", f"{description.storage}/runs"] if description.storage else []
    if seconds := description.checkpoint.seconds:
        decided += ["--checkpoint.every-seconds", f"{seconds:.0f}"]
    return [*given, *decided]


def span(least: int, most: int) -> str:
    """``1:4``, or ``4`` where it is always as many."""
    return f"{most}" if least == most else f"{least}:{most}"


def folded(parts: list[str], indent: int, width: int = 110, end: str = "") -> str:
    """Words as a shell reads them, broken into lines where an option begins.

    Args:
        end: of each line but the last; a backslash where a shell reads the lines, which YAML folds by itself.
    """
    groups: list[list[str]] = [[]]
    for word in parts:
        if word.startswith("--") or groups[-1][:1] == ["--"]:
            groups.append([])
        groups[-1].append(word)
    lines = [""]
    for group in map(shlex.join, filter(None, groups)):
        if lines[-1] and len(lines[-1]) + len(group) + indent > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {group}".strip()
    return f"{end}\n{' ' * indent}".join(lines)


def why_so_often(description: Description) -> str | None:
    """The arithmetic behind the interval of checkpoints, for a comment; None where the recipe decides."""
    checkpoint = description.checkpoint
    if checkpoint.mtbf_hours is None or checkpoint.seconds is None:
        return None
    least = " (the time that writing one takes)" if checkpoint.seconds == checkpoint.write_seconds else ""
    return (
        f"a checkpoint every {checkpoint.seconds:.0f} s{least}: sqrt(2 x {checkpoint.cost_seconds:g} s x "
        f"{checkpoint.mtbf_hours:g} h), Young and Daly"
    )


def reads_bucket(description: Description) -> set[str]:
    """Schemes of the buckets that the command or the storage names."""
    texts = [*description.command, description.storage or ""]
    return {found[1] for text in texts if (found := re.search(r"\b(s3|gs)://", text))}
