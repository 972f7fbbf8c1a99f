"""What a rank holds at each ZeRO stage: bytes of all tensors in a real run, beside the formula of `mmsa-dist plan`.

Ranks are processes of this machine. Each opens a session on generated data, behind an encoder of BERT-base's shape with
random weights, and takes two steps. Tensors are counted, each memory once, between steps and at the end of a backward
pass, which has let the activations go.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Row, Table, record
from benchmarks.render import measured, table, wanted
from mmsa_dist.places import RANK_ENVIRONMENT

STAGES = (0, 1, 2, 3)
WANTED = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of the encoder; 0 for none (default: %(default)s)")
    parser.add_argument("--systems", nargs="+", default=["tam_ulag"], help="(default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return rank(json.loads(options.rank))
    rows: list[Row] = []
    shown: list[list[str]] = []
    raw: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mmsa-") as name:
        folder = Path(name)
        data = ["--data", str(generated(folder))]
        if options.layers:
            data += ["--text.encoder", str(encoder(folder, options.layers)), "--text.no-pretrained"]
        for system in options.systems:
            found = [
                {"system": system, "ranks": ranks, "precision": precision, "stage": stage}
                | compare(folder, system, data, ranks, precision, stage)
                for ranks in options.ranks
                for precision in options.precisions
                for stage in STAGES
                if precision == "fp32" or stage
            ]
            worst = max(found, key=off)
            what = f"{system}: bytes of a rank's tensors, furthest from the formula"
            how = f"of {len(found)}: {worst['ranks']} ranks, {worst['precision']}, ZeRO {worst['stage']}"
            rows.append(Row(what, 100 * off(worst), "%", f"at most {WANTED:.0%}", how, off(worst) <= WANTED))
            shown += [line(each) for each in found]
            raw += found
    tables = [
        Table(
            "Bytes of a rank, MB: formula / measured", ["", "ZeRO", "between steps", "with gradients, at most"], shown
        )
    ]
    print(table(tables[0].head, shown))
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    if not options.no_record:
        record("memory", rows, raw={"runs": raw}, tables=tables)
    return None


def off(found: dict[str, Any]) -> float:
    """How far the formula is from what was measured between steps; in a step it is a bound (`mmsa_dist.memory`)."""
    return abs(found["formula"]["state"] / found["measured"]["state"] - 1)


def line(found: dict[str, Any]) -> list[str]:
    cells = (f"{found['formula'][w] / 1e6:,.0f} / {found['measured'][w] / 1e6:,.0f}" for w in ("state", "step"))
    what = f"{found['system']}, {found['ranks']} rank{'s' * (found['ranks'] > 1)}, {found['precision']}"
    return [what, str(found["stage"]), *cells]


def generated(folder: Path) -> Path:
    command = [sys.executable, "-m", "mmsa_dist", "pack", "generated", "--like", "mosi", "--samples", "60"]
    subprocess.run([*command, "--out", str(folder / "data")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def encoder(folder: Path, layers: int) -> Path:
    """The shape of BERT-base with so many layers, and a tokenizer of its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, PreTrainedTokenizerFast

    config = BertConfig(num_hidden_layers=layers)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"word{n}" for n in range(config.vocab_size - len(special)))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        folder / "bert"
    )
    config.save_pretrained(folder / "bert")
    return folder / "bert"


def compare(folder: Path, system: str, words: list[str], ranks: int, precision: str, stage: int) -> dict[str, Any]:
    """Formula and measurement of rank 0."""
    from mmsa_dist.recipe import load_recipe

    chosen = ["--zero", str(stage), "--engine.precision", precision, "--workers", str(ranks), "--batch-size", "8"]
    recipe = load_recipe(system, None, [*words, *chosen, "--data.readers", "0"])
    with tempfile.TemporaryDirectory(dir=folder) as run:
        processes = []
        for number in range(ranks):
            job = {"recipe": recipe.dump(), "run": run, "rank": number, "world": ranks}
            place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
            one_thread = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            environment = {**os.environ, **RANK_ENVIRONMENT, **one_thread, **place}
            command = [sys.executable, "-m", "benchmarks.memory", "--rank", json.dumps(job)]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        out = [process.communicate()[0] for process in processes]
        assert not any(process.returncode for process in processes), out
    found = dict(json.loads(out[0].splitlines()[-1]))
    print(f"{system}, {ranks} ranks, {precision}, ZeRO {stage}: formula off by {off(found):.1%}", flush=True)
    return found


def rank(job: dict[str, Any]) -> None:
    """One rank of a measurement."""
    import torch.distributed as dist

    store = dist.FileStore(f"{job['run']}/store", job["world"])
    dist.init_process_group("gloo", store=store, rank=job["rank"], world_size=job["world"])
    print(json.dumps(held(job["recipe"], Path(job["run"]))), flush=True)
    os._exit(0)


def held(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Bytes of this rank's tensors between steps and in one, by formula and as they are. Within a process group."""
    import torch.distributed as dist

    from mmsa_dist.engine import BUCKET
    from mmsa_dist.memory import need, sizes_of
    from mmsa_dist.recipe import from_dict
    from mmsa_dist.session import open_session

    recipe = from_dict(values)
    before = tensor_bytes()
    session = open_session(recipe, folder, dist.get_rank(), dist.get_world_size())
    deepspeed_step, in_a_step = session.engine.engine.step, 0

    def step() -> None:
        nonlocal in_a_step
        in_a_step = tensor_bytes() - before
        deepspeed_step()

    session.engine.engine.step = step
    for taken, batches in enumerate(session.loader.train(session.plan(1), dist.get_rank(), dist.get_world_size(), 1)):
        session.engine.step(batches, lambda p, b: session.system.loss(p, b, session.generator.targets(b, p)))
        if taken:
            break
    between = tensor_bytes() - before
    sizes, engine = sizes_of(recipe, session.index), recipe.engine
    wanted = need(sizes, engine.zero, dist.get_world_size(), engine.precision, BUCKET, engine.offload == "optimizer")
    session.engine.engine.step = deepspeed_step
    session.close()
    return {"formula": vars(wanted), "measured": {"state": between, "step": in_a_step}}


def tensor_bytes() -> int:
    """Bytes behind all tensors of this process, each memory counted once."""
    import torch

    gc.collect()
    found: dict[int, int] = {}
    for each in gc.get_objects():
        # its own type: some deprecated names of PyTorch warn when asked what they are
        if issubclass(type(each), torch.Tensor) and each.device.type != "meta" and each.layout == torch.strided:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


if __name__ == "__main__":
    main()
