"""`mmsa-dist plan`: it starts nothing, and what it says is what `train` does."""

import json
from pathlib import Path

import pytest

from mmsa_dist.errors import ConfigError
from mmsa_dist.memory import Sizes
from mmsa_dist.planning import ROOM, checkpoints, main, size_text
from mmsa_dist.recipe import flatten, load_recipe
from tests.data import packed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("planning"), samples=60)


def planned(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> str:
    assert main([*words, "--runs-dir", str(tmp_path / "none" / "yet")]) == 0
    assert list(tmp_path.iterdir()) == [], "a plan leaves nothing"
    return capsys.readouterr().out


def test_every_value_has_its_origin(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["tam_ulag", "--data", str(data), "--recipe", "mosi", "--workers", "2", "--optim.lr.audio", "1e-4"]
    values = json.loads(planned(capsys, tmp_path, *words, "--json"))["recipe"]
    recipe = flatten(load_recipe("tam_ulag", "mosi", words[1:3] + words[5:]))
    assert {key: entry["value"] for key, entry in values.items()} | {"system": "tam_ulag", "train.monitor": "mae"} == (
        json.loads(json.dumps(recipe))
    )
    origins = {key: entry["origin"] for key, entry in values.items()}
    assert origins["optim.lr.audio"] == origins["launch.workers"] == origins["data.path"] == "command line"
    assert origins["optim.lr.text"].startswith("recipe tam_ulag.mosi: MMSA")
    assert origins["model.vision_hidden"] == "recipe tam_ulag.mosi: paper"
    assert origins["seed"] == origins["engine.zero"] == "default"


def test_a_recipe_of_ones_own_is_named(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path.parent / f"{tmp_path.name}.yaml"
    own.write_text("system: self_mm\ndata:\n  batch_size: 16\n")
    found = json.loads(planned(capsys, tmp_path, "self_mm", "--data", str(data), "--recipe", str(own), "--json"))
    assert found["recipe"]["data.batch_size"] == {"value": 16, "origin": f"recipe {own.name}"}
    assert found["recipe"]["train.monitor"]["origin"] == "the data set's kind"
    assert found["recipe"]["labels.generator"] == {"value": "ulgm", "origin": "the system's paper"}
    assert found["arithmetic"]["global_batch"] == 16


def test_more_workers_than_this_machine_has_are_planned(
    data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = planned(capsys, tmp_path, "self_mm", "--data", str(data), "--workers", "16", "--batch-size", "64")
    assert "cluster: 16 workers x 1 CPUs = 16 CPUs" in out
    assert "one of 16 ranks, fp32, without activations" in out and "global batch 64 = 16 ranks x 4 micro" in out


def test_a_stage_is_advised_that_fits(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["self_mm", "--data", str(data), "--workers", "16", "--batch-size", "64"]
    stages = json.loads(planned(capsys, tmp_path, *words, "--json"))["stages"]
    assert stages["3"]["step"] < stages["1"]["step"]
    between = (stages["1"]["step"] + stages["3"]["step"]) / 2 / ROOM / 2**30
    for memory, said in ((64, "stage 1 fits"), (between, "advised: --zero 3"), (1e-7, "no stage leaves activations")):
        assert said in planned(capsys, tmp_path, *words, "--brief", "--memory", str(memory))


def test_half_precision_has_no_stage_0(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["self_mm", "--data", str(data), "--engine.precision", "bf16", "--brief"]
    assert "needs fp32, not bf16" in planned(capsys, tmp_path, *words)


def test_an_optimizer_on_the_host_is_the_hosts(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where there is a GPU, whose memory --memory names; without one both are the same memory."""
    words = ["self_mm", "--data", str(data), "--workers", "2", "--engine.offload", "optimizer"]
    here, beside = (json.loads(planned(capsys, tmp_path, *words, "--json", *more)) for more in ([], ["--memory", "8"]))
    for stage in "123":
        on_gpu, host = (beside["stages"][stage][key] for key in ("step", "host"))
        assert host > on_gpu - beside["sizes"]["label_state"] > 0
        assert here["stages"][stage]["step"] == on_gpu + host
    assert beside["fitting"] == [1, 2, 3]
    out = planned(capsys, tmp_path, *words, "--brief", "--memory", "8")
    assert "on the host" in out and "divides nothing" in out and "stage 1 fits" in out
    assert "on the host" not in planned(capsys, tmp_path, *words[:-2], "--brief")
    tight = ["--brief", "--memory", "1e-7"]
    assert "bf16, --engine.offload optimizer" in planned(capsys, tmp_path, *words[:-2], *tight)
    assert "--engine.offload" not in planned(capsys, tmp_path, *words, *tight)


def test_the_interval_is_young_and_dalys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sqrt(2 C M): to stand still for 50 s and a failure every 100 h make 100 minutes; four ranks halve them."""
    monkeypatch.setattr("mmsa_dist.planning.copying_speed", lambda: 12e9 / 50)
    monkeypatch.setattr("mmsa_dist.planning.writing_speed", lambda folder: 12e9 / 500)
    sizes = Sizes({"rest": 10**9}, 0, 1)
    found = checkpoints(sizes, 100.0, tmp_path)
    assert found["still_seconds"] == pytest.approx(50) and found["interval_seconds"] == pytest.approx(6000)
    assert checkpoints(sizes, 100.0, tmp_path, 4)["interval_seconds"] == pytest.approx(3000)
    monkeypatch.setattr("mmsa_dist.planning.writing_speed", lambda folder: 12e9 / 9000)
    assert checkpoints(sizes, 100.0, tmp_path)["interval_seconds"] == pytest.approx(9000), "one is still being written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mtbf", "0"], "--mtbf: 0 must be greater than 0"),
        (["--memory", "nan"], "--memory: nan must be greater than 0"),
        (["--mtbf", "soon"], "mtbf"),
        (["--optim.lr.txt", "1"], "did you mean --optim.lr.text"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_gets_a_sentence(words: list[str], message: str, data: Path) -> None:
    with pytest.raises(Exception, match=message) as caught:
        main(["self_mm", *(["--data", str(data)] if "--data" not in words else []), *words])
    assert getattr(caught.value, "exit_code", None) in (2, 3) and "\n" not in str(caught.value)


def test_without_a_system_it_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["--help"]) == 0
    assert "Young" not in capsys.readouterr().err
    with pytest.raises(ConfigError):
        main(["no_such_system", "--data", "x"])


def test_sizes_are_read_at_a_glance() -> None:
    assert [size_text(size) for size in (999, 1500, 2.5e7, 1.4e9)] == ["999 B", "1.5 kB", "25.0 MB", "1.4 GB"]
