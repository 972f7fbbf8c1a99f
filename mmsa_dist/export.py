"""`mmsa-dist export`: a trained system as a folder that loads with this package and torch alone."""

import argparse
import shutil
import tempfile
from pathlib import Path

from mmsa_dist import checkpoint
from mmsa_dist.errors import ConfigError, DataError, TransientError
from mmsa_dist.predictor import WEIGHTS, Predictor, check_whole, weights_path

HELP = """usage: mmsa-dist export MODEL --to DIR [--tracking-uri URI] [--runs-dir FOLDER]

Writes the best weights of MODEL, its recipe and the description of its data into DIR: safetensors, YAML and JSON, with
their checksums. It loads without DeepSpeed, Ray or MLflow, and `mmsa-dist predict DIR` takes it.

  MODEL                a run's folder (of a run that is not finished the best epoch so far), models:/NAME@alias,
                       models:/NAME/VERSION or runs:/ID
  --to DIR             folder to make
  --tracking-uri URI   MLflow store of a registered model
  --runs-dir FOLDER    where runs lie (default: runs)

Example:
  mmsa-dist export runs/self_mm-20260101-120000-ab12 --to models/self_mm"""

README = """# {system}

Trained on {data} (fingerprint {fingerprint}). Made by `mmsa-dist export`; `manifest.json` holds the files' sha256.

```
mmsa-dist predict {folder} --data FOLDER --out predictions.csv
```

```python
from pathlib import Path
from mmsa_dist.predictor import Predictor

predictor = Predictor.load(Path("{folder}"))  # neither DeepSpeed nor Ray nor MLflow is imported
utterance = predictor.utterance({{{example}}}, "an utterance")
print(predictor.readable(predictor.predict([utterance])))
```

A modality is a list of steps, each a list of numbers ({widths}); one that is absent is `None`.
"""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist export`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--tracking-uri")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("-h", "--help", action="store_true")
    try:
        options, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see mmsa-dist export --help") from error
    if options.help or not argv:
        print(HELP)
        return 0 if options.help else 2
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]}; see mmsa-dist export --help")
    if options.model is None or options.to is None:
        raise ConfigError("give a MODEL and --to DIR; see mmsa-dist export --help")
    from mmsa_dist.tracking.fetch import fetched

    with fetched(options.model, options.tracking_uri, options.runs_dir) as folder:
        print(export(folder, options.to))
    return 0


def export(source: Path, target: Path) -> str:
    """Writes the model in `source`, a run's folder or a model's, into the new folder `target`; says what it did.

    Raises:
        ConfigError: `target` is taken. DataError: there are no whole weights. TransientError: it cannot be written.
    """
    target = target.resolve()
    if target.exists():
        raise ConfigError(f"--to {target}: is there already; choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            made = _made(source, Path(scratch))
            (made / "README.md").write_text(described(Predictor.load(made), target), encoding="utf-8")
            checkpoint.write_manifest(made)
            made.replace(target)
    except OSError as error:
        if error.filename and Path(error.filename).is_relative_to(source):
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
        raise TransientError(f"--to {target}: cannot be written: {error.strerror or error}") from error
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return (
        f"{target}: {size / 1e6:,.1f} MB; predict with: mmsa-dist predict {target} --data FOLDER --out predictions.csv"
    )


def _made(source: Path, scratch: Path) -> Path:
    """A model's folder in `scratch`; again where a run that goes on has removed the checkpoint that was being read."""
    from mmsa_dist.tracking.models import model_folder

    while True:
        listed = checkpoint.saved(source / "checkpoints")
        try:
            return model_folder(source, scratch / "model", best_weights(source))
        except (OSError, DataError):
            if checkpoint.saved(source / "checkpoints") == listed:
                raise
            shutil.rmtree(scratch / "model", ignore_errors=True)


def best_weights(source: Path) -> Path:
    """The best weights in a run's folder, of the best epoch so far where the run is not finished; or a model folder's.

    Raises:
        DataError: there are none that are whole.
    """
    if (source / WEIGHTS).is_file() or (source / "best" / WEIGHTS).is_file():
        check_whole(source, "export the model again")
        return weights_path(source)
    saved = checkpoint.saved(source / "checkpoints")
    if not saved:
        raise DataError(f"{source}: holds no weights; give a run that has finished an epoch, or a model's folder")
    if (fault := checkpoint.damage(saved[-1], ("progress.json",))) is not None:
        raise DataError(f"{saved[-1]}: {fault}; go on with the run, which puts it aside, and export then")
    step = checkpoint.best_step(saved[-1])
    if not step:
        raise DataError(f"{source}: no epoch of the run has been evaluated yet; wait for one")
    best = checkpoint.step_folder(source / "checkpoints", step)
    if (fault := checkpoint.damage(best, (WEIGHTS,))) is not None:
        raise DataError(f"{best}: {fault}; train the run again")
    return best / WEIGHTS


def described(predictor: Predictor, folder: Path) -> str:
    """``README.md`` of an exported model."""
    card = predictor.card
    shown = ", ".join(
        f'"{name}": "…"' if isinstance(value, str) else f'"{name}": {name}'
        for name, value in predictor.example().items()
    )
    widths = ", ".join(f"{name} {width}" for name, width in card.widths.items())
    return README.format(
        system=predictor.recipe.system, data=card.name, fingerprint=card.fingerprint[:12], folder=folder.name,
        example=shown, widths=widths,
    )  # fmt: skip
