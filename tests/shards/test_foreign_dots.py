"""Keys with dots, which WebDataset cuts: none is lost without a word, and members that have dots are left alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmsa_dist.__main__ import main
from shards.errors import DataError
from tests.shards.foreign import arrays, described, indexed, members, npy, read, write_tar

ARRAY = npy(np.ones((2, 5), np.float32))


@pytest.mark.parametrize(
    ("keys", "transcripts", "said"),
    [
        ([f"vid.{n}" for n in range(20)], True, "(vid.0): WebDataset cuts at the first dot"),
        ([f"v{n // 5}.{n % 5}" for n in range(50)], False, "(v0.0): WebDataset"),
        ([f"v{n}.{n}" for n in range(3)], True, "(v0.0): WebDataset"),
        (["film_1.5_2.0", "film_2.5_7.0"], True, "(film_1.5_2): WebDataset"),
        (["talk.anna", "talk.ben"], True, "(talk.anna): WebDataset"),
        (["plain", "vid", "vid.1", "vid.2"], True, "(vid.1): WebDataset"),
    ],
)
def test_keys_with_dots(tmp_path: Path, keys: list[str], transcripts: bool, said: str, capsys: Any) -> None:
    told = described(0.5, "words") if transcripts else {"json": b'{"label": 0.5}'}
    write_tar(tmp_path / "train.tar", [(key, members(arrays(np.random.default_rng(0)), "npy") | told) for key in keys])
    assert main(["index", str(tmp_path)]) == 3
    error = capsys.readouterr().err
    assert f"train.tar: the keys seem to contain dots {said}" in error and "; write " in error
    assert [path.name for path in tmp_path.iterdir()] == ["train.tar"]


def test_keys_with_dots_far_behind(tmp_path: Path) -> None:
    sample = {"audio.npy": ARRAY} | described(0.5, "words")
    keys = [f"v{n}" for n in range(100)] + ["late.1", "late.2"]
    write_tar(tmp_path / "train.tar", [(key, sample) for key in keys])
    with pytest.raises(DataError, match=r"\(late\.1\)"):
        indexed(tmp_path, allow_absent=True)


@pytest.mark.parametrize(
    ("more", "options"),
    [
        (("224.jpg", "1.png", "2.png"), {}),
        (("16000.npy",), {}),
        (("left.npy", "right.npy"), {}),
        (("left.npy", "left.json", "right.npy", "right.json"), {}),
        (("text.npy", "text.json", "audio.json", "vision.npy", "vision.json"), {}),
        (("0.audio.npy", "0.json", "1.audio.npy", "1.json"), {"vision": "0.audio.npy"}),
    ],
)
def test_members_with_dots(tmp_path: Path, more: tuple[str, ...], options: dict[str, Any]) -> None:
    extra = {name: b"{}" if name.endswith("json") else ARRAY for name in more}
    sample = {"audio.npy": ARRAY} | described(0.5, "words") | extra
    write_tar(tmp_path / "train.tar", [(f"v{n}", sample) for n in range(3)])
    assert list(read(indexed(tmp_path, **options))) == ["v0", "v1", "v2"]


def test_numbered_members_that_an_option_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [(f"v{n}", {"0.npy": ARRAY, "1.npy": ARRAY, "2.txt": b"1"}) for n in range(3)])
    with pytest.raises(DataError, match=r"if they are members of one sample, say which is what, e\.g\. --audio 0\.npy"):
        indexed(tmp_path)
    assert len(read(indexed(tmp_path, audio="0.npy", label="2.txt"))) == 3
