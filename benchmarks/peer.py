"""Self-MM here beside Self-MM in the MMSA toolkit: training samples per CPU-second, one thread each, in turn.

The peer is run by a command of yours (this project contains neither MMSA nor a script that times it). That command
trains MMSA's own Self-MM with MMSA's own loop and prints one JSON line with ``n_train`` and ``train_cpu_s``, one number
a timed epoch. Both sides read the same feature pickle; ours packs it first.

That pickle is the first samples of yours, once as they are and, with ``--transcripts``, once with as many token ids as
those sentences have: the utterances' lengths are what an encoder without padding lives from.

Both do the same work an epoch: every train sample once; a randomly initialised BERT of as many layers, 768 wide,
fine-tuned on the pickle's token ids; LSTMs of width 16 (audio) and 32 (vision) over the unaligned features;
micro-batches of 16, the gradients of four summed before an Adam step; the losses of all four heads; ULGM's label
updates. The programs differ in this, and it is counted: the peer recomputes ULGM's class centres over all train samples
in every micro-batch, feeds BERT the pickle's full length and computes metrics of the train split at the epoch's end;
ours keeps running sums, computes no padding and reads shards from disk.

Counted on both sides is the CPU time (user + system, all threads) of the training part of an epoch: reading, forward,
backward, optimizer, label updates; not evaluation, not start-up. Our checkpoints are not: they hold three times what
the peer's do, to go on from, and an epoch this short would not amortise them; the peer's, of its weights, are counted.
The best epoch after one warm-up stands.
"""

import argparse
import csv
import json
import os
import pickle
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import MINILM
from benchmarks.record import ROOT, Row, portable, record
from mmsa_dist.places import RANK_ENVIRONMENT
from shards.sources.pickles import load
from shards.suggest import counted

MICRO_BATCH, ACCUMULATION = 16, 4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
GENERATED, REAL = "lengths of the pickle", "lengths of the transcripts"
GOALS = {GENERATED: 1.6, REAL: 3.0}
"""Wanted with an encoder of BERT-base's 12 layers, which is nearly all of the work on both sides."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-command", help="prints the peer's JSON line; {data} and {layers} stand for its options")
    parser.add_argument("--data", type=Path, help="an unaligned feature pickle of MOSI with token ids")
    parser.add_argument("--transcripts", type=Path, help="a csv with a column `text`: real lengths besides")
    parser.add_argument("--samples", type=int, default=128, help="training samples (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of the text encoder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="timed epochs of ours, after one warm-up")
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
    whole = load(options.data)
    lengths: dict[str, np.ndarray | None] = {GENERATED: None}
    if options.transcripts:
        lengths[REAL] = real_lengths(options.transcripts)
    found = {}
    for name, steps in lengths.items():
        with tempfile.TemporaryDirectory(prefix="mmsa-peer-") as folder:
            file = Path(folder) / "MOSI" / "Processed" / "unaligned_50.pkl"  # where MMSA looks
            write(cut(whole, options.samples, steps), file)
            prepare(Path(folder), file, options.layers)
            found[name] = [one_round(Path(folder), options) for _ in range(options.rounds)]
    rows = report(options, found)
    for row in rows:
        print(f"{row.what}: {row.value:.2f} {row.unit}")
    if not options.no_record:
        command = "python -m benchmarks.peer"
        for option in ("data", "transcripts"):
            if getattr(options, option):
                command += f" --{option} {portable(str(getattr(options, option)))}"
        command += f" --samples {options.samples} --layers {options.layers} --epochs {options.epochs}"
        peer = shlex.join(portable(word) for word in shlex.split(options.peer_command))
        record("peer", rows, raw=found, command=f"{command} --rounds {options.rounds} --peer-command '{peer}'")


def one_round(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The peer, then ours."""
    command = options.peer_command.replace("{data}", str(folder)).replace("{layers}", str(options.layers))
    peer = last_json(shlex.split(command))
    ours = last_json(
        [sys.executable, "-m", "benchmarks.peer", "--measure", str(folder), "--epochs", str(options.epochs)],
        {**RANK_ENVIRONMENT, **ENVIRONMENT},
    )
    assert ours["n_train"] == peer["n_train"], "both train on the same samples"
    print(f"samples per CPU-second: ours {rate(ours):.2f}, peer {rate(peer):.2f}", flush=True)
    return {"peer": peer, "ours": ours}


def report(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Both rates and their ratio, for each kind of lengths."""
    rows = []
    for name, rounds in found.items():
        title = f"Self-MM, {options.layers}-layer BERT, {name}: training"
        how = f"best of {counted(options.epochs, 'epoch')} of {options.samples} samples after 1; "
        how += f"median of {counted(len(rounds), 'round')}"
        ratio = statistics.median(rate(one["ours"]) / rate(one["peer"]) for one in rounds)
        goal = GOALS[name] if options.layers == 12 else None
        met = None if goal is None else ratio >= goal
        what = f"{title} samples per CPU-second, ours / MMSA 2.2.1"
        rows.append(Row(what, ratio, "x", f">= {goal:g}" if goal else "", how, met, headline=True))
        for side, who in (("ours", "ours"), ("peer", "MMSA 2.2.1")):
            value = statistics.median(rate(one[side]) for one in rounds)
            rows.append(Row(f"{title}, {who}", value, "samples/CPU-s", how=how))
    return rows


def real_lengths(transcripts: Path) -> np.ndarray:
    """Token ids of each sentence in BERT's vocabulary, which is the encoder's too, with the first and the last mark."""
    from mmsa_dist.layers.hub import load_tokenizer

    with transcripts.open(encoding="utf-8", newline="") as file:
        texts = [row["text"].lower() for row in csv.DictReader(file)]
    marks = load_tokenizer(MINILM)
    marks.no_padding()
    return np.array([len(marked.ids) for marked in marks.encode_batch(texts)])


def cut(whole: dict[str, dict[str, Any]], samples: int, lengths: np.ndarray | None) -> dict[str, dict[str, Any]]:
    """The first training samples of an MMSA pickle, half as many of the other splits.

    Args:
        lengths: of token ids, to be drawn from instead of those the pickle has; those beyond its longest are cut.
    """
    found = {}
    for split, fields in whole.items():
        count = samples if split == "train" else max(MICRO_BATCH, samples // 2)
        found[split] = {name: value[:count] for name, value in fields.items()}
        if lengths is not None:
            ids = np.array(found[split]["text_bert"])
            longest = ids.shape[2]
            drawn = np.random.default_rng(0).choice(lengths, len(ids)).clip(max=longest)
            there = np.arange(longest) < drawn[:, None]
            ids[:, 0] = np.where(there, np.where(ids[:, 0] == 0, 2000, ids[:, 0]), 0)
            ids[:, 1] = there
            found[split]["text_bert"] = ids
    return found


def write(content: dict[str, dict[str, Any]], file: Path) -> None:
    file.parent.mkdir(parents=True)
    plain = {
        split: {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in fields.items()}
        for split, fields in content.items()
    }
    with file.open("wb") as out:
        pickle.dump(plain, out, protocol=4)


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


def prepare(folder: Path, file: Path, layers: int) -> None:
    """Packs the pickle (float32, as the peer reads it) and makes the encoder's folder: its shape alone."""
    pack = [sys.executable, "-m", "mmsa_dist", "pack", "mmsa", str(file), "--dtype", "float32"]
    subprocess.run([*pack, "--out", str(folder / "shards")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    from transformers import BertConfig

    BertConfig(num_hidden_layers=layers).save_pretrained(folder / "encoder")


def measure(folder: Path, epochs: int) -> dict[str, Any]:
    """Our loop in this process, one rank, stage 0: CPU seconds of the training part of each epoch but the first."""
    import torch.distributed as dist

    from mmsa_dist import run_folder
    from mmsa_dist.ledger import Ledger
    from mmsa_dist.loop import fit
    from mmsa_dist.recipe import load_recipe
    from mmsa_dist.session import open_session, write_description
    from mmsa_dist.tracking import NullTracker
    from mmsa_dist.worker import take_cores
    from shards.index import Index

    class CpuEvents(run_folder.Events):
        """Notes the CPU time at the last step of each epoch."""

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

        def saved(self, summary: object) -> None:
            """The next epoch begins."""
            self.begun = cpu_seconds()

    take_cores(1)
    recipe = load_recipe("self_mm", None, overrides(folder, epochs))
    index = Index.load(folder / "shards")
    run = run_folder.create(folder / "runs", "peer", recipe.dump())
    write_description(run, recipe, index)
    store = dist.FileStore(str(run / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    session = open_session(recipe, run, 0, 1)
    events = CpuEvents(run)
    result = fit(session, events, NullTracker(), events.saved, Ledger())
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
