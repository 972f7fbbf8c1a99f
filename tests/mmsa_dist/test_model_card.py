"""The model card and what else a registered version says of itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmsa_dist.data_card import DataCard
from mmsa_dist.model_card import LONGEST, description, model_card
from mmsa_dist.predictor import Predictor
from mmsa_dist.recipe import Recipe
from mmsa_dist.run_folder import read_json
from mmsa_dist.serving.served import answers
from mmsa_dist.tracking.fetch import fetched, version_of
from mmsa_dist.tracking.version import ANSWERS, code_tags, code_text, count_weights
from shards.index import Index
from tests.mmsa_dist.conftest import Tracked


def card_of(trained: tuple[Path, Recipe], **changed: Any) -> str:
    folder, recipe = trained
    card = DataCard.load(folder).model_copy(update=changed)
    return model_card(read_json(folder / "result.json"), card, recipe, "mmsa-dist 0.1.0")


def test_it_says_what_a_stranger_asks(trained: tuple[Path, Recipe], index: Index) -> None:
    result = read_json(trained[0] / "result.json")
    text = card_of(trained)
    for heading in ("Data", "Metrics", "Intended use", "Limits", "Made with"):
        assert f"\n## {heading}\n" in text
    assert index.fingerprint[:12] in text and f"{index.splits['train']} train" in text
    assert "Sentiment intensity of an utterance, -3 (negative) to 3 (positive), from text, audio, vision" in text
    assert f"| mae | {result['valid']['mae']:.4f} | {result['test']['mae']:.4f} |" in text
    assert "selected on validation mae; the test split was read once" in text
    assert "seed 1" in text and "mmsa-dist 0.1.0" in text
    assert len(description(text, "models:/tiny/1")) < LONGEST


def test_synthetic_data_are_said_and_of_real_ones_nothing_of_the_kind(trained: tuple[Path, Recipe]) -> None:
    made_up, real = card_of(trained), card_of(trained, synthetic=False)
    assert "**Trained on synthetic data: its answers mean nothing for real utterances.**" in made_up
    assert "Trying the software out." in made_up and "Research" not in made_up
    assert "ynthetic data" not in real and "Research on how sentiment is expressed" in real


def test_what_was_not_read_or_left_out_is_said(trained: tuple[Path, Recipe]) -> None:
    folder, recipe = trained
    result = read_json(folder / "result.json")
    del result["test"]
    text = model_card({**result, "left_out": ["a.tar"]}, DataCard.load(folder), recipe, "mmsa-dist 0.1.0")
    assert "the test split was not read" in text and "1 damaged shard left out." in text
    assert "| metric | valid |\n|---|---|\n" in text


def test_classes_are_probabilities(trained: tuple[Path, Recipe]) -> None:
    text = card_of(trained, classes={"happy": 2, "sad": 2}, tasks=("happy", "sad"))
    assert "Emotions of an utterance (happy, sad): of each the probability" in text


def test_a_description_is_as_long_as_a_database_keeps_it() -> None:
    text = description("x" * 2 * LONGEST, "models:/tiny/1")
    assert (
        len(text) == LONGEST
        and "The whole is in `MODEL_CARD.md`" in text
        and "mmsa-dist predict models:/tiny/1" in text
    )


def test_a_version_carries_all_of_it(tracked: Tracked, index: Index) -> None:
    version = version_of(tracked.client, "tiny", "1")
    result = read_json(tracked.folder / "result.json")
    for split in ("valid", "test"):
        assert version.metrics(split) == {key: value for key, value in result[split].items() if value is not None}
    assert version.monitor == "mae" and version.data == f"{index.name} (synthetic)"
    assert version.parameters == count_weights(tracked.folder / "best" / "weights.safetensors")
    assert version.aliases == ("champion",) and version.code is not None
    with fetched("models:/tiny/1", None, tracked.runs_dir) as folder:
        card = (folder / "MODEL_CARD.md").read_text()
        assert version.description.startswith(card) and "models:/tiny/1" in version.description
        predictor = Predictor.load(folder)
        kept = json.loads((folder / ANSWERS).read_text())
        again = answers(predictor, [predictor.example()])
        assert list(kept) == list(again.columns)
        assert [values for (values,) in kept.values()] == pytest.approx(again.iloc[0].tolist(), abs=1e-6)
        names = set(read_json(folder / "manifest.json")["files"])
    assert names == {"weights.safetensors", "recipe.yaml", "data.json"}


def test_the_promotion_of_a_trained_model_is_remembered(tracked: Tracked) -> None:
    tags = version_of(tracked.client, "tiny", "1").tags
    assert tags["promoted.champion.from"] == "none" and tags["promoted.champion.forced"] == "false"
    assert tags["promoted.champion.reason"] == "asked for when it was trained"


def test_the_code_is_told_as_it_was(tracked: Tracked) -> None:
    commit = {"mlflow.source.git.commit": "abcdef0123456789"}
    assert code_text(code_tags("0.1.0", {})) == "mmsa-dist 0.1.0"
    assert code_text(code_tags("0.1.0", {**commit, "git.dirty": "false"})) == "mmsa-dist 0.1.0, commit abcdef0"
    assert code_text(code_tags("1", {**commit, "git.dirty": "true"})) == "mmsa-dist 1, commit abcdef0 with changes"
    assert code_text({}) is None


def test_tags_of_another_program_are_no_trouble(tracked: Tracked) -> None:
    version = version_of(tracked.client, "tiny", "1")
    strange = replace(version, tags={"valid.mae": "good", "parameters": "many", "data": "theirs"})
    assert strange.metrics("valid") == {} and strange.parameters is None and strange.data == "theirs"
    assert replace(version, tags={}).data is None
