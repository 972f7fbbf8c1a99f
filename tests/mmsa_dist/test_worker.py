"""What a process becomes that is made a rank."""

import json
import subprocess
import sys

CORES = """
import json, sys, threading
import torch
from mmsa_dist.worker import take_cores

take_cores(2)
small = torch.full((4_000_000,), 1e-39)
found = {"main": float((small[:1] * 1).max()), "all of torch's": float((small * 1).max())}
thread = threading.Thread(target=lambda: found.update(started=float((small[:1] * 1).max())))
thread.start()
thread.join()
print(json.dumps({"threads": torch.get_num_threads(), "switch": sys.getswitchinterval(), "found": found}))
"""


def test_a_rank_takes_its_cores() -> None:
    """Torch's threads, quick turns, and nothing below 1e-38 in any thread: such numbers are slow on many processors."""
    said = subprocess.run([sys.executable, "-c", CORES], check=True, capture_output=True, text=True).stdout
    told = json.loads(said)
    assert told["threads"] == 2
    assert told["switch"] < 0.001
    assert told["found"] == {"main": 0, "all of torch's": 0, "started": 0}
