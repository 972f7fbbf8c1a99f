"""Where `mmsa-dist submit` sends a job: what counts as an address, and what answers there."""

from pathlib import Path

import pytest

from cluster.client import resolve_address
from cluster.errors import ConfigError
from cluster.submit import main
from tests.answering import SSH, answering, http


@pytest.mark.parametrize(
    "address",
    [
        "ray://head:10001",
        "http://",
        "http://head:port",
        "ftp://head",
        "http://head:0",
        "http://[::1",
        "http://he ad:1",
        "http://head:1?token=s3kret",
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"http://HOST:PORT") as raised:
        resolve_address(address)
    assert "s3kret" not in str(raised.value)


@pytest.mark.parametrize("address", ["http://bob:s3kret@head:8265", "bob:s3kret@head:8265", "http://s3k@ret@head:port"])
def test_a_password_in_the_address_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(ConfigError, match=r"--address …@head:.*RAY_AUTH_TOKEN_PATH") as raised:
        resolve_address(address)
    assert "s3k" not in str(raised.value) and "ret@" not in str(raised.value)


def test_the_address_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert resolve_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")
    assert resolve_address(None) == "http://other:1"
    assert resolve_address("head:2/") == "http://head:2"


@pytest.mark.parametrize(
    "answer", [SSH, http(b"{}"), http(b"[]"), http(b"<html>")], ids=["ssh", "object", "list", "page"]
)
def test_another_program_behind_the_address_is_said(
    answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "code.py").touch()
    with answering(answer) as port, pytest.raises(ConfigError, match=f"what answers at .*{port} is not a Ray head"):
        main(["--address", f"127.0.0.1:{port}", "--working-dir", str(tmp_path), "--", "systems"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--addres", "http://head:1"], "unknown option --addres; did you mean --address? (mmsa-dist submit --help"),
        (["--working_dri=."], "unknown option --working_dri; did you mean --working-dir?"),
        (["train"], "one word too many: train"),
        (["--name"], "--name: a value is missing; see mmsa-dist submit --help"),
    ],
)
def test_a_misspelt_command_line_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        main([*words, "--", "systems"])
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
