"""Self-MM here beside Self-MM in the MMSA toolkit: training samples per CPU-second, one thread each, in turn.

The peer is run by a command of yours (this project contains neither MMSA nor a script that times it). That command
trains MMSA's own Self-MM with MMSA's own loop and prints one JSON line with ``n_train`` and ``train_cpu_s``, one number
a timed epoch. Both sides read the same feature pickle; ours packs it first.

Both do the same work an epoch: every train sample once; a randomly initialised BERT of `LAYERS` layers, 768 wide,
fine-tuned on the pickle's token ids; LSTMs of width 16 (audio) and 32 (vision) over the unaligned features;
micro-batches of 16, the gradients of four summed before an Adam step; the losses of all four heads; ULGM's label
updates. The programs differ in this, and it is counted: the peer recomputes ULGM's class centres over all train samples
in every micro-batch, feeds BERT the pickle's full length and computes metrics of the train split at the epoch's end;
ours keeps running sums, trims a batch to its longest sample, reads shards from disk and saves optimizer state too.

Counted on both sides is the CPU time (user + system, all threads) of the training part of an epoch: reading, forward,
backward, optimizer, label updates, saving; not evaluation, not start-up. The best epoch after one warm-up stands.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Row, portable, record
from mmsa_dist.launch import RANK_ENVIRONMENT

LAYERS = 2
MICRO_BATCH, ACCUMULATION = 16, 4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-command", help="prints the peer's JSON line; run from this folder")
    parser.add_argument("--data", type=Path, help="the feature pickle that the peer's command reads")
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs of ours, after one warm-up")
    parser.add_argument(
        "--rounds", type=int, default=1, help="peer and ours in turn, this often; the median ratio stands"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.epochs)))
        return
    if not options.peer_command or not options.data:
        parser.error("--peer-command and --data are needed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.data)
        rounds = []
        for _ in range(options.rounds):
            peer = last_json(shlex.split(options.peer_command))
            ours = last_json(
                [sys.executable, "-m", "benchmarks.peer", "--measure", name, "--epochs", str(options.epochs)],
                {**RANK_ENVIRONMENT, **ENVIRONMENT},
            )
            rounds.append({"peer": peer, "ours": ours, "ratio": rate(ours) / rate(peer)})
            print(
                f"samples per CPU-second: ours {rate(ours):.1f}, peer {rate(peer):.1f}, ratio {rounds[-1]['ratio']:.2f}"
            )
    if not options.no_record:
        report(options, rounds)


def report(options: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
    """Writes the figures."""
    how = f"best of {options.epochs} epochs after 1; median of {len(rounds)} rounds"
    rows = [
        Row(
            what="Self-MM, train samples per CPU-second: ours / MMSA 2.2.1 (2-layer BERT, same pickle, 1 thread)",
            value=statistics.median(r["ratio"] for r in rounds),
            unit="x",
            how=how,
            headline=True,
        )
    ]
    for side, name in (("ours", "ours"), ("peer", "MMSA 2.2.1")):
        value = statistics.median(rate(r[side]) for r in rounds)
        rows.append(
            Row(
                what=f"Self-MM, train samples per CPU-second: {name}",
                value=value,
                unit="samples/CPU-s",
                how=how,
                headline=True,
            )
        )
    peer = shlex.join(portable(word) for word in shlex.split(options.peer_command))
    command = f"python -m benchmarks.peer --peer-command '{peer}' --data {portable(str(options.data))}"
    extra = f" --epochs {options.epochs} --rounds {options.rounds}"
    record("peer", rows, raw={"rounds": rounds}, command=command + extra)


def rate(result: dict[str, Any]) -> float:
    """Train samples per CPU-second of the best timed epoch."""
    return float(result["n_train"]) / min(result["train_cpu_s"])


def last_json(command: list[str], environment: dict[str, str] = ENVIRONMENT) -> dict[str, Any]:
    """Runs `command` and reads the last line it prints."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def prepare(folder: Path, pickle: Path) -> None:
    """Packs the pickle (float32, as the peer reads it) and makes the encoder's folder: its shape alone."""
    pack = [sys.executable, "-m", "mmsa_dist", "pack", "mmsa", str(pickle), "--dtype", "float32"]
    subprocess.run([*pack, "--out", str(folder / "shards")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    from transformers import BertConfig

    BertConfig(num_hidden_layers=LAYERS).save_pretrained(folder / "encoder")


def measure(folder: Path, epochs: int) -> dict[str, Any]:
    """Our loop in this process, one rank, stage 0: CPU seconds of the training part of each epoch but the first."""
    import torch
    import torch.distributed as dist

    from mmsa_dist import run_folder
    from mmsa_dist.loop import fit
    from mmsa_dist.recipe import load_recipe
    from mmsa_dist.session import open_session, write_description
    from mmsa_dist.tracking import NullTracker
    from shards.index import Index

    class CpuEvents(run_folder.Events):
        """Notes the CPU time at the last step of each epoch; the next one begins after the evaluation."""

        def __init__(self, where: Path) -> None:
            super().__init__(where, 0)
            self.begun = self.stepped = cpu_seconds()
            self.epochs: list[float] = []

        def step(self, epoch: int, step: int, of: int, loss: float) -> None:
            super().step(epoch, step, of, loss)
            self.stepped = cpu_seconds()

        def write(self, event: str, **values: Any) -> None:
            super().write(event, **values)
            if event == "epoch":
                self.epochs.append(self.stepped - self.begun)
                self.begun = cpu_seconds()

    torch.set_num_threads(1)
    recipe = load_recipe("self_mm", None, overrides(folder, epochs))
    index = Index.load(folder / "shards")
    run = run_folder.create(folder / "runs", "peer", recipe.dump())
    write_description(run, recipe, index)
    store = dist.FileStore(str(run / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    session = open_session(recipe, run, 0, 1)
    events = CpuEvents(run)
    result = fit(session, events, NullTracker(), lambda summary: None)
    session.close()
    dist.destroy_process_group()
    timed = events.epochs[1:]
    return {
        "n_train": index.splits["train"],
        "train_cpu_s": timed,
        "warmup_cpu_s": events.epochs[0],
        "params": sum(p.numel() for p in session.system.parameters()),
        "valid": result["valid"],
        "recipe": {"batch_size": recipe.data.batch_size, "accumulation": recipe.optim.accumulation},
    }


def overrides(folder: Path, epochs: int) -> list[str]:
    """MMSA's shape and batches, as flags of `mmsa-dist train self_mm`."""
    return [
        *("--data", str(folder / "shards")),
        *("--text.encoder", str(folder / "encoder")),
        *("--text.input", "tokens"),
        "--text.no-pretrained",
        *("--batch-size", str(MICRO_BATCH * ACCUMULATION)),
        *("--optim.accumulation", str(ACCUMULATION)),
        *("--epochs", str(1 + epochs)),
        *("--train.patience", str(1 + epochs)),
        *("--launcher", "local"),
        *("--workers", "1"),
        *("--zero", "0"),
    ]


def cpu_seconds() -> float:
    """User and system time of this process, its threads and the children that have ended."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usage)


if __name__ == "__main__":
    main()
