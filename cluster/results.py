"""What a job has reached: which folder its run has, and the ``result.json`` in it, read wherever it lies.

The folder is named in the job's log. Where that is gone, as the head was started anew or the log was removed, it is
found by the job's id, which a run's ``environment.json`` keeps. The file is read here where this machine sees it, else
by a small job on the cluster, which needs nothing but a shell.
"""

import json
import re
import secrets
import shlex
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cluster.client import READER, first_line
from cluster.errors import ConfigError, TransientError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SAID = {
    "train": re.compile(r"^run (/.+)$", re.MULTILINE),
    "sweep": re.compile(r"^sweep (/.+)$", re.MULTILINE),
    "reproduce": re.compile(r"^table .+?: (/.+)$", re.MULTILINE),
}
"""Command -> how its log names the folder that it writes."""
FILES = {"train": "result.json", "sweep": "result.json", "reproduce": "table.md"}
"""Command -> the file in that folder that says what came out."""
SPLITS = ("train", "valid", "test")
READ_SECONDS = 300.0
"""How long the cluster may take to read a file."""


def command_of(entrypoint: str) -> list[str]:
    """The command of ours that a job runs, without what starts and surrounds it; none where it is somebody else's."""
    try:
        words = shlex.split(entrypoint)
        words = words[words.index("mmsa_dist") + 1 :]
    except ValueError:
        return []
    return words[words.index("--") + 1 :] if words[:2] == ["cluster", "run"] and "--" in words else words


def folder_in(log: str, command: list[str]) -> PurePosixPath | None:
    """The folder that a job's log names; the last, as a job may go on with one that was begun before."""
    found = SAID[command[0]].findall(log) if command and command[0] in SAID else []
    return PurePosixPath(found[-1].strip()) if found else None


def folder_by_id(client: "JobSubmissionClient", job: str, runs_dir: str) -> PurePosixPath | None:
    """The newest run in `runs_dir`, a folder of the cluster, that this job began."""
    line = shlex.quote(f'"job": {json.dumps(job)}')
    files = f"{shlex.quote(runs_dir.rstrip('/'))}/*/environment.json"
    # by what it finds, not by its exit code, which one file that it may not read decides
    _, output = on_cluster(client, f"grep -lsF -- {line} {files}")
    found = sorted(each for each in output.splitlines() if each.endswith("/environment.json"))
    return PurePosixPath(found[-1]).parent if found else None


def read(client: "JobSubmissionClient", path: PurePosixPath) -> str | None:
    """The text of a file, of this machine or the cluster's; None where neither has it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        code, output = on_cluster(client, f"cat -- {shlex.quote(str(path))}")
        return output if code == 0 else None


def on_cluster(client: "JobSubmissionClient", script: str) -> tuple[int, str]:
    """Runs a line of shell as a job, on the node where jobs run; gives its exit code and what it printed.

    The job stays known to Ray, whose head makes a failed one of a job that is deleted at once; our list hides it.

    Raises:
        TransientError: it did not run, or not to its end in time.
    """
    job = f"{READER}{secrets.token_hex(4)}"
    begins, ends = f"{job} begins", f"{job} ends"
    client.submit_job(entrypoint=f"echo {begins}; {script}; code=$?; echo; echo {ends}; exit $code", submission_id=job)
    deadline = time.monotonic() + READ_SECONDS
    while not (details := client.get_job_info(job)).status.is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job)
            raise TransientError(f"the cluster has not run a small job within {READ_SECONDS:.0f} s; try again")
        time.sleep(0.3)
    if details.driver_exit_code is None:
        raise TransientError(f"a small job on the cluster failed: {details.message}")
    # Ray's own line, with the command in it, comes at any time: its buffer is flushed after the command has begun
    log = re.sub(rf"Running entrypoint for job {job}: .*\n", "", client.get_job_logs(job))
    found = re.search(rf"^{begins}\n(.*)\n{ends}$", log, re.MULTILINE | re.DOTALL)
    if found is None:
        raise TransientError(f"a small job on the cluster printed something else: {log[-300:]!r}")
    return details.driver_exit_code, found[1]


def parsed(text: str, path: PurePosixPath) -> dict[str, Any]:
    """
    Raises:
        ConfigError: not the result of a run.
    """
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not the result of a run: {first_line(error)}") from error


def table(result: Mapping[str, Any]) -> str:
    """A run's metrics, one a line with a column for each split, and in a sentence what they were reached on."""
    splits = [name for name in SPLITS if isinstance(result.get(name), Mapping)]
    metrics = list(dict.fromkeys(metric for split in splits for metric in result[split]))
    rows = [["metric", *splits]]
    rows += [[metric, *(_number(result[split].get(metric)) for split in splits)] for metric in metrics]
    of = f"{result.get('system', 'a run')} on {result.get('data', 'its data')}"
    if "best_epoch" in result:
        of += f", epoch {result['best_epoch']} of {result.get('epochs', '?')}"
        of += f", selected on {result.get('selected_on', 'validation')}"
    lines = [of, *columns(rows)]
    if "trial" in result:  # of a sweep
        values = ", ".join(f"{key} {value}" for key, value in (result.get("values") or {}).items())
        lines.append(f"trial {result['trial']}: {values}")
    return "\n".join(lines)


def columns(rows: list[list[str]], right: bool = True) -> list[str]:
    """Rows of cells as lines whose columns stand below each other, two spaces apart; the first is to the left."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right and at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
