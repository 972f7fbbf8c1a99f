"""`mmsa-dist pack`, `inspect` and `verify` as a user calls them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmsa_dist.__main__ import main
from shards.index import Index
from shards.progress import track
from tests.shards.pickles import content, written
from tests.shards.test_sources_table import arrays, table, write_csv, write_npz


def test_the_readme_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    assert main(["pack", "generated", "--like", "mosi", "--samples", "20", "--out", out]) == 0
    captured = capsys.readouterr()
    assert "synthetic-mosi: train 12, valid 2, test 6 samples; text 768, audio 5, vision 20; 3 shards" in captured.out
    assert f"see what is inside with: mmsa-dist inspect {out}" in captured.out
    assert "note: synthetic data: results on it say nothing about sentiment" in captured.err
    assert main(["inspect", out]) == 0
    assert "SYNTHETIC" in capsys.readouterr().out
    assert main(["verify", out]) == 0


def test_pack_mmsa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path, content()), tmp_path / "set"
    argv = ["pack", "mmsa", str(path), "--out", str(out), "--name", "mine", "--dtype", "float32"]
    assert main([*argv, "--seed", "5", "--modalities", "text", "vision", "--label-range", "-4", "4"]) == 0
    index = Index.load(out)
    assert (index.name, index.dtype, index.seed, index.label_range) == ("mine", "float32", 5, (-4, 4))
    assert list(index.modalities) == ["text", "vision"]
    assert main(argv) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    assert list(Index.load(out).modalities) == ["text", "audio", "vision"]


def test_pack_table(tmp_path: Path) -> None:
    csv, npz = write_csv(tmp_path, table()), write_npz(tmp_path, arrays())
    yaml, out = tmp_path / "columns.yaml", tmp_path / "set"
    yaml.write_text("audio: sound\nlabel: y\n")
    argv = ["pack", "table", str(csv), str(npz), "--columns", str(yaml), "--label", "label", "--out", str(out)]
    assert main(argv) == 0
    index = Index.load(out)
    assert (index.splits, list(index.modalities)) == ({"train": 12, "valid": 6, "test": 6}, ["audio"])
    assert main(["pack", "table", str(csv), "--out", str(tmp_path / "words"), "--id", "video_id", "clip_id"]) == 0
    assert Index.load(tmp_path / "words").modalities == {}


def test_shard_size_is_in_megabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    assert main(["pack", "generated", "--samples", "40", "--shard-size", "0.5", "--out", str(out)]) == 0
    sizes = [shard.bytes for shard in Index.load(out).shards if shard.split == "train"]
    assert len(sizes) > 1
    assert all(0.6 * 2**19 < size < 1.3 * 2**19 for size in sizes)  # the 40 samples differ, and so do their shards
    assert main(["pack", "generated", "--shard-size", "0", "--out", str(tmp_path / "other")]) == 2
    assert "expected a number of megabytes above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("generated --shard-size nan", "--shard-size nan: expected a number of megabytes above 0; 64 is the default"),
        ("generated --shard-size inf", "--shard-size inf: expected a number of megabytes"),
        ("generated --seed -1", "--seed -1: a seed is 0 or more"),
        ("generated --workers -1", "--workers -1: expected a number of processes, 0 or more"),
        ("generated --address 10.0.0.1:6379", "--address 10.0.0.1:6379 is that of a Ray cluster; add --ray"),
        ("generated --ray --workers 2", "--workers are processes of this machine, --ray packs on a cluster; leave"),
        ("mmsa x.pkl --label-range -inf inf", "--label-range -inf inf: expected two numbers, the lower one first"),
        ("mmsa x.pkl --label-range 3 -3", "--label-range 3 -3: expected two numbers"),
        ("table x.csv --label-range nan nan", "--label-range nan nan: expected two numbers"),
        ("table x.csv --label-range 0 0", "--label-range 0 0: expected two numbers"),
    ],
)
def test_a_number_that_no_packing_can_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, said: str
) -> None:
    assert main(["pack", *argv.split(), "--out", str(tmp_path / "set")]) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_a_wrong_format_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "genrated", "--out", "x"]) == 2
    assert "unknown format 'genrated'; did you mean 'generated'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "pack generated --sampels 5 --out x",
            "unknown option --sampels; did you mean --samples? (mmsa-dist pack generated --help lists all)",
        ),
        (
            "pack folder label.csv f --otu x",
            "unknown option --otu; did you mean --out? (mmsa-dist pack folder --help lists all)",
        ),
        ("pack generated --like", "--like: a value is missing; see mmsa-dist pack generated --help"),
        (
            "pack generated --like msoi --out x",
            "--like msoi: there is none such; did you mean 'mosi'? (valid: iemocap, mosei, mosi, sims)",
        ),
        ("pack mmsa", "FILE.pkl, --out missing; see mmsa-dist pack mmsa --help"),
        ("inspect x y", "one word too many: y (mmsa-dist inspect --help lists all)"),
        ("verify", "FOLDER missing; see mmsa-dist verify --help"),
        ("verify --all", "FOLDER: a value is missing; see mmsa-dist verify --help"),
        ("unpack x", "--to missing; see mmsa-dist unpack --help"),
        ("index a.tar --label-range 1", "--label-range '1': expected FLOAT FLOAT"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


FLAGS = {
    "pack mmsa": (
        "--address --dtype --help --label-range --modalities --name --out --overwrite --ray --seed --shard-size "
        "--workers"
    ),
    "pack table": (
        "--address --audio --columns --dtype --help --hold-out-valid --id --id-array --label --label-audio "
        "--label-range --label-text --label-vision --name --out --overwrite --ray --seed --shard-size --split --text "
        "--text-features --video --vision --workers"
    ),
    "pack mult": "--address --dtype --help --modalities --name --out --overwrite --ray --seed --shard-size --workers",
    "pack generated": (
        "--address --dtype --help --like --name --out --overwrite --ray --samples --seed --shard-size --workers"
    ),
    "inspect": "--fast --help --json --picture",
    "verify": "--help --shards",
    "unpack": "--help --layout --overwrite --to",
}
"""A new flag is a decision: it is made here."""


@pytest.mark.parametrize("command", FLAGS)
def test_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "default: None" not in said and "default: )" not in said  # the help says in words what happens then
    assert sorted(set(re.findall(r"^[│ ]{1,4}(?:-h, )?(--[a-z][a-z-]*)", said, re.MULTILINE))) == FLAGS[command].split()


def test_pack_without_a_format_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("mmsa FILE.pkl", "table FILE.csv", "generated"))
    assert main(["pack"]) == 2


def test_data_commands_import_nothing_heavy() -> None:
    program = (
        "import sys, shards.cli, shards.write, shards.inspect, shards.verify, shards.sources.mmsa, "
        "shards.sources.table, shards.sources.generated, shards.sources.mult, shards.unpack; "
        "print([m for m in ('torch', 'ray', 'mlflow', 'deepspeed', 'transformers', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


def test_progress_is_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.progress.SECONDS_BETWEEN_LINES", 0.0)
    assert list(track(range(4), 4, "packing train")) == [0, 1, 2, 3]
    assert list(track(iter("ab"), None, "reading")) == ["a", "b"]
    said = capsys.readouterr().err.splitlines()
    counted = [*(f"packing train: {n}/4 ({25 * n} %)" for n in range(4)), "packing train: done"]
    assert said == [*counted, "reading: 0", "reading: 1", "reading: done"]


def test_inspect_json_is_one_document(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert main(["pack", "generated", "--samples", "6", "--like", "sims", "--out", str(out)]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "mmsa_dist", "inspect", str(out), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    told = json.loads(done.stdout)
    assert (told["synthetic"], told["tasks"]) == (True, ["M", "T", "A", "V"])
