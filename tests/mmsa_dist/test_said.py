"""What a run says before and while it trains: where its values come from, what it reads, how far it is."""

import json
import re
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmsa_dist import diagnosis, follow
from mmsa_dist.errors import ConfigError, TrainingError, TransientError
from mmsa_dist.follow import Follower
from mmsa_dist.recipe import load_recipe, origin
from mmsa_dist.session import data_spec, inputs
from mmsa_dist.worker import Told
from shards.index import Index
from tests.data import packed


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.load(packed(tmp_path_factory.mktemp("said"), samples=20))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (None, "general values of self_mm; --recipe mosei or mosi or sims takes those of a published set (packaged)"),
        ("mosi", "recipe of self_mm for mosi (packaged)"),
    ],
)
def test_where_a_recipe_comes_from(recipe: str | None, said: str) -> None:
    assert origin("self_mm", recipe, []) == said


def test_a_recipe_of_ones_own_is_named(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("seed: 3\n")
    assert origin("self_mm", str(tmp_path / "my.yaml"), []) == f"recipe {tmp_path / 'my.yaml'}"


def test_what_is_read_and_what_is_not(index: Index) -> None:
    every = load_recipe("ufen_mtfn", None, [])
    assert inputs(every, index) == "reads " + ", ".join(f"{m} {d.width}" for m, d in index.modalities.items())
    audio = load_recipe("ufen_mtfn", None, ["--data.modalities", "audio"])
    assert inputs(audio, index).endswith("; not read: text, vision")


def test_transcripts_that_nothing_reads_are_named(index: Index) -> None:
    bare = index.model_copy(update={"modalities": {"audio": index.modalities["audio"]}})
    assert inputs(load_recipe("ufen_mtfn", None, []), bare).endswith("; not read: text (--text.encoder NAME reads it)")


def test_a_set_of_transcripts_alone_says_how_they_are_read(index: Index) -> None:
    words = index.model_copy(update={"modalities": {}})
    with pytest.raises(ConfigError, match=r"it has transcripts or token ids only; --text\.encoder NAME reads its text"):
        data_spec(load_recipe("ufen_mtfn", None, []), words)


def events(*lines: dict[str, Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_a_long_epoch_is_not_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def step(number: int, time: float) -> dict[str, Any]:
        kind = "first_step" if number == 1 else "step"
        return {"event": kind, "time": time, "epoch": 1, "step": number, "of": 90, "loss": 0.5}

    (tmp_path / "events").mkdir()
    with Follower(tmp_path, "mae") as follower:
        follower.path.write_text(events(step(1, 100), step(2, 110), step(3, 131), step(4, 140), step(5, 162)))
    lines = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    assert lines == ["epoch   1  step 3 of 90  loss 0.5000", "epoch   1  step 5 of 90  loss 0.5000"]


@pytest.mark.parametrize("terminal", [False, True])
def test_where_rank_0_runs_is_said_on_a_terminal_too(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Console(file=StringIO(), force_terminal=terminal, width=100)
    monkeypatch.setattr(follow, "console", shown)
    (tmp_path / "events").mkdir()
    with Follower(tmp_path, "mae") as follower:
        follower.path.write_text(events({"event": "start", "time": 1.0, "pid": 4711, "rank": 0, "world": 2}))
    written = re.sub(r"\033\[[\d;?]*[a-zA-Z]", "", shown.file.getvalue())  # type: ignore[attr-defined]
    assert "rank 0 of 2 is up (pid 4711)" in written


def test_what_ranks_wrote_down_is_told_from_what_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / "failures").mkdir()
    named = {"rank": 0, "exit_code": 75, "type": "TransientError", "message": "the server is silent"}
    (tmp_path / "failures" / "1.json").write_text(json.dumps(named))
    (tmp_path / "failures" / "2.json").write_text('{"rank": 1, "ex')
    assert diagnosis.failures(tmp_path) == [named, None]
    assert diagnosis.written_down(tmp_path) == [named]
    assert str(diagnosis.diagnose(tmp_path, "")) == "the server is silent"


@pytest.mark.parametrize("first", [0, 1])
def test_the_keys_of_a_loss_that_is_not_finite_are_told_whichever_rank_fails_first(first: int, tmp_path: Path) -> None:
    (tmp_path / "failures").mkdir()
    said = [
        f"step 9: the loss is not finite ({diagnosis.ELSEWHERE}); no rank",
        "step 9: the loss is not finite (keys a",
    ]
    for number, message in enumerate(said if first else reversed(said)):
        entry = {"rank": number, "exit_code": 4, "type": "TrainingError", "message": message}
        (tmp_path / "failures" / f"{number}.json").write_text(json.dumps(entry))
    found = diagnosis.diagnose(tmp_path, "rank 0 ended with exit code 4")
    assert isinstance(found, TrainingError) and "keys a" in str(found)


@pytest.mark.parametrize(("grouped", "kind"), [(True, TransientError), (False, TrainingError)])
def test_what_comes_of_a_group_that_was_taken_away_is_no_fault(
    grouped: bool, kind: type[Exception], tmp_path: Path
) -> None:
    """Ray Train takes it from the ranks that live when it has lost one: the run starts again, as for a dead peer."""
    with suppress(AssertionError), Told(tmp_path, 1, grouped=grouped):
        raise AssertionError("DeepSpeed backend not set")
    found = diagnosis.diagnose(tmp_path, "rank 0 ended, Ray Train says ActorDiedError")
    assert type(found) is kind and ("rank 0 ended" in str(found)) is grouped


def test_that_torch_cannot_be_imported_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank that was in no group yet: nothing of torch is needed to say it."""
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with suppress(ImportError), Told(tmp_path, 0):
        raise ImportError("libnvrtc is not there")
    assert "rank 0 failed: ImportError: libnvrtc is not there" in str(diagnosis.diagnose(tmp_path, ""))
