"""What travels with a job: which files of a folder, what makes it big, and a built wheel instead."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.submit import Submit, main, packed, removed, unsent
from cluster.wheel import wheel_of
from cluster.working_dir import bulk, files_to_send, measure, write_archive

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with sources, an ignored folder and results of runs."""
    for name in ("a/code.py", "new.py", "data/big.bin", "runs/one/result.json", ".env", "a/__pycache__/code.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("/data/\n")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    return tmp_path


def test_what_git_ignores_and_what_runs_leave_stays_here(checkout: Path) -> None:
    assert [str(name) for name in files_to_send(checkout)] == [".gitignore", "a/code.py", "new.py"]


def test_a_folder_below_the_checkout_honours_it_too(checkout: Path) -> None:
    assert files_to_send(checkout / "a") == [Path("code.py")]


def test_without_git_everything_but_caches_and_results_is_sent(tmp_path: Path) -> None:
    for name in ("code.py", ".venv/x", "deep/.git/y", "deep/z.py", "mlruns/1", "runs/2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "broken").symlink_to("nowhere")
    assert [str(name) for name in files_to_send(tmp_path)] == ["code.py", "deep/z.py"]


@pytest.mark.parametrize(
    "name", [".env.local", ".ssh/id_rsa", "id_ed25519", "keys/server.pem", "tls.key", ".aws/credentials", ".netrc"]
)
def test_what_opens_something_stays_here(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert files_to_send(tmp_path) == []


def test_a_file_in_conflict_is_sent_once(checkout: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    blob = git("hash-object", "-w", "new.py")
    stages = "".join(f"100644 {blob} {stage}\tnew.py\n" for stage in (1, 2, 3))
    subprocess.run(["git", "-C", str(checkout), "update-index", "--index-info"], input=stages, text=True, check=True)
    assert git("ls-files").splitlines().count("new.py") == 3
    assert files_to_send(checkout).count(Path("new.py")) == 1


def test_a_checkout_of_which_git_says_nothing_is_refused(checkout: Path) -> None:
    """Else what its ignore files keep here would be sent."""
    (checkout / ".git" / "HEAD").write_text("damaged")
    with pytest.raises(ConfigError, match="git does not say which of its files are ignored: not a git repository"):
        files_to_send(checkout)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        files_to_send(tmp_path / "none")


def _sized(folder: Path, **sizes: float) -> None:
    """Files of so many MiB, which take no room; `__` stands for a slash, the first `_` of a name's end for its dot."""
    for name, mib in sizes.items():
        path = folder / name.replace("__", "/")
        path = path.with_name(path.name.replace("_", ".", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as sparse:
            sparse.truncate(int(mib * 2**20))


def test_too_big_is_refused_before_anything_is_sent_and_says_what_to_ignore(checkout: Path) -> None:
    _sized(checkout, shards__train_tar=600, a__weights_bin=50, code_py=0.1)
    with pytest.raises(ConfigError) as raised:
        main(["--working-dir", str(checkout), "--address", "http://127.0.0.1:1", "--", "train"])
    said = str(raised.value)
    assert (
        "holds 650.1 MiB in 6 files, at most 512.0 MiB can be sent; biggest: shards/ 600.0 MiB, a/weights.bin" in said
    )
    assert f"with these lines in {checkout / '.gitignore'}: /shards/, /a/weights.bin; put data" in said
    with (checkout / ".gitignore").open("a") as file:
        file.write("/shards/\n/a/weights.bin\n")
    assert measure(checkout, files_to_send(checkout)) < 2**20, "the advice does not help"


def test_what_git_tracks_already_is_not_kept_here_by_an_ignore_file_alone(checkout: Path) -> None:
    _sized(checkout, shards__train_tar=1)
    subprocess.run(["git", "-C", str(checkout), "add", "shards"], check=True)
    assert "/shards/ (and git rm -r --cached shards/, which git tracks)" in bulk(checkout, files_to_send(checkout))


def test_without_git_no_ignore_file_is_recommended(tmp_path: Path) -> None:
    _sized(tmp_path, shards__train_tar=600)
    with pytest.raises(
        ConfigError, match=r"biggest: shards/ 600\.0 MiB; this is no git checkout, so all of it is sent"
    ):
        main(["--working-dir", str(tmp_path), "--address", "http://127.0.0.1:1", "--", "train"])


def test_much_is_sent_with_a_note(checkout: Path) -> None:
    _sized(checkout, shards__train_tar=150)
    (note,) = packed(Submit(working_dir=checkout)).notes()
    assert note.startswith("150.0 MiB are sent, which every node fetches; biggest: shards/ 150.0 MiB")
    shutil.rmtree(checkout / "shards")
    assert not list(packed(Submit(working_dir=checkout)).notes())


def test_the_size_is_that_of_what_is_sent(checkout: Path) -> None:
    files = files_to_send(checkout)
    assert measure(checkout, files) == sum(len((checkout / name).read_text()) for name in files)


def test_the_archive_holds_the_files_and_is_the_same_every_time(checkout: Path, tmp_path: Path) -> None:
    files = files_to_send(checkout)
    (checkout / "new.py").chmod(0o755)
    write_archive(checkout, files, tmp_path / "1.zip")
    os.utime(checkout / "new.py", (1e9, 1e9))
    write_archive(checkout, files, tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == [str(name) for name in files]
        assert archive.read("a/code.py") == b"a/code.py"
        assert archive.getinfo("new.py").external_attr >> 16 & 0o111
        assert not archive.getinfo("a/code.py").external_attr >> 16 & 0o111


def test_a_path_that_stays_here_is_pointed_out(checkout: Path) -> None:
    files = files_to_send(checkout)
    command = ["train", "self_mm", "--data", "data", "--recipe=a/code.py", "--runs=runs", "--text", "/somewhere"]
    assert [note.split(" exists here")[0] for note in unsent(checkout, files, command)] == ["data", "runs"]


def test_a_word_that_is_no_path_is_none(checkout: Path) -> None:
    assert not list(unsent(checkout, [], ["train", "x" * 5000, "a\0b"]))


@pytest.mark.parametrize(
    ("command", "note"),
    [
        ("train iam --data /d", "--runs-dir is not given, so that it is within the job's copy"),
        ("cluster run --nodes 2 -- train iam --runs-dir runs", "--runs-dir runs is within the job's copy"),
        ("predict /runs/a --out p.csv", "--out p.csv is within the job's copy"),
        ("predict models:/iam/1 --out /data/p.csv", "models:/… is looked up where the job's node has MLFLOW_TRACKING_"),
        ("train iam --runs-dir=/data/runs", None),
        ("train iam --resume /data/runs/a", None),
        ("predict models:/iam/1 --out s3://b/p.csv --tracking-uri http://h:5000", None),
        ("verify s3://b/mosi", None),
        ("train --help", None),
    ],
)
def test_results_that_go_with_the_job_are_pointed_out(command: str, note: str | None) -> None:
    notes = list(removed(command.split()))
    assert len(notes) == (note is not None) and all(each.startswith(str(note)) for each in notes)


# --- a wheel ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """What is in a wheel of this project, as far as it counts here."""
    return _wheel(tmp_path / "mmsa_dist-0.1.0-py3-none-any.whl")


def _wheel(path: Path, name: str = "mmsa-dist", *more: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("mmsa_dist/__init__.py", "mmsa_dist/__main__.py", "shards/index.py", *more):
            archive.writestr(member, f"# {member} of the wheel")
        archive.writestr("mmsa_dist-0.1.0.dist-info/METADATA", f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.1.0\n")
    return path


def test_a_wheel_is_sent_instead_of_the_folder(wheel: Path) -> None:
    parcel = packed(Submit(wheel=wheel))
    assert parcel.files == [] and str(parcel) == f"{wheel.name}, 0.0 MiB"


def test_a_wheels_code_counts_where_a_folder_is_sent_too(wheel: Path, tmp_path: Path) -> None:
    for name in ("work/mmsa_dist/__main__.py", "work/mine.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of the folder")
    parcel = packed(Submit(wheel=wheel, working_dir=tmp_path / "work"))
    write_archive(parcel.folder, parcel.files, tmp_path / "sent.zip", parcel.wheel)
    with zipfile.ZipFile(tmp_path / "sent.zip") as sent:
        assert sorted(sent.namelist()) == [
            "mine.yaml", "mmsa_dist-0.1.0.dist-info/METADATA", "mmsa_dist/__init__.py", "mmsa_dist/__main__.py",
            "shards/index.py",
        ]  # fmt: skip
        assert sent.read("mmsa_dist/__main__.py") == b"# mmsa_dist/__main__.py of the wheel"


def test_of_a_folder_the_newest_wheel_is_taken(wheel: Path) -> None:
    newest = _wheel(wheel.with_name("mmsa_dist-0.0.9-py3-none-any.whl"))
    os.utime(wheel, (1e9, 1e9))
    assert wheel_of(wheel.parent) == newest


def test_what_is_no_wheel_of_this_project_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "archive.whl", "w") as archive:
        archive.writestr("code.py", "")
    _wheel(tmp_path / "numpy.whl", "numpy")
    _wheel(tmp_path / "sly.whl", "mmsa-dist", "../outside.py")
    wrong = {
        "none.whl": "there is no such file",
        "text.whl": r"not a wheel \(File is not a zip file\)",
        "archive.whl": r"not a wheel \(it lacks \*\.dist-info/METADATA\)",
        "numpy.whl": "a wheel of numpy, not of mmsa-dist",
        "sly.whl": "would lie outside the job's folder",
        "": r"there is no wheel of mmsa-dist in this folder \(mmsa_dist-\*\.whl\)",
    }
    for name, sentence in wrong.items():
        with pytest.raises(ConfigError, match=f"^--wheel {tmp_path / name}: .*{sentence}.*`python -m pip wheel"):
            main(["--wheel", str(tmp_path / name), "--address", "http://127.0.0.1:1", "--", "train"])


def test_without_our_code_it_is_said_that_the_nodes_own_runs(tmp_path: Path) -> None:
    assert str(packed(Submit(working_dir=tmp_path))) == (
        f"no files, as {tmp_path} has none (no mmsa_dist among them: the job runs the one that its node has installed)"
    )
    (tmp_path / "mine.yaml").touch()
    assert str(packed(Submit(working_dir=tmp_path))).startswith(f"1 files, 0.0 MiB, of {tmp_path} (no mmsa_dist among")
    assert "installed" not in str(packed(Submit(working_dir=ROOT)))
