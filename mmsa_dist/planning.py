"""`mmsa-dist plan`: what a run would do and need, before anything starts."""

import argparse
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsa_dist.errors import ConfigError
from mmsa_dist.recipe import PACKAGED, Recipe, flatten, load_recipe, no_system, origin, recipe_file_of, sourced

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mmsa_dist.memory import Need, Sizes
    from shards.mix import AnyIndex

PLAN_HELP = """usage: mmsa-dist plan SYSTEM --data FOLDER [--recipe NAME|FILE] [VALUES] [--mtbf HOURS] [--memory GIB]

Shows what `mmsa-dist train` with the same words would do, and starts nothing: every value of the recipe and where it
comes from, the arithmetic of batches and steps, what a rank must hold at each ZeRO stage and which is advised, and how
often a checkpoint is worth its time.

  --mtbf HOURS      mean time between failures of the whole job, for the checkpoint interval (default: 24)
  --memory GIB      memory of one rank; unset: this machine's GPU, else its memory shared by the workers
  --runs-dir FOLDER where runs would go; how fast it is written is measured there (default: runs)
  --brief           leave out the table of values
  --json            the same as one JSON object

Everything else is as for mmsa-dist train.

Examples:
  mmsa-dist plan tam_ulag --data data/mosi --workers 4
  mmsa-dist plan self_mm --data data/mosei --workers 8 --text.encoder bert-base-uncased --brief"""

ROOM = 0.5
"""Share of a rank's memory that weights, moments and gradients may take: activations, batches and libraries want the
rest."""
SHARED = "this machine's memory, shared by the workers"
PROBE = 32 * 2**20
"""Bytes that are written to see how fast a checkpoint would be."""
TRAFFIC = {0: 2, 1: 2, 2: 2, 3: 3}
"""Numbers that a rank sends for each trained one in a step: an all-reduce is a reduce-scatter and an all-gather; stage
3 gathers the weights once more, backwards."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist plan`."""
    system, options, overrides = _split(argv)
    if system is None and argv and not options.help:
        raise no_system("plan", argv)
    if system is None or options.help:
        print(PLAN_HELP)
        return 0 if options.help else 2
    from mmsa_dist.session import arithmetic, sentence
    from mmsa_dist.train import fit_together

    recipe = load_recipe(system, options.recipe, overrides)
    origins = origins_of(system, options.recipe, overrides, recipe)
    index, recipe = fit_together(recipe)
    for key, decides in (("train.monitor", "the data set's kind"), ("labels.generator", "the system's paper")):
        if (value := flatten(recipe)[key]) != origins[key][0]:
            origins[key] = (value, decides)
    found = needs(recipe, index, options.memory)
    found |= {
        "arithmetic": arithmetic(recipe, index),
        "checkpoint": checkpoints(found["sizes"], options.mtbf, Path(options.runs_dir), parts(recipe)),
        "cluster": cluster(recipe),
    }
    if options.json:
        values = {key: {"value": value, "origin": where} for key, (value, where) in origins.items()}
        print(json.dumps({"recipe": values, **found, "sizes": asdict(found["sizes"])}, indent=1, default=asdict))
        return 0
    from shards.progress import console

    print(origin(system, options.recipe, overrides))
    if not options.brief:
        console.print(_origin_table(origins))
    print(sentence(found["arithmetic"]))
    console.print(_size_table(found["sizes"], recipe))
    console.print(_stage_table(found, recipe))
    for line in (*_advice(found, recipe), *_checkpoint_lines(found["checkpoint"], recipe), found["cluster"]):
        print(line)
    return 0


def _split(argv: list[str]) -> tuple[str | None, argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--mtbf", type=float, default=24.0)
    parser.add_argument("--memory", type=float)
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    system = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        options, overrides = parser.parse_known_args(argv[1:] if system else argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see mmsa-dist plan --help") from error
    for name in ("mtbf", "memory"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{name}: {value:g} must be greater than 0")
    return system, options, overrides


def origins_of(system: str, recipe: str | None, overrides: list[str], resolved: Recipe) -> dict[str, tuple[Any, str]]:
    """Dotted key -> its value, and where that comes from: the command line, the recipe (and its source), or neither."""
    path = recipe_file_of(system, recipe, overrides)
    before = flatten(load_recipe(system, str(path) if path else None, []))
    said = _leaves(sourced(path)) if path else {}
    file = "" if path is None else path.stem if path.parent == PACKAGED else path.name
    origins: dict[str, tuple[Any, str]] = {}
    for key, value in flatten(resolved).items():
        if key == "system":
            continue
        if value != before.get(key):
            where = "command line"
        elif key in said:
            where = f"recipe {file}" + (f": {said[key]}" if said[key] else "")
        else:
            where = "default"
        origins[key] = (value, where)
    return origins


def _leaves(said: dict[str, tuple[Any, str]]) -> dict[str, str]:
    """Dotted key of each single value -> source; a block's source is that of all its values."""
    leaves: dict[str, str] = {}
    for key, (value, source) in said.items():
        names = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
        leaves.update(dict.fromkeys(names, source))
    return leaves


def needs(recipe: Recipe, index: "AnyIndex", memory: float | None) -> dict[str, Any]:
    """The system's sizes, bytes of a rank at each stage, and the stage that is advised."""
    from mmsa_dist.engine import BUCKET
    from mmsa_dist.memory import STAGES, need, sizes_of

    sizes = sizes_of(recipe, index)
    ranks, precision = recipe.launch.workers, recipe.engine.precision
    offload = recipe.engine.offload == "optimizer"
    stages = {stage: need(sizes, stage, ranks, precision, BUCKET, offload) for stage in STAGES}
    room, where = (memory * 2**30, "--memory") if memory else _memory(recipe)
    if where == SHARED:  # there is no GPU beside the host
        stages = {stage: replace(each, step=each.step + each.host) for stage, each in stages.items()}
    fitting = [stage for stage in _possible(recipe) if stages[stage].step <= ROOM * room]
    return {"sizes": sizes, "stages": stages, "memory": int(room), "memory_of": where, "fitting": fitting}


def _possible(recipe: Recipe) -> tuple[int, ...]:
    """In the order in which they are advised: where all fit, sharding the optimizer's state costs nothing."""
    return (1, 0, 2, 3) if recipe.engine.precision == "fp32" and recipe.engine.offload == "none" else (1, 2, 3)


def _memory(recipe: Recipe) -> tuple[float, str]:
    """Bytes that a rank has here, and of what."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), "this machine's GPU"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total / recipe.launch.workers, SHARED


def checkpoints(sizes: "Sizes", mtbf: float, runs_dir: Path, parts: int = 1) -> dict[str, Any]:
    """Bytes of a checkpoint, seconds for which training stands still and in which it is written beside, and seconds
    between two that lose the least.

    Source of the interval: Young 1974, Daly 2006: sqrt(2 C M), C the time that a checkpoint costs, M the mean time
    between failures; but not before the last one is written.

    Args:
        parts: ranks that copy a part each.
    """
    from mmsa_dist.memory import checkpoint_bytes

    size = checkpoint_bytes(sizes)
    still, seconds = size / parts / copying_speed(), size / writing_speed(runs_dir)
    return {
        "bytes": size,
        "still_seconds": still,
        "seconds": seconds,
        "mtbf_hours": mtbf,
        "interval_seconds": max(math.sqrt(2 * still * mtbf * 3600), seconds),
    }


def parts(recipe: Recipe) -> int:
    """Ranks among which a checkpoint's numbers are divided: at stage 0 the first one copies them all."""
    return recipe.launch.workers if recipe.engine.zero else 1


def copying_speed() -> float:
    """Bytes a second of this machine's memory, into what was not used before."""
    data = bytearray(PROBE)
    began = time.perf_counter()
    bytes(data)
    return len(data) / (time.perf_counter() - began)


def writing_speed(folder: Path) -> float:
    """Bytes a second that are checksummed and brought to the disk of `folder`, or of what of it is there."""
    import hashlib

    folder = folder.resolve()
    while not folder.is_dir():
        folder = folder.parent
    data = os.urandom(PROBE)
    began = time.perf_counter()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".mmsa-dist-plan-") as file:
            file.write(data)
            hashlib.sha256(data).digest()
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"--runs-dir {folder}: cannot be written: {error.strerror}; choose another") from error
    return len(data) / (time.perf_counter() - began)


def cluster(recipe: Recipe) -> str:
    launch = recipe.launch
    cpus, gpus = launch.workers * launch.cpus_per_worker, launch.workers * launch.gpus_per_worker
    shape = f"{launch.workers} workers x {launch.cpus_per_worker} CPUs = {cpus} CPUs"
    fewest = f"; it goes on with {launch.min_workers} where there is no room for more" if launch.min_workers else ""
    return f"cluster: {shape}" + (f" and {gpus:g} GPUs" if gpus else "") + fewest


# --- what is shown ----------------------------------------------------------------------------------------------------


def _origin_table(origins: dict[str, tuple[Any, str]]) -> "RenderableType":
    from rich.table import Table

    table = Table("value", "", "from", title="recipe", title_justify="left")
    for key, (value, where) in origins.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        table.add_row(key, "-" if shown in (None, "") else str(shown), where)
    return table


def _size_table(sizes: "Sizes", recipe: Recipe) -> "RenderableType":
    from rich.table import Table

    table = Table("optimizer group", title="what learns", title_justify="left")
    for column in ("parameters", "learning rate", "weight decay"):
        table.add_column(column, justify="right")
    for group, count in sorted(sizes.trained.items(), key=lambda item: -item[1]):
        lr, decay = (getattr(part, group) for part in (recipe.optim.lr, recipe.optim.weight_decay))
        later = "".join(f", {getattr(each, group):g} from epoch {each.epoch}" for each in recipe.optim.lr_from)
        table.add_row(group, f"{count:,}", f"{lr:g}{later}", f"{decay:g}")
    if sizes.frozen:
        table.add_row("frozen", f"{sizes.frozen:,}", "-", "-")
    return table


def _stage_table(found: dict[str, Any], recipe: Recipe) -> "RenderableType":
    from rich.table import Table

    ranks, stages = recipe.launch.workers, found["stages"]
    title = f"one of {ranks} rank{'s' * (ranks > 1)}, {recipe.engine.precision}, without activations"
    table = Table("ZeRO stage", title=title, title_justify="left")
    offload = recipe.engine.offload == "optimizer"
    for column in ("between steps", "with gradients, at most", "against stage 0", "sent a step"):
        table.add_column(column, justify="right")
    if offload:
        table.add_column("on the host", justify="right")
    width = 4 if recipe.engine.precision == "fp32" else 2
    for stage, each in stages.items():
        if stage not in _possible(recipe):
            why = (
                "divides nothing, so nothing is the host's" if offload else f"needs fp32, not {recipe.engine.precision}"
            )
            table.add_row(str(stage), "-", "-", "-", why)
            continue
        sent = TRAFFIC[stage] * width * found["sizes"].learning * (ranks - 1) // ranks
        share = f"{each.step / stages[0].step:.0%}"
        name = f"{stage} (asked for)" if stage == recipe.engine.zero else str(stage)
        host = [size_text(each.host)] * offload
        table.add_row(name, size_text(each.state), size_text(each.step), share, size_text(sent), *host)
    return table


def _advice(found: dict[str, Any], recipe: Recipe) -> list[str]:
    stages: dict[int, Need] = found["stages"]
    fitting, room, stage = found["fitting"], found["memory"], recipe.engine.zero
    lines = []
    if found["sizes"].label_state:
        divided = ", divided over the ranks" if found["sizes"].label_state_divided else " on every rank"
        lines.append(f"of it labels that are generated: {size_text(found['sizes'].label_state)}{divided}")
    if not fitting:
        on_host = ", --engine.offload optimizer" if found["memory_of"] != SHARED and not stages[3].host else ""
        lines.append(
            f"no stage leaves activations room in {size_text(room)} ({found['memory_of']}): raise --workers, name a "
            f"rank's memory with --memory, or use --engine.precision bf16{on_host}"
        )
    elif stage in fitting:
        lines.append(f"stage {stage} fits: {_share(stages[stage], room)} of {size_text(room)} ({found['memory_of']})")
        if fitting[0] != stage and stages[fitting[0]].step < stages[stage].step:
            lines.append(f"--zero {fitting[0]} needs less, and sends as much")
    else:
        lines.append(
            f"stage {stage} takes {_share(stages[stage], room)} of {size_text(room)} ({found['memory_of']}); advised: "
            f"--zero {fitting[0]}, {_share(stages[fitting[0]], room)}"
        )
    return lines


def _share(need: "Need", room: int) -> str:
    return f"{100 * need.step / room:.1f} %"


def _checkpoint_lines(found: dict[str, Any], recipe: Recipe) -> list[str]:
    saving = recipe.checkpoint
    now = ["after each epoch"]
    now += [f"every {_duration(saving.every_seconds)}"] if saving.every_seconds else []
    now += [f"every {saving.every_steps} steps"] if saving.every_steps else []
    return [
        f"checkpoint: {size_text(found['bytes'])}; here training stands still for {_seconds(found['still_seconds'])} "
        f"while each rank copies its part, and it is written beside it in {_seconds(found['seconds'])}; "
        f"with a failure every {found['mtbf_hours']:g} h one every "
        f"{_duration(found['interval_seconds'])} loses the least (Young/Daly; "
        f"--checkpoint.every-seconds); this recipe saves {', '.join(now)}"
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else "less than 0.1 s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size_text(size: float) -> str:
    """Bytes as a person reads them: 1.4 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
