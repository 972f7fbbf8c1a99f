"""One check in a process of its own: reads what is wanted from standard input, prints what was found as JSON.

Runs on the nodes: of an archive, without the rest of this package.
"""

import importlib
import json
import math
import os
import signal
import sys
from types import FrameType
from typing import Any

CHECKS = {
    "software": "software:look",
    "machine": "machine:look",
    "gpus": "gpus:look",
    "port": "reduce:port",
    "all_reduce": "reduce:look",
    "leave": "storage:leave",
    "write": "storage:write",
    "read": "storage:read",
    "forget": "storage:forget",
    "mlflow": "programs:mlflow",
    "data": "programs:data",
    "trial": "programs:trial",
}
"""What can be asked of a node, and the function that answers: of what is wanted, a list of findings."""


def main() -> None:
    """Entry. SIGTERM ends the check in good order: what it has written is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    wanted = json.load(sys.stdin)
    signal.alarm(math.ceil(wanted["limit"]) + 5)  # also where nobody is left who would end it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    found = answer(wanted.pop("check"), wanted)
    json.dump(found, answers)
    answers.flush()
    os._exit(0)  # threads of a library that wait for a peer keep nobody waiting


def answer(check: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """What a check finds in this process."""
    module, _, function = CHECKS[check].partition(":")
    found = getattr(importlib.import_module(f"cluster.doctor.{module}"), function)(wanted)
    return [finding.dump() for finding in found]
