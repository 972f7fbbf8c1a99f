"""A trained system behind MLflow's pyfunc interface.

One row is one utterance: ``raw_text`` (or ``text`` features, or ``tokens``), ``audio`` and ``vision`` as lists of
steps, each a list of numbers, or as a .npy file in base64, a quarter as long; of these the columns that the
model reads (its signature). Null or empty means that the utterance lacks it. The answer has one row an utterance:
``sentiment``, and ``sentiment_text`` … where the system predicts unimodal sentiment too. Of a model of classes a column
for each, ``happy`` say: the probability, 0 to 1, that the utterance has it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from mmsa_dist.errors import MmsaError
from mmsa_dist.predictor import Predictor, chunks
from shards.utterance import EMOTIONS, UNIMODAL_TASK

BATCH = 32
"""Utterances that go through the system at once."""


def answer_name(task: str) -> str:
    """Column of the answer for a task of the system: an emotion's is its name."""
    if task in EMOTIONS:
        return task
    names = {"M": "sentiment", **{unimodal: f"sentiment_{modality}" for modality, unimodal in UNIMODAL_TASK.items()}}
    return names.get(task, f"sentiment_{task}")


def answers(predictor: Predictor, records: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    """One row of answers a record.

    Raises:
        DataError: a record cannot be read; names its row and column.
    """
    utterances = [predictor.utterance(record, f"row {row}") for row, record in enumerate(records)]
    parts = [pd.DataFrame(predictor.readable(predictor.predict(chunk))) for chunk in chunks(utterances, BATCH)]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(predictor.card.judged))
    return table.rename(columns=answer_name).astype("float64")


class ServedSystem(PythonModel):
    """Loads the model folder once, then answers."""

    def load_context(self, context: Any) -> None:
        """`context.artifacts["model"]` is the model folder."""
        self.predictor = Predictor.load(Path(context.artifacts["model"]))

    # MLflow takes any other annotation than DataFrame for the schema of a request, which ragged rows do not have
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers for a DataFrame; a list of records or one record will do too.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (HTTP 400) with our sentence, where an input cannot be read.
        """
        try:
            return answers(self.predictor, _records(model_input))
        except MmsaError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None


def _records(model_input: Any) -> list[dict[Any, Any]]:
    if isinstance(model_input, pd.DataFrame):
        return model_input.to_dict("records")
    return [model_input] if isinstance(model_input, dict) else list(model_input)
