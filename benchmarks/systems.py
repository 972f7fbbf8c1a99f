"""What each system costs at MOSI's shapes: samples per CPU-second, what they should take, and what fills the gap.

Each system has a process and one thread of its own: its MOSI recipe, the data's own text features, micro-batches of 16,
an Adam step after as many as the recipe says; reading them from shards is in the time, as MMSA's loader is in its own.
FLOPs and bytes are counted call by call, forward and backward: products, convolutions, attention and recurrent layers
for FLOPs; for bytes what every call reads and writes, cache or not. What they imply is at the rates of one core here: a
float32 product of 1,024 x 1,024 matrices, and a copy of 256 MB.
CPU time is user + system; the best epoch stands, after one that does not count. Memory is anonymous (RssAnon), its peak
while training, less what the process had before it built the system.

With ``--peer-command`` MulT alone is measured, beside MMSA's in the same run. That is trained by a command of yours, on
the same feature pickle (see benchmarks/README.md): MMSA's MulT with MMSA's own loop, as it is and without attention
dropout.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.peer import ENVIRONMENT, cpu_seconds, last_json, rate
from benchmarks.pickle_memory import peak, status
from benchmarks.record import ROOT, Row, Table, portable, record
from benchmarks.render import measured, table, wanted

MICRO_BATCH = 16
NO_DROPOUT = ["--model.attention-dropout", "0", "--model.audio-attention-dropout", "0"]
PEER_NO_DROPOUT = ["--set", "attn_dropout=0.0", "attn_dropout_a=0.0", "attn_dropout_v=0.0"]
GOALS = {"mult": 4.0, "mult without attention dropout": 6.0}
"""Of MulT's rate, as multiples of MMSA's."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", nargs="+", help="those to measure; all that are registered by default")
    parser.add_argument("--data", type=Path, help="a feature pickle of MOSI; generated utterances by default")
    parser.add_argument("--batches", type=int, default=8, help="micro-batches of an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="counted epochs, after one that is not")
    parser.add_argument("--peer-command", help="trains MMSA's MulT on --data and prints a JSON line; see the README")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    if options.measure:
        name, *flags = options.measure
        print(json.dumps(measure(name, flags, options.batches, options.epochs)))
        return
    if options.peer_command and not options.data:
        parser.error("--peer-command needs --data, the pickle that it reads")
    if options.peer_command and options.systems:
        parser.error("--peer-command measures MulT alone; leave --systems out")
    from mmsa_dist.systems import system_names

    names = ["mult"] if options.peer_command else options.systems or system_names()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mmsa-") as folder:
        data = prepare(Path(folder), options.data)
        for name in names:
            found[name] = child(options, name, data, [])
            if name == "mult":
                found["mult without attention dropout"] = child(options, name, data, NO_DROPOUT)
    peers = {}
    if options.peer_command:
        theirs = shlex.split(options.peer_command)
        peers = dict(zip(GOALS, (last_json(theirs), last_json([*theirs, *PEER_NO_DROPOUT])), strict=True))
    rows, costs = report(found, peers), cost_table(found)
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    print(f"\n{costs.title}\n\n{table(costs.head, costs.rows)}")
    if not options.no_record:
        command = f"python -m benchmarks.systems --batches {options.batches} --epochs {options.epochs}"
        if options.data:
            command += f" --data {portable(str(options.data))}"
        if options.peer_command:
            command += f" --peer-command '{shlex.join(map(portable, shlex.split(options.peer_command)))}'"
        name, tables = ("mult", []) if peers else ("systems", [costs])
        record(name, rows, raw={"ours": found, "peer": peers}, command=command, tables=tables)


def prepare(folder: Path, pickle: Path | None) -> Path:
    """Shards of the pickle, float32, or of generated utterances."""
    source = ["mmsa", str(pickle)] if pickle else ["generated", "--like", "mosi", "--samples", "400"]
    command = [sys.executable, "-m", "mmsa_dist", "pack", *source, "--dtype", "float32", "--out", str(folder / "data")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def child(options: argparse.Namespace, name: str, data: Path, flags: list[str]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    size = ["--batches", str(options.batches), "--epochs", str(options.epochs)]
    words = ["--measure", name, "--data", str(data), *flags]
    found = last_json([sys.executable, "-m", "benchmarks.systems", *size, *words], ENVIRONMENT)
    print(f"{name} {shlex.join(flags)}: {rate(found):.2f} samples per CPU-second", flush=True)
    return found


def measure(name: str, flags: list[str], batches: int, epochs: int) -> dict[str, Any]:
    """All figures of one system, in this process."""
    from mmsa_dist.worker import take_cores

    take_cores(1)
    job = Job(name, flags)
    before = status("RssAnon")
    job.build()
    with peak("RssAnon") as most:
        trained = [seconds(partial(job.train, epoch, batches)) for epoch in range(1, epochs + 2)][1:]
    evaluated = [seconds(partial(job.evaluate, epoch, batches)) for epoch in range(1, epochs + 1)]
    assert batches * MICRO_BATCH <= job.index.splits["train"], "an epoch has as many micro-batches"
    one = list(islice(job.batches(epochs + 2), 1))
    flops, moved = counted(lambda: job.learn(epochs + 2, one))
    return {
        "n_train": batches * MICRO_BATCH,
        "train_cpu_s": trained,
        "eval_cpu_s": evaluated,
        "peak_bytes": most[0] - before,
        "parameters": sum(p.numel() for p in job.system.parameters()),
        "flops": flops / MICRO_BATCH,
        "bytes": moved / MICRO_BATCH,
        "slowest": slowest(lambda: job.learn(epochs + 2, one)),
        "gemm_flops_per_s": gemm_rate(),
        "copy_bytes_per_s": copy_rate(),
    }


class Job:
    """A system with its data, optimizer and label generator, in a plain torch loop."""

    def __init__(self, name: str, flags: list[str]) -> None:
        from mmsa_dist.recipe import load_recipe
        from mmsa_dist.session import data_spec, open_index

        self.recipe = load_recipe(name, "mosi", [*flags, "--batch-size", str(MICRO_BATCH), "--launcher", "local"])
        self.index = open_index(self.recipe)
        self.spec = data_spec(self.recipe, self.index)
        self.every = self.recipe.optim.accumulation

    def batches(self, epoch: int) -> Iterator[Any]:
        """Micro-batches of the train split, read from the shards."""
        from mmsa_dist.session import batch_spec, plan_of
        from shards.loader import Loader
        from shards.mix import open_reader

        loader = Loader(open_reader(self.index), batch_spec(self.recipe, self.index, self.spec), readers=0)
        with closing(loader.train(plan_of(self.recipe, self.index, self.spec, epoch), 0, 1)) as steps:
            for (batch,) in steps:
                yield batch

    def build(self) -> None:
        import torch

        from mmsa_dist.learning_rates import parameter_groups
        from mmsa_dist.session import label_generator
        from mmsa_dist.systems import get_system

        torch.manual_seed(1)
        self.system = get_system(self.recipe.system)(self.recipe.model, self.spec)
        self.labels = label_generator(self.recipe, self.index, self.system, torch.device("cpu"))
        if self.labels.layers is not None:
            self.system.attach(self.labels.layers)
        self.optimizer = torch.optim.Adam(parameter_groups(self.system, self.recipe.optim), fused=True)

    def train(self, epoch: int, batches: int) -> None:
        """Reads the first micro-batches of an epoch and learns from them."""
        self.learn(epoch, islice(self.batches(epoch), batches))

    def learn(self, epoch: int, batches: Iterable[Any]) -> None:
        from torch.nn.utils import clip_grad_norm_

        from mmsa_dist.predictor import chunks

        self.system.train()
        for step in chunks(batches, self.every):
            predictions = []
            for batch in step:
                prediction = self.system(batch)
                self.system.loss(prediction, batch, self.labels.targets(batch, prediction)).total.backward()
                predictions.append(prediction)
            self.labels.observe(epoch, step, predictions)
            if self.recipe.optim.clip:
                clip_grad_norm_(self.system.parameters(), self.recipe.optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def evaluate(self, epoch: int, batches: int) -> None:
        import torch

        self.system.eval()
        with torch.inference_mode():
            for batch in islice(self.batches(epoch), batches):
                self.system(batch)


def seconds(call: Callable[[], object]) -> float:
    began = cpu_seconds()
    call()
    return cpu_seconds() - began


def counted(call: Callable[[], object]) -> tuple[float, float]:
    """FLOPs, and bytes that calls of PyTorch read and write."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    class Bytes(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                leaves = tree_leaves((args, kwargs, out))
                self.total += sum(x.numel() * x.element_size() for x in leaves if hasattr(x, "element_size"))
            return out

    with Bytes() as moved:
        call()
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as flops:
        call()
    return float(flops.get_total_flops()), float(moved.total)


def _formulas() -> dict[Any, Any]:
    """FLOPs of what torch's own counter does not know: recurrent layers and fused attention on a CPU."""
    import torch

    aten = torch.ops.aten

    def recurrent(values: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        time_, batch, width = values
        return 2 * time_ * batch * weight[0] * (width + weight[0] // 4)

    def attention(query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        size, heads, length, width = query
        return 4 * size * heads * length * key[2] * width

    return {
        aten.mkldnn_rnn_layer: recurrent,
        aten.mkldnn_rnn_layer_backward: lambda *a, **k: 2 * recurrent(*a, **k),
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, *a, **o: 5 * attention(q, k) // 2,
    }


def slowest(call: Callable[[], object]) -> dict[str, float]:
    """The four calls that most time goes to -> their share of it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key.removeprefix("aten::"): event.self_cpu_time_total / total for event in events[:4]}


def gemm_rate() -> float:
    """FLOPs a second of one thread, the best of some."""
    import torch

    one = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(_thread_seconds(lambda: one @ one) for _ in range(10))


def copy_rate() -> float:
    """Bytes a second that one thread reads and writes, the best of some."""
    import torch

    one = torch.randn(1 << 26)
    other = torch.empty_like(one)
    return 2 * 4 * (1 << 26) / min(_thread_seconds(lambda: other.copy_(one)) for _ in range(5))


def _thread_seconds(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def report(found: dict[str, Any], peers: dict[str, Any]) -> list[Row]:
    """Rates and memory of every system; MulT's beside the peer's."""
    rows = []
    for name, one in found.items():
        how = f"best of {len(one['train_cpu_s'])} epochs of {one['n_train']} after 1"
        rows.append(Row(f"{name}: training", rate(one), "samples / CPU s", how=how))
        rows.append(Row(f"{name}: evaluation", one["n_train"] / min(one["eval_cpu_s"]), "samples / CPU s", how=how))
        rows.append(Row(f"{name}: peak memory of training", one["peak_bytes"] / 2**20, "MiB", how="RssAnon"))
    for name, peer in peers.items():
        ratio, goal = rate(found[name]) / rate(peer), GOALS[name]
        rows.append(Row(f"{name}: training, MMSA 2.2.1", rate(peer), "samples / CPU s", how="best epoch after 1"))
        how = "by the clock, one thread"
        rows.append(Row(f"{name}: evaluation, MMSA 2.2.1", peer["eval_sps"], "samples / s", how=how))
        what = f"{name}: training samples per CPU-second, ours / MMSA 2.2.1"
        rows.append(Row(what, ratio, "x", f"at least {goal:g}", met=ratio >= goal, headline=True))
        theirs = (peer["peak_rss_mb"] - peer["rss_load_mb"]) * 2**20
        share = found[name]["peak_bytes"] / theirs
        what, bound = f"{name}: peak memory above start-up, ours / MMSA 2.2.1", 0.25 if name == "mult" else None
        words = f"at most {bound:g}" if bound else ""
        rows.append(Row(what, share, "x", words, met=share <= bound if bound else None, headline=True))
    return rows


def cost_table(found: dict[str, Any]) -> Table:
    """What a training sample takes, and what it should."""
    gemm = statistics.median(one["gemm_flops_per_s"] for one in found.values())
    copy = statistics.median(one["copy_bytes_per_s"] for one in found.values())
    head = ["system", "parameters", "MFLOP", "MB moved"]
    head += [f"ms at {gemm / 1e9:.0f} GFLOP/s", f"ms at {copy / 1e9:.0f} GB/s", "ms taken", "most time in"]
    lines = []
    for name, one in found.items():
        most = ", ".join(f"{call} {share:.0%}" for call, share in one["slowest"].items())
        figures = (one["flops"] / 1e6, one["bytes"] / 1e6, 1e3 * one["flops"] / gemm, 1e3 * one["bytes"] / copy)
        taken = 1e3 / rate(one)
        lines.append([name, f"{one['parameters']:,}", *(f"{x:,.1f}" for x in (*figures, taken)), most])
    return Table("A training sample: forward, backward and its share of a step", head, lines)


if __name__ == "__main__":
    main()
