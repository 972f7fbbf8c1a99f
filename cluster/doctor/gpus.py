"""GPUs of a node, their memory, the driver, and whether torch can use them. Runs there."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

from cluster.doctor.finding import Finding, told_bytes

MIB = 2**20
ASKED = "name,memory.total,memory.used,driver_version"
TORCH = """import json, torch
sees = torch.cuda.device_count() if torch.cuda.is_available() else 0
for gpu in range(sees): torch.ones(1, device=f"cuda:{gpu}").add_(1).cpu()
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "sees": sees}))"""


def look(wanted: dict[str, Any]) -> list[Finding]:
    """The GPUs.

    Args:
        wanted: ``gpus`` that Ray believes to be here, or None.
    """
    listed = _listed()
    if isinstance(listed, Finding):
        return [listed]
    ray = wanted.get("gpus") or 0
    if not listed:
        if ray:
            remedy = "start Ray there without --num-gpus, or install the NVIDIA driver"
            return [Finding("gpu", "GPUs", "fail", f"nvidia-smi shows none; Ray gives away {ray:g}", remedy)]
        return [Finding("gpu", "GPUs", "ok", "none: ranks compute on the CPU", facts={"count": 0})]
    names = sorted({row[0] for row in listed})
    total, used = ([int(row[n]) * MIB for row in listed] for n in (1, 2))
    text = f"{len(listed)} x {' / '.join(names)}, {told_bytes(min(total))} each, driver {listed[0][3]}"
    facts = {"count": len(listed), "names": names, "driver": listed[0][3], "memory_bytes": total, "used_bytes": used}
    found = [Finding("gpu", "GPUs", "ok", text, facts=facts)]
    if busy := [n for n, (has, taken) in enumerate(zip(total, used, strict=True)) if taken > 0.1 * has]:
        remedy = "see `nvidia-smi` for who uses them; wait, or leave them out with CUDA_VISIBLE_DEVICES"
        text = f"GPU {', '.join(map(str, busy))} in use: {told_bytes(max(used))} taken"
        found.append(Finding("gpu", "free memory", "warn", text, remedy))
    return [*found, _torch(len(listed))]


def _listed() -> list[list[str]] | Finding:
    """Rows of `ASKED`, one a GPU; none without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        remedy = "install or reload the NVIDIA driver there (nvidia-smi must work), or restart the machine"
        return Finding("gpu", "driver", "fail", f"nvidia-smi: {said}", remedy)
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    # memory of a partitioned or integrated GPU may be "[N/A]"
    return [[row[0], *(n if n.isdigit() else "0" for n in row[1:3]), row[3]] for row in rows]


def _torch(count: int) -> Finding:
    """Whether torch computes on each of them."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True, check=False)
    try:
        seen = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1][:200]
        remedy = "install a torch that fits the driver (https://pytorch.org/get-started/locally), or a newer driver"
        return Finding("gpu", "torch on GPUs", "fail", said, remedy)
    text = f"torch {seen['version']} computes on {seen['sees']} of {count}"
    if seen["cuda"] is None:
        remedy = "install the CUDA build of torch: the CPU build leaves GPUs idle"
        return Finding("gpu", "torch on GPUs", "warn", text, remedy, facts=seen)
    if seen["sees"] == 0 and hidden is None:
        remedy = f"install a newer NVIDIA driver: this torch is built for CUDA {seen['cuda']}"
        return Finding("gpu", "torch on GPUs", "fail", text, remedy, facts=seen)
    if seen["sees"] < count:
        remedy = f"CUDA_VISIBLE_DEVICES is {hidden!r} there; unset it if all are to be used"
        return Finding("gpu", "torch on GPUs", "warn", text, remedy, facts=seen)
    return Finding("gpu", "torch on GPUs", "ok", text, facts=seen)
