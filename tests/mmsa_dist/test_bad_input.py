"""What a wrong command, recipe or environment is answered with: one sentence, the right exit code, nothing left."""

from pathlib import Path

import pytest
import yaml

from mmsa_dist.__main__ import main
from mmsa_dist.recipe import load_recipe
from tests.data import packed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(packed(tmp_path_factory.mktemp("bad"), samples=40))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs a command that must fail: gives its one line of error, after checking the exit code and what is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.delenv("RAY_ADDRESS")

    def run(code: int, *words: str) -> str:
        assert main(list(words)) == code
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert not any(tmp_path.glob("runs/*/recipe.yaml")), "a run that never began leaves nothing"
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, error
        return lines[0]

    return run


def test_names_that_do_not_exist(refused, data: str) -> None:  # type: ignore[no-untyped-def]
    assert "did you mean 'train'" in refused(2, "trian")
    assert "did you mean 'self_mm'" in refused(2, "train", "selfmm", "--data", data)
    assert "package.module:Class" in refused(2, "train", "nowhere:Nothing", "--data", data)
    assert "--optim.lr.text" in refused(2, "train", "self_mm", "--data", data, "--optim.lr.txt", "3e-5")
    assert "neither a file nor a packaged recipe" in refused(2, "train", "self_mm", "--recipe", "mosy", "--data", data)
    assert "did you mean 'mosi'" in refused(2, "train", "self_mm", "--recipe", "mosy", "--data", data)


def test_options_of_predict(refused, data: str) -> None:  # type: ignore[no-untyped-def]
    words = ("predict", "runs/x", "--data", data, "--out", "o.csv")
    split = refused(2, *words, "--split", "tes")
    assert split == "error: --split tes: there is none such; did you mean 'test'? (valid: test, train, valid)"
    assert "unknown option --splt; did you mean --split?" in refused(2, *words, "--splt", "test")
    assert refused(2, *words[:4]) == "error: --out missing; see mmsa-dist predict --help"
    assert "`batch_size`: input should be greater than" in refused(2, *words, "--batch-size", "0")
    assert "one word too many: more" in refused(2, "predict", "runs/x", "more", *words[2:])


def test_recipes(refused, data: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = tmp_path / "my.yaml"

    def with_recipe(content: object) -> str:
        recipe.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(refused(2, "train", "self_mm", "--recipe", str(recipe), "--data", data))

    unknown = with_recipe({"optim": {"lr": {"text": 1e-5, "audio": 1, "vision": 1, "rest": 1, "vison": 1}}})
    assert "unknown key `optim.lr.vison`" in unknown and "did you mean 'vision'" in unknown and "my.yaml" in unknown
    assert "unknown key `modle`" in with_recipe({"modle": {}}) or "did you mean 'model'" in with_recipe({"modle": {}})
    assert "`model.audio_hidden`" in with_recipe({"model": {"audio_hidden": "many"}})
    assert "`data.batch_size`" in with_recipe({"data": {"batch_size": 0}})
    assert "is for system 'ufen_mtfn'" in with_recipe({"system": "ufen_mtfn"})
    assert "is not YAML" in with_recipe("optim: [")
    assert "expected a mapping" in with_recipe("- a list")


def test_values_that_cannot_work_here(refused, data: str) -> None:  # type: ignore[no-untyped-def]
    assert "fp16 needs a GPU" in refused(2, "train", "self_mm", "--data", data, "--engine.precision", "fp16")
    assert "use --zero 1" in refused(2, "train", "self_mm", "--data", data, "--engine.precision", "bf16", "--zero", "0")
    many = refused(
        2, "train", "self_mm", "--data", data, "--workers", "500", "--batch-size", "512", "--tracking.no-enabled"
    )
    assert "500 workers x 1 CPUs need 500 CPUs" in many and "use --workers" in many
    assert "cannot be shared by 4 workers" in refused(
        2, "train", "self_mm", "--data", data, "--workers", "4", "--batch-size", "3"
    )
    assert "torchrun sets" in refused(2, "train", "self_mm", "--data", data, "--launcher", "torchrun")
    assert "'acc2' is not a metric" in refused(2, "train", "self_mm", "--data", data, "--train.monitor", "acc2")
    assert "no data: give --data" in refused(2, "train", "self_mm")


REFUSED_VALUES = {
    "--optim.lr.rest=-0.01": "`optim.lr.rest`: input should be greater than or equal to 0, found -0.01",
    "--optim.lr.text nan": "`optim.lr.text`: input should be a finite number, found nan",
    "--optim.weight-decay.rest=-1": "`optim.weight_decay.rest`: input should be greater",
    "--optim.betas 0.9 1.5": "`optim.betas.1`: input should be less than 1, found 1.5",
    "--seed 18446744073709551616": "`seed`: input should be less than 9223372036854775808",
    "--epochs 0": "`train.epochs`: input should be greater than or equal to 1, found 0",
    "--engine.offload optimizer --zero 0": "`engine`: offload needs ZeRO 1, 2 or 3",
    "--epochs many": "invalid literal for int() with base 10: 'many'",
    "--zero 7": "invalid choice '7' for argument '--zero/--engine.zero'. Expected one of ('0', '1', '2', '3')",
    "--launch.gpus-per-worker 64": "1 workers x 64 GPUs need 64 GPUs, this machine has",
    "--labels.generator ulgm": "label generator 'ulgm' reads features of M and of at least one of T, A, V; the system",
    "--labels.generator ulgn": "did you mean 'ulgm'",
    "--labels.generator multimodal": "labels.generator: multimodal is without effect: ufen_mtfn as it is set up has no",
    "--labels.generator=": "`labels.generator`: string should have at least 1 character, found ''",
    "--model.unimodal-targets own": "labels.generator: none, but synthetic-tiny has no labels for the tasks A, T, V of",
    "--model.width 3": "`model`: width 3 must be divisible by heads 2 and by 2",
    "--data.modalities text --model.subtasks vision": "model.subtasks",
    "--labels.zero-is-positive": "labels.zero_is_positive: label generator 'none' has no such option",
}


@pytest.mark.parametrize("words", REFUSED_VALUES)
def test_values_that_contradict_are_refused_before_anything_starts(refused, words: str, data: str) -> None:  # type: ignore[no-untyped-def]
    error = refused(2, "train", "ufen_mtfn", "--data", data, "--tracking.no-enabled", *words.split())
    assert REFUSED_VALUES[words] in error
    assert "─" not in error and "http" not in error and "[type=" not in error


def test_self_mm_without_labels_to_learn_is_refused(refused, data: str) -> None:  # type: ignore[no-untyped-def]
    error = refused(2, "train", "self_mm", "--data", data, "--labels.generator", "none", "--tracking.no-enabled")
    assert (
        "none, but synthetic-tiny has no labels for the tasks A, T, V of self_mm; use a generator (ulgm, sugrm, ulag)"
        in error
    )


def test_a_generator_without_a_task_to_make_labels_for_is_refused(refused, data: str) -> None:  # type: ignore[no-untyped-def]
    for system, words in (("mult", []), ("self_mm", ["--model.subtasks"])):
        error = refused(2, "train", system, "--data", data, *words, "--labels.generator", "multimodal")
        assert f"labels.generator: multimodal is without effect: {system} as it is set up has no unimodal task" in error


def test_values_without_effect_are_said(data: str) -> None:
    from mmsa_dist.recipe import load_recipe
    from mmsa_dist.session import without_effect
    from shards.index import Index

    words = ["--data", data, "--data.modalities", "text", "audio", "--data.normalize", "vision", "audio"]
    recipe = load_recipe("ufen_mtfn", None, [*words, "--text.max-tokens", "9", "--launcher", "local"])
    assert without_effect(recipe, Index.load(Path(data))) == [
        "data.normalize: vision is not in use",
        "text.max_tokens is without effect: no text encoder reads the text",
    ]
    assert without_effect(load_recipe("ufen_mtfn", None, ["--data", data]), Index.load(Path(data))) == []
    words = ["--data", data, "--engine.offload", "optimizer"]
    (said,) = without_effect(load_recipe("ufen_mtfn", None, words), Index.load(Path(data)))
    assert said.startswith("engine.offload costs memory and gains nothing: ranks compute on the CPU")
    assert (
        without_effect(
            load_recipe("ufen_mtfn", None, [*words, "--launch.gpus-per-worker", "1"]), Index.load(Path(data))
        )
        == []
    )


@pytest.mark.parametrize(
    ("system", "field"), [("self_mm", "text_pooling: cls"), ("iam", "pooling: state"), ("ufen_mtfn", None)]
)
def test_a_sentence_that_is_read_by_its_first_word_is_said(data: str, system: str, field: str | None) -> None:
    from mmsa_dist.recipe import load_recipe
    from mmsa_dist.session import without_effect
    from shards.index import Index

    words = [] if system == "ufen_mtfn" else ["--model.text-pooling" if system == "self_mm" else "--model.pooling"]
    index, values = Index.load(Path(data)), words and [words[0], (field or "").split(": ")[1]]
    said = [
        line for line in without_effect(load_recipe(system, None, ["--data", data, *values]), index) if "step" in line
    ]
    assert [line.partition(" takes the first step")[0] for line in said] == ([f"model.{field}"] if field else [])
    if words:
        recipe = load_recipe(system, None, ["--data", data, words[0], "mean"])
        assert not [line for line in without_effect(recipe, index) if "step" in line]


def test_data_that_does_not_fit(refused, data: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "nothing: no such folder" in refused(3, "train", "self_mm", "--data", str(tmp_path / "nothing"))
    assert "no index.json in" in refused(3, "train", "self_mm", "--data", str(tmp_path))
    (tmp_path / "some.tar").touch()
    assert "give the folder, or index it" in refused(3, "train", "self_mm", "--data", str(tmp_path / "some.tar"))
    assert "text.encoder" in refused(2, "train", "self_mm", "--data", data, "--text.encoder", str(tmp_path))
    wanted = refused(
        2, "train", "self_mm", "--data", data, "--text.encoder", str(tmp_path / "model"), "--text.input", "tokens"
    )
    assert "no token ids" in wanted


def test_servers_that_do_not_answer(refused, data: str) -> None:  # type: ignore[no-untyped-def]
    mlflow = refused(75, "train", "self_mm", "--data", data, "--tracking-uri", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in mlflow
    ray = refused(75, "train", "self_mm", "--data", data, "--tracking.no-enabled", "--address", "127.0.0.1:9")
    assert "no Ray cluster answers at 127.0.0.1:9" in ray
    assert "is not host:port" in refused(
        2, "train", "self_mm", "--data", data, "--tracking.no-enabled", "--address", "nonsense"
    )


def test_resuming_what_is_not_a_run(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "there is no run" in refused(2, "train", "--resume", str(tmp_path))


def test_help_and_printed_configuration(capfd: pytest.CaptureFixture[str], data: str) -> None:
    assert main(["train", "--help"]) == 0
    assert "--resume RUN" in capfd.readouterr().out
    assert main(["train", "self_mm", "--data", data, "--optim.lr.text", "3e-5", "--print-config"]) == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["optim"]["lr"]["text"] == 3e-5 and printed["system"] == "self_mm"


def test_a_step_timeout_that_no_step_fits_into(refused, data: str) -> None:  # type: ignore[no-untyped-def]
    """It was taken for the process having been stopped, and never ended anything."""
    said = refused(2, "train", "self_mm", "--data", data, "--launch.step-timeout", "0.001")
    assert said == "error: `launch.step_timeout`: input should be greater than or equal to 1, found 0.001"


@pytest.mark.parametrize("wrong", ["a:b", ":4", "1:", "many"])
def test_a_number_of_workers_that_is_none(wrong: str, refused, data: str) -> None:  # type: ignore[no-untyped-def]
    said = refused(2, "train", "self_mm", "--data", data, "--workers", wrong)
    assert f"--workers {wrong}: neither a number of workers nor LEAST:MOST" in said


def test_values_that_exclude_each_other_are_said_without_all_the_others(refused, data: str) -> None:  # type: ignore[no-untyped-def]
    for words in (["--workers", "4:1"], ["--engine.offload", "optimizer", "--zero", "0"]):
        said = refused(2, "train", "self_mm", "--data", data, *words)
        assert "found" not in said and "{" not in said and said.count("`") == 2


def test_a_plain_number_of_workers_is_the_least_too(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("launch: {workers: 4, min_workers: 2}\n")
    for words, sets in (
        ([], (4, 2)), (["--workers", "1"], (1, None)), (["--workers=1:3"], (3, 1)),
        (["--workers", "5", "--launch.min-workers", "3"], (5, 3)),
    ):  # fmt: skip
        launch = load_recipe("self_mm", str(tmp_path / "my.yaml"), words).launch
        assert (launch.workers, launch.min_workers) == sets
