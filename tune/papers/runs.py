"""The runs behind a table: one a row and seed, each kept in a folder named by all that decides its result.

Two rows, two tables or two calls that need the same run share it. `key` changes with the recipe, the data and the code.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mmsa_dist
import shards
from mmsa_dist import run_folder, session
from mmsa_dist.errors import DataError, TransientError
from mmsa_dist.layers import hub
from mmsa_dist.recipe import RESUMABLE, Recipe, flatten
from shards.mix import AnyIndex
from tune.outcome import ERROR, RESULT, best_so_far

KEY = "key.json"
"""What a run's folder is named by, spelt out."""

DONE, FAILED, HALF, MISSING = "done", "failed", "begun", "to be run"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        key: names its folder. row: the first of the table's rows that need it.
    """

    key: str
    row: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row}, seed {self.seed}"


def run_of(recipe: Recipe, index: AnyIndex, row: str, seed: int, where: Path) -> Run:
    """The run of a row's recipe with a seed.

    Args:
        where: the folder of all runs of reproductions.
    """
    recipe = recipe.model_copy(update={"seed": seed})
    key = key_of(recipe, index.fingerprint, code_version())
    return Run(key, row, seed, recipe, where / key)


def key_of(recipe: Recipe, fingerprint: str, code: str) -> str:
    """16 hex digits of all that decides a run's result.

    Args:
        recipe: settled; where it runs, what is recorded of it and where its files lie does not count.
        fingerprint: of the data. code: `code_version`.
    """
    counts: dict[str, Any] = {k: v for k, v in flatten(recipe).items() if not k.startswith(RESUMABLE)}
    if recipe.text.encoder:
        counts["text.encoder"] = encoder_version(recipe.text.encoder)
    words = json.dumps([counts, fingerprint, code], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


@cache
def code_version() -> str:
    """The version of the package, and a digest of the source files of what trains."""
    sources: list[tuple[str, Path]] = []
    for package in (shards, mmsa_dist):
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        sources += [(f"{root.name}/{path.relative_to(root).as_posix()}", path) for path in root.rglob("*.py")]
    version = run_folder.environment()["packages"]["mmsa-dist"] or "not installed"
    return f"{version}+{digest(sources)}"


ENCODER_FILES = ("*.json", "*.txt", "*.model", "*.bpe", "*.safetensors")
"""What an encoder is made of, in a local folder; ``*.bin`` where it has no safetensors."""


@cache
def encoder_version(encoder: str) -> str:
    """A local encoder, of a package too, by what is in its files, wherever it lies; one of the hub by its name."""
    place, local = hub.locate(encoder)
    if not local:
        return encoder
    folder = Path(place)
    files = [path for pattern in ENCODER_FILES for path in folder.glob(pattern)]
    if not any(path.suffix == ".safetensors" for path in files):
        files += folder.glob("*.bin")
    return digest((path.name, path) for path in files)


def digest(files: Iterable[tuple[str, Path]]) -> str:
    """12 hex digits of files' names and contents, in the order of the names."""
    whole = hashlib.sha256()
    for name, path in sorted(files):
        with path.open("rb") as file:
            whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return whole.hexdigest()[:12]


ENDED = "ended"
"""In ``error.json``: the driver saw the run end so. What ranks say of being killed with their driver is no failure."""


def state(run: Run) -> str:
    """`DONE`, `FAILED` for a reason that will be the same again, `HALF` where it has begun, else `MISSING`."""
    if (run.folder / RESULT).is_file():
        return DONE
    if (error := _error(run)) and error.get("exit_code") != TransientError.exit_code:
        return FAILED
    return HALF if (run.folder / "plan.json").is_file() else MISSING


def read(file: Path, *keys: str) -> Any:
    """What a run has written, or a part of it.

    Raises:
        DataError: it is damaged.
    """
    try:
        found = run_folder.read_json(file)
        for key in keys:
            found = found[key]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> DataError:
    """What to raise of a file of a run that cannot be read."""
    run = next((each for each in file.parents if (each / "recipe.yaml").is_file()), file.parent)
    return DataError(f"{file}: is damaged ({error}); remove {run}, and the run is trained again")


def why_failed(run: Run) -> str | None:
    """The sentence that it left; None where it did not fail."""
    error = None if (run.folder / RESULT).is_file() else _error(run)
    return str(error.get("message", "it left no reason")) if error else None


def _error(run: Run) -> dict[str, Any] | None:
    file = run.folder / ERROR
    error = dict(read(file)) if file.is_file() else {}
    return error if error.get(ENDED) else None


def progress(run: Run) -> str:
    """How far it is, for people."""
    now = state(run)
    if now != HALF:
        return now
    return f"{now}, goes on after epoch {best_so_far(run.folder, run.recipe.train.monitor).epochs}"


def seconds(run: Run) -> float:
    """From the start of a run that is done to its end, of its last attempt; 0 where that is not known."""
    times = {event["event"]: event["time"] for event in run_folder.read_events(run.folder)}
    return max(0.0, times.get("end", 0.0) - times.get("start", 0.0))


def prepare(run: Run, index: AnyIndex) -> None:
    """Its folder with its description. A run that was interrupted keeps what it has; it may go on with more workers."""
    run_folder.fill(run.folder, run.recipe.dump())
    made_of = {"recipe": run.recipe.digest(), "data": index.fingerprint, "code": code_version()}
    run_folder.write_json(run.folder / KEY, {"row": run.row, "seed": run.seed, **made_of})
    (run.folder / ERROR).unlink(missing_ok=True)
    session.write_description(run.folder, run.recipe, index)
