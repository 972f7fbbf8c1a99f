"""Checks that run a program of ours, as training would: the data, the tracking server, buckets, a trial. Runs there.

They go by the command line, and pass on what it says: its sentences name the remedy.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.doctor.finding import ASIDE, DATA, MEND, TRAINING, Finding

SYSTEM = "ufen_mtfn"
STEPS = 10
SAMPLES = 274
"""Of the generated set of the trial: 160 to train on."""
SLOW = 20e6
"""Bytes a second of a bucket below which a line is yellow."""


def is_url(place: str) -> bool:
    """Whether `place` is an address rather than a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def data(wanted: dict[str, Any]) -> list[Finding]:
    """Reads the index of ``data``, and checks one shard against its checksums."""
    began = time.monotonic()
    done = _ours("mmsa_dist", "verify", wanted["data"], "--shards", "1")
    if done.returncode:
        return [_failed("data", "one shard", done, DATA)]
    text = f"{done.stdout.strip().splitlines()[-1]} ({time.monotonic() - began:.1f} s)"
    return [Finding("data", "one shard", "ok", text)]


def mlflow(wanted: dict[str, Any]) -> list[Finding]:
    """Reaches the tracking store ``uri``, writes to it and removes what was written."""
    done = _ours("mmsa_dist.tracking.probe", MLFLOW_TRACKING_URI=wanted["uri"])
    if done.returncode:
        return [_failed("mlflow", "reachable, writable", done, ASIDE)]
    told = json.loads(done.stdout.splitlines()[-1])
    if told.get("made_later"):
        return [Finding("mlflow", "reachable, writable", "ok", f"{told['uri']}: the first run makes it", facts=told)]
    text = f"{told['uri']}: read in {told['read_s']:.2f} s, written in {told['write_s']:.2f} s"
    found = [Finding("mlflow", "reachable, writable", "ok", text, facts=told)]
    root = told["artifacts"]
    if told["uri"].startswith("http") and root and (root.startswith(("/", "file:", "."))):
        remedy = "start it with `mlflow server --serve-artifacts --artifacts-destination …`, or with a bucket as "
        remedy += "--default-artifact-root; or see that every node has this folder on a shared disk"
        text = f"the server lets its clients write files to {root} themselves"
        found.append(Finding("mlflow", "models and files", "warn", text, remedy))
    return found


def storage(step: str, wanted: dict[str, Any]) -> list[Finding]:
    """A step of `cluster.doctor.storage` where the place is an address."""
    words = [step, wanted["place"], wanted["token"]]
    if step == "write":
        words += [str(wanted["node"]), str(wanted["mib"])]
    done = _ours("shards.remote.probe", *words)
    check = {"read": "read from another node"}.get(step, "write")
    if done.returncode:
        return [_failed("storage", check, done, ASIDE)]
    told = json.loads(done.stdout.splitlines()[-1])
    if step == "leave":
        return [Finding("storage", "mark", "ok", "")]
    if step == "read":
        return [Finding("storage", check, "ok", f"what {wanted['by']} wrote is read")]
    found = []
    for each in ("write", "read") if step == "write" else ():
        rate = told[f"{each}_bytes_per_s"]
        text, facts = f"{rate / 1e6:,.0f} MB/s at {wanted['place']}", {"bytes_per_s": rate}
        if rate < SLOW:
            remedy = "use a bucket in the nodes' own region, or save less often (--checkpoint.every-seconds)"
            found.append(Finding("storage", each, "warn", text, remedy, facts=facts))
        else:
            found.append(Finding("storage", each, "ok", text, facts=facts))
    if step == "write":
        found.append(Finding("storage", "list and remove", "ok", "nothing is left behind"))
    return found


def trial(wanted: dict[str, Any]) -> list[Finding]:
    """Packs a small generated data set, and trains on it for `STEPS` steps with the local launcher.

    Args:
        wanted: ``gpu``, whether the rank is to have one.
    """
    with tempfile.TemporaryDirectory(prefix="mmsa-doctor-trial-", ignore_cleanup_errors=True) as temporary:
        folder, began = Path(temporary), time.monotonic()
        packed = folder / "data"
        done = _ours(
            "mmsa_dist", "pack", "generated", "--samples", str(SAMPLES), "--workers", "1", "--out", str(packed)
        )
        if done.returncode:
            return [_failed("trial", "pack", done, MEND)]
        train = json.loads((packed / "index.json").read_text())["splits"]["train"]
        words = ["train", SYSTEM, "--data", str(packed), "--runs-dir", str(folder / "runs"), "--launcher", "local"]
        words += ["--epochs", "1", "--batch-size", str(math.ceil(train / STEPS)), "--tracking.no-enabled"]
        if wanted.get("gpu"):
            words += ["--launch.gpus-per-worker", "1"]
        done = _ours("mmsa_dist", *words)
        if done.returncode:
            return [_failed("trial", f"{STEPS} steps", done, TRAINING)]
        (run,) = (path.parent for path in (folder / "runs").glob("*/result.json"))
        seconds = json.loads((run / "time.json").read_text())
    step, wall = (seconds["step_s"] + seconds["data_s"]) / STEPS, time.monotonic() - began
    text = f"{1e3 * step:,.0f} ms a step; packed, started, trained, evaluated, saved in {wall:.0f} s"
    facts = {"step_s": step, "start_s": seconds["start_s"], "wall_s": wall}
    return [Finding("trial", f"{STEPS} steps", "ok", text, facts=facts)]


def _ours(module: str, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A program of ours, within this check's process group: what ends the check ends it."""
    return subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **environment},
    )  # fmt: skip


def _failed(group: str, check: str, done: "subprocess.CompletedProcess[str]", code: int) -> Finding:
    """What the program said, which names the remedy; or that it is not installed here."""
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    said = lines[-1].strip() if lines else f"exit code {done.returncode}"
    if re.search(r"No module named '?(mmsa_dist|shards)\b", said):
        return Finding(group, check, "skip", "mmsa-dist is not installed on this node")
    at = next((n for n, line in enumerate(lines) if line.startswith("error: ")), None)
    if at is None:
        remedy = f"run `{' '.join(map(str, done.args[1:4]))} …` on the node, and see what it says"
        return Finding(group, check, "fail", said[:300], remedy, code=code)
    sentence = " ".join(" ".join(lines[at:]).removeprefix("error: ").split())
    what, _, remedy = sentence.partition("; ")
    known = (MEND, DATA, TRAINING, ASIDE)
    return Finding(
        group, check, "fail", what[:400], remedy or "mend what it says, then run the doctor again",
        code=done.returncode if done.returncode in known else code,
    )  # fmt: skip
