"""A program: loads a logged model as a server would, with the code that it carries, and answers its input example.

    python -P load_alone.py MODEL_FOLDER ANSWER.json

It imports nothing of this project itself, so that what answers can only come from the model. ``ANSWER.json`` holds
``{"answers": {column: [number a row]}}``, or ``{"error": sentence}`` where the model does not load or answer.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path, into: Path) -> None:
    """Writes what the model in `folder` answers."""
    try:
        found: dict[str, Any] = {"answers": answers(folder)}
    except Exception as error:  # whatever the model's code raises, and MLflow about its files
        told = " ".join(f"{type(error).__name__}: {error}".split())
        found = {"error": told.replace(f"{folder}/", "")}
    into.write_text(json.dumps(found), encoding="utf-8")


def answers(folder: Path) -> dict[str, list[float]]:
    """Column -> a number a row of the input example."""
    import mlflow
    from mlflow.models import Model

    example = Model.load(str(folder)).load_input_example(str(folder))
    table = mlflow.pyfunc.load_model(str(folder)).predict(example)
    ours = sys.modules.get("mmsa_dist")
    if ours is None or not Path(str(ours.__file__)).resolve().is_relative_to(folder.resolve()):
        raise ImportError("the model does not bring its own code")
    return {str(column): [float(value) for value in table[column]] for column in table.columns}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
