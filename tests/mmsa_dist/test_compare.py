"""`mmsa-dist compare`: what differs between two models, and how sure a difference of their test MAE is."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mmsa_dist.__main__ import main
from mmsa_dist.recipe import Recipe
from mmsa_dist.registered.compare import recipe_differences
from mmsa_dist.registered.paired import RESAMPLES, Interval, Predictions, interval
from mmsa_dist.registered.sides import side
from mmsa_dist.run_folder import read_json, write_json
from shards.index import Index
from tests.mmsa_dist import runs
from tests.mmsa_dist.conftest import Tracked, free_port
from tests.mmsa_dist.test_models_cli import rows


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, index: Index) -> Path:
    """A run with another seed, batch size and name."""
    return runs.trained(tmp_path_factory.mktemp("other"), index, seed=2, data={"batch_size": 8}, epochs=1)[0]


def compare(tracked: Tracked, a: str | Path, b: str | Path) -> int:
    return main(["compare", str(a), str(b), "--runs-dir", str(tracked.runs_dir)])


def test_a_registered_model_and_a_run_with_another_recipe(
    tracked: Tracked, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tracked, "models:/tiny@champion", other) == 0
    printed = capsys.readouterr().out
    found = rows(printed)
    assert found["seed"] == ["1", "2", "yes"] and found["data.batch_size"] == ["16", "8", "yes"]
    assert found["train.epochs"] == ["2", "1", "yes"] and found["tracking.register_as"] == ["tiny", "null", "no"]
    assert "model.post_fusion_dim" not in found, "what is the same is left out"
    a, b = (read_json(folder / "result.json") for folder in (tracked.folder, other))
    for split in ("valid", "test"):
        (line,) = [line for line in printed.splitlines() if f"│ {split}" in line and "MAE" in line]
        old, new = a[split]["mae"], b[split]["mae"]
        better = "A" if old < new else "B"
        assert f"{old:.4f} │ {new:.4f} │ {new - old:+.4f}" in " ".join(line.split()) and better in line.split()
    parameters = found["parameters"]
    assert parameters[0] == parameters[1] and int(parameters[0].replace(",", "")) > 1000
    assert found["data fingerprint"][0] == found["data fingerprint"][1]
    assert (
        "WARNING" not in printed and f"{RESAMPLES:,} paired resamples of {len(keys_of_test(other))} samples" in printed
    )


def keys_of_test(folder: Path) -> np.ndarray:
    with np.load(folder / "predictions" / "test.npz") as file:
        return np.asarray(file["key"])


def test_all_ways_to_name_a_model_say_the_same_of_it(tracked: Tracked) -> None:
    names = ["models:/tiny/1", "models:/tiny@champion", f"runs:/{tracked.run_id}", str(tracked.folder)]
    a, *rest = (side(name, None, tracked.runs_dir) for name in names)
    for b in rest:
        assert (b.recipe, b.card, b.metrics) == (a.recipe, a.card, a.metrics)
        assert a.predictions is not None and b.predictions is not None
        np.testing.assert_array_equal(a.predictions.p, b.predictions.p)
    assert rest[-1].parameters == a.parameters is not None


def test_other_data_are_warned_of_and_other_samples_have_no_interval(
    tracked: Tracked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = runs.trained(tmp_path, runs.packed(tmp_path / "data", samples=40), epochs=1)
    assert compare(tracked, tracked.folder, folder) == 0
    printed = capsys.readouterr().out
    assert "WARNING: their data differ (fingerprints" in printed and "not comparable" in printed
    assert "no confidence interval: they were tested on other samples" in printed


def test_without_predictions_without_a_result_and_with_damaged_weights(
    tracked: Tracked, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(other, tmp_path / "run")
    (folder / "predictions" / "test.npz").unlink()
    (folder / "best" / "weights.safetensors").write_bytes(b"no weights")
    assert compare(tracked, "models:/tiny/1", folder) == 0
    printed = capsys.readouterr().out
    assert "no confidence interval: B kept no predictions of the test split" in printed
    assert rows(printed)["parameters"][1] == "-"
    (folder / "result.json").unlink()
    assert compare(tracked, folder, "models:/tiny/1") == 0
    assert "A kept no predictions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("predictions/test.npz", b"no arrays", "predictions cannot be read"),
        ("result.json", b"{", "result.json: cannot be read"),
        ("data.json", b"{}", "data.json: name: Field required"),
    ],
)
def test_a_damaged_file_is_named(
    file: str,
    content: bytes,
    says: str,
    tracked: Tracked,
    other: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(other, tmp_path / "run")
    (folder / file).write_bytes(content)
    assert compare(tracked, "models:/tiny/1", folder) == 3
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("models:/tiny@champ", "no alias 'champ'; did you mean 'champion'?"),
        ("models:/tiny/77", "no version 77"),
        ("models:/tinny/1", "no model 'tinny'"),
        ("nowhere", "neither a folder nor a name in the registry"),
    ],
)
def test_a_model_that_is_not_there(model: str, says: str, tracked: Tracked, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tracked, "models:/tiny/1", model) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_is_no_run(tracked: Tracked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tracked, tmp_path, "models:/tiny/1") == 2
    assert "there is no run and no model (no recipe.yaml)" in capsys.readouterr().err


def test_a_server_that_is_away(trained: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    assert main(["compare", str(trained[0]), "models:/tiny/1", "--tracking-uri", uri]) == 75
    assert uri in capsys.readouterr().err


def test_figures_of_an_older_version_come_from_its_run(tracked: Tracked) -> None:
    """Before versions kept their test metrics as tags."""
    source = tracked.client.get_model_version("tiny", "1")
    tags = {key: value for key, value in source.tags.items() if not key.startswith("test.")}
    tracked.client.create_registered_model("older")
    model = source.source.removeprefix("models:/")
    place = tracked.client.get_logged_model(model).artifact_location
    tracked.client.create_model_version("older", place, source.run_id, tags)
    assert (
        side("models:/older/1", None, tracked.runs_dir).metrics
        == side("models:/tiny/1", None, tracked.runs_dir).metrics
    )


def test_values_of_recipes() -> None:
    a = {"seed": 1, "data.modalities": None, "model.old": True, "launch.workers": 2}
    b = {"seed": 1, "data.modalities": ["text", "audio"], "launch.workers": 4}
    assert recipe_differences(a, b) == [
        ("data.modalities", "null", "text, audio", True),
        ("model.old", "true", "(none)", True),
        ("launch.workers", "2", "4", False),
    ]


# --- the interval


def predictions(errors: np.ndarray, y: np.ndarray | None = None) -> Predictions:
    keys = np.array([f"k{n:05}" for n in range(len(errors))])
    truth = np.zeros(len(errors), np.float32) if y is None else y
    return Predictions(keys, truth, (truth + errors).astype(np.float32))


def test_the_interval_is_that_of_the_normal_approximation_where_that_holds() -> None:
    rng = np.random.default_rng(1)
    a, b = predictions(rng.normal(size=2000)), predictions(rng.normal(size=2000) * 1.1)
    found = interval(a, b, "mosi")
    apart = np.abs(b.p.astype(float)) - np.abs(a.p.astype(float))
    half = 1.96 * apart.std() / np.sqrt(len(apart))
    assert isinstance(found, Interval) and found.samples == 2000
    assert found.difference == pytest.approx(apart.mean())
    assert (found.low, found.high) == pytest.approx((apart.mean() - half, apart.mean() + half), abs=half / 20)
    assert interval(a, b, "mosi") == found, "the same every time"


def test_the_order_of_samples_does_not_matter_and_pairs_cancel() -> None:
    a = predictions(np.linspace(-1, 1, 100))
    order = np.random.default_rng(0).permutation(100)
    b = Predictions(a.keys[order], a.y[order], a.p[order])
    assert interval(a, b, "mosi") == Interval(0.0, 0.0, 0.0, 100)
    better = predictions(np.linspace(-1, 1, 100) * 0.5)
    found = interval(a, better, "mosi")
    assert isinstance(found, Interval) and found.high < 0 and found.tells


def test_labels_of_sims_are_clipped_as_in_its_metric() -> None:
    a, b = predictions(np.full(10, 3.0)), predictions(np.full(10, 2.0))
    assert interval(a, b, "sims") == Interval(0.0, 0.0, 0.0, 10)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda a: Predictions(a.keys[:5], a.y[:5], a.p[:5]), "other samples (5 of 10 and 5 in common)"),
        (lambda a: Predictions(np.array(["x", *a.keys[1:]]), a.y, a.p), "other samples (9 of 10 and 10 in common)"),
        (lambda a: Predictions(a.keys, a.y + 1, a.p), "other labels"),
    ],
)
def test_what_cannot_be_paired(changed: object, says: str) -> None:
    a = predictions(np.linspace(-1, 1, 10))
    found = interval(a, changed(a), "mosi")  # type: ignore[operator]
    assert isinstance(found, str) and says in found


def keys_of_test_that_come_twice_cannot_be_paired() -> None:
    a = predictions(np.zeros(3))
    twice = Predictions(np.array(["k", "k", "l"]), a.y, a.p)
    assert "each sample once" in str(interval(twice, twice, "mosi"))


def test_classes_have_no_interval(
    tracked: Tracked, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(other, tmp_path / "run")
    card = read_json(folder / "data.json")
    write_json(folder / "data.json", {**card, "kind": "iemocap", "tasks": ["happy"], "classes": {"happy": 2}})
    with np.load(folder / "predictions" / "test.npz") as file:
        np.savez(folder / "predictions" / "test.npz", **file, tasks=np.array(["happy"]))
    assert compare(tracked, folder, folder) == 0
    assert "labels are classes, which have no MAE" in capsys.readouterr().out
