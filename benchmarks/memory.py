"""What a rank holds at each ZeRO stage: bytes of all tensors in a real run, beside the formula of `mmsa-dist plan`.

Ranks are processes of this machine. Each opens a session on generated data, behind an encoder of BERT-base's shape
(110 M parameters) or of nine times its size (1 B), weights random, and takes two steps. Tensors are counted, each
memory once, between steps and at the end of a backward pass, which has let the activations go. What this machine's
memory does not hold is left out, and shown as "-".
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
from mmsa_dist.memory import STAGES
from mmsa_dist.places import RANK_ENVIRONMENT

WANTED = 0.05
ENCODERS = {"110 M": (12, 768), "1 B": (18, 2048)}
"""Parameters -> layers and width."""
ROOM = 0.6
"""Of this machine's memory; as DeepSpeed begins it holds half as much again, and the rest is for imports."""
SYSTEMS = ("tam_ulag", "self_mm", "pmr")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(default: %(default)s)")
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), help="in fp32 (default: %(default)s)")
    parser.add_argument("--narrow", nargs="*", default=["tam_ulag"], help="in bf16 too (default: %(default)s)")
    parser.add_argument("--large", nargs="*", default=["self_mm"], help="in bf16 behind 1 B (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--ranks-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks_of:
        return rank(json.loads(options.ranks_of))
    kinds = [
        *((system, "110 M", "fp32") for system in options.systems),
        *((system, "110 M", "bf16") for system in options.narrow),
        *((system, "1 B", "bf16") for system in options.large),
    ]
    with tempfile.TemporaryDirectory(prefix="mmsa-") as name:
        folder = Path(name)
        data = generated(folder)
        found = [each for ranks in options.ranks for each in compared(folder, data, kinds, ranks)]
    rows = []
    for size in ENCODERS:
        of = [each for each in found if each["encoder"] == size]
        if not of:
            continue
        worst = max(of, key=off)
        what = f"bytes of a rank's tensors behind an encoder of {size}, furthest from the formula of `mmsa-dist plan`"
        how = f"of {len(of)}: {worst['system']}, {worst['ranks']} ranks, {worst['precision']}, ZeRO {worst['stage']}"
        rows.append(Row(what, 100 * off(worst), "%", f"at most {WANTED:.0%}", how, off(worst) <= WANTED))
    titles = {"state": "between steps", "step": "with the gradients of a step, at most"}
    head = ["system, encoder, precision", "ranks", *(f"ZeRO {stage}" for stage in STAGES)]
    tables = [
        Table(f"MB of a rank {title}: formula / measured", head, shown(found, which)) for which, title in titles.items()
    ]
    for each in tables:
        print(each.title, table(each.head, each.rows), sep="\n")
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    if not options.no_record:
        record("memory", rows, raw={"runs": found}, tables=tables)
    return None


def off(found: dict[str, Any]) -> float:
    """How far the formula is from what was measured between steps; in a step it is a bound (`mmsa_dist.memory`)."""
    return abs(found["formula"]["state"] / found["measured"]["state"] - 1)


def shown(found: list[dict[str, Any]], which: str) -> list[list[str]]:
    """A line a system and number of ranks, a column a stage."""
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for each in found:
        key = (f"{each['system']}, {each['encoder']}, {each['precision']}", str(each["ranks"]))
        cell = f"{each['formula'][which] / 1e6:,.0f} / {each['measured'][which] / 1e6:,.0f}"
        lines.setdefault(key, {})[each["stage"]] = cell
    return [[*key, *(cells.get(stage, "-") for stage in STAGES)] for key, cells in sorted(lines.items())]


def generated(folder: Path) -> Path:
    command = [sys.executable, "-m", "mmsa_dist", "pack", "generated", "--like", "mosi", "--samples", "60"]
    subprocess.run([*command, "--out", str(folder / "data")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def encoder(folder: Path, layers: int, width: int = 768) -> Path:
    """The shape of BERT-base with so many layers and so wide, and a tokenizer of its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, PreTrainedTokenizerFast

    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64
    )
    target = folder / f"bert-{layers}-{width}"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"word{n}" for n in range(config.vocab_size - len(special)))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(target)
    config.save_pretrained(target)
    return target


def compared(folder: Path, data: Path, kinds: list[tuple[str, str, str]], ranks: int) -> list[dict[str, Any]]:
    """Formula and measurement of rank 0, of all that fits, one after another in the same processes."""
    from mmsa_dist.recipe import load_recipe

    jobs = []
    for system, size, precision in kinds:
        text = ["--text.encoder", str(encoder(folder, *ENCODERS[size])), "--text.no-pretrained"]
        words = ["--data", str(data), *text, "--engine.precision", precision, "--workers", str(ranks)]
        for stage in STAGES if precision == "fp32" else STAGES[1:]:
            recipe = load_recipe(system, None, [*words, "--zero", str(stage), "--batch-size", "8"])
            if fits(recipe, ranks):
                what = {"system": system, "encoder": size, "precision": precision, "stage": stage, "ranks": ranks}
                jobs.append({"what": what, "recipe": recipe.dump()})
    with tempfile.TemporaryDirectory(dir=folder) as run:
        processes = []
        for number in range(ranks):
            told = json.dumps({"jobs": jobs, "run": run, "rank": number, "world": ranks})
            place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
            one_thread = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            environment = {**os.environ, **RANK_ENVIRONMENT, **one_thread, **place}
            command = [sys.executable, "-m", "benchmarks.memory", "--ranks-of", told]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        if max(process.wait() for process in processes):
            raise SystemExit("error: a rank failed")
        return [json.loads(Path(run, str(number), "found.json").read_text()) for number in range(len(jobs))]


def fits(recipe: Any, ranks: int) -> bool:
    """Whether all ranks have room on this machine; ZeRO-3 begins with the whole system on the first one."""
    from mmsa_dist.engine import BUCKET
    from mmsa_dist.memory import need, sizes_of
    from mmsa_dist.session import open_index

    sizes, stage = sizes_of(recipe, open_index(recipe)), recipe.engine.zero
    wanted = ranks * need(sizes, stage, ranks, recipe.engine.precision, BUCKET).step
    return wanted < ROOM * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rank(told: dict[str, Any]) -> None:
    """One rank of all measurements, each in a process forked from this one, which has imported what they need."""
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import mmsa_dist.session  # noqa: F401

    for number, job in enumerate(told["jobs"]):
        if (child := os.fork()) == 0:
            try:
                measure(told, job, Path(told["run"], str(number)))
            except BaseException as error:
                print(f"error: {job['what']}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


def measure(told: dict[str, Any], job: dict[str, Any], folder: Path) -> None:
    import torch.distributed as dist

    folder.mkdir(exist_ok=True)
    store = dist.FileStore(str(folder / "store"), told["world"])
    dist.init_process_group("gloo", store=store, rank=told["rank"], world_size=told["world"])
    found = job["what"] | held(job["recipe"], folder)
    if told["rank"] == 0:
        print(*job["what"].values(), f"ranks: formula off by {off(found):.2%}", flush=True)
        (folder / "found.json").write_text(json.dumps(found))


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
    pieces = (session.rank, session.world, recipe.optim.accumulation)
    for taken, batches in enumerate(session.loader.train(session.plan(1), *pieces)):
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
