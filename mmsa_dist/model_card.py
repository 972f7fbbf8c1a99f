"""The model card: what a person wants to know who finds a model and was not there when it was trained, in Markdown."""

from collections.abc import Mapping
from typing import Any

from mmsa_dist.data_card import DataCard
from mmsa_dist.recipe import Recipe
from mmsa_dist.report import data_name, value_text
from shards.suggest import counted

FILE = "MODEL_CARD.md"
"""Beside the weights in a logged model."""

LONGEST = 5000
"""Characters that MLflow's databases keep of a version's description."""

CARD = """# {title}

{paper}
{synthetic}
{answer}, from {modalities}.

## Data

{data}: {splits}; fingerprint `{fingerprint}`.{left_out} Modalities and features a step: {widths}.{text}

## Metrics

{chosen}

{table}

## Intended use

{use}

## Limits

- The figures are those of one run (seed {seed}): another seed gives others.
- Validation chose the epoch, and in a sweep the hyper-parameters, so its figures are hopeful.
- It knows the speakers, the language and the way of recording of its training data, and was measured on no other.
  Nobody has looked at how it does for groups of speakers.
- Features must be extracted as those of the training data: it cannot tell others by their looks.

## Made with

{code}. `recipe.yaml` holds every value of the run, `data.json` what the model knows of its data.
"""

MADE_UP = "\n**Trained on synthetic data: its answers mean nothing for real utterances.**\n"

USE = (
    "Research on how sentiment is expressed, and annotation that a person checks, for utterances like those of the "
    "training data. Not for decisions about single persons."
)


def model_card(result: Mapping[str, Any], card: DataCard, recipe: Recipe, code: str) -> str:
    """The card of a finished run.

    Args:
        result: the run's ``result.json``.
        code: what it was trained with, e.g. ``mmsa-dist 0.1.0, commit 1234567``.
    """
    from mmsa_dist.systems import get_system

    data = data_name({"data": card.name, "synthetic": card.synthetic})
    left_out = result.get("left_out", ())
    encoder = card.text.encoder if card.text is not None else None
    return CARD.format(
        title=f"{recipe.system} on {data}",
        paper=get_system(recipe.system).paper,
        synthetic=MADE_UP if card.synthetic else "",
        answer=_answer(card),
        modalities=", ".join(card.widths),
        data=data,
        splits=", ".join(f"{count:,} {split}" for split, count in card.splits.items()),
        fingerprint=card.fingerprint[:12],
        left_out=f" {counted(len(left_out), 'damaged shard')} left out." if left_out else "",
        widths=", ".join(f"{name} {width}" for name, width in card.widths.items()),
        text=f" Text goes through the encoder `{encoder}`." if encoder else "",
        chosen=_chosen(result),
        table=_table(result),
        use="Trying the software out." if card.synthetic else USE,
        seed=recipe.seed,
        code=code,
    )


def description(card: str, address: str) -> str:
    """The card as the description of the registered version at `address`, with what to do with it."""
    use = (
        f"\n`mmsa-dist predict {address} --data FOLDER --out predictions.csv`, "
        f"or `mlflow models serve -m {address} --env-manager local`.\n"
    )
    cut = f"…\n\nThe whole is in `{FILE}`.\n"
    room = LONGEST - len(use)
    return (card if len(card) <= room else card[: room - len(cut)] + cut) + use


def _answer(card: DataCard) -> str:
    if card.classes:
        named = ", ".join(card.judged)
        return f"Emotions of an utterance ({named}): of each the probability, 0 to 1, that it is there"
    low, high = card.label_range
    return f"Sentiment intensity of an utterance, {low:g} (negative) to {high:g} (positive)"


def _chosen(result: Mapping[str, Any]) -> str:
    test = "the test split was read once, after that" if "test" in result else "the test split was not read"
    return f"Epoch {result['best_epoch']} of {result['epochs']}, selected on {result.get('selected_on')}; {test}."


def _table(result: Mapping[str, Any]) -> str:
    splits = [split for split in ("valid", "test") if split in result]
    rows = [
        f"| {metric} | " + " | ".join(value_text(metric, result[split].get(metric)) for split in splits) + " |"
        for metric in result["valid"]
    ]
    return "\n".join([f"| metric | {' | '.join(splits)} |", f"|---|{'---|' * len(splits)}", *rows])
