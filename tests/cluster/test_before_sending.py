"""What is said before a job is sent: secrets in its words, and a cluster that cannot hold it."""

import pytest

from cluster.errors import ConfigError
from cluster.secret_words import refuse
from cluster.shape import Need, Nodes, check, needed

TWO = Nodes(({"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}), fixed=True)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--tracking-uri", "postgresql://me:s3kret@host/mlflow"], "--tracking-uri holds a password within an address"),
        (["--tracking-uri=http://me:s3kret@host"], "--tracking-uri holds a password"),
        (["--data", "https://host/x.json?X-Amz-Signature=s3kret&x=1"], "--data holds a signed address"),
        (["AKIA" + "S3KRETS3KRETS3KR"], "word 2 of the command holds an AWS access key"),
        (["hf_" + "s3kretS3KRET" * 3], "word 2 of the command holds an access token"),
        (["--hub.token", "s3kret"], "--hub.token holds a secret"),
        (["--db_password=s3kret"], "--db_password holds a secret"),
        (["AWS_SECRET_ACCESS_KEY=s3kret"], "AWS_SECRET_ACCESS_KEY holds a secret"),
        (["AWS_SECRET_ACCESS_KEY=/s3kret+x="], "AWS_SECRET_ACCESS_KEY holds a secret"),
        (["--s3.secret-access-key", "/s3kret+x="], "--s3.secret-access-key holds a secret"),
        (["--tracking-uri", "mysql+pymysql://me:s3/kret@host/db"], "--tracking-uri holds a password"),
        (["--labels.options", "api_key", "s3kret"], "api_key holds a secret"),
        (["--data", "https://host/x?sig=s3kret"], "--data holds a signed address"),
        (["--data", "https://host/x?access_token=s3kret"], "--data holds a signed address"),
        (["glpat-" + "s3kretS3KRET" * 2], "word 2 of the command holds an access token"),
        (["https://s3krets3krets3krets3kret@host/x"], "word 2 of the command holds a password within an address"),
        (["-----BEGIN RSA PRIVATE KEY-----s3kret"], "word 2 of the command holds a private key"),
        (["--env=DB_PASSWORD=s3kret"], "--env holds a secret"),
    ],
)
def test_a_command_with_a_secret_is_refused_and_the_secret_not_shown(words: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as raised:
        refuse(["train", *words])
    assert str(raised.value).startswith(where) and "\n" not in str(raised.value)
    assert "s3kret" not in str(raised.value).lower()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "ufen_mtfn", "--data", "s3://bucket/mosi", "--tracking-uri", "postgresql://me@host:5432/mlflow"],
        ["train", "self_mm", "--hub.token", "/run/secrets/token", "--text.encoder", "bert-base-uncased"],
        ["cluster", "run", "--nodes", "1:4", "--", "train", "mult", "--data", "https://host:443/a@b/index.json"],
        ["sweep", "tam_ulag", "--runs-dir=/data/runs", "--workers", "1:4", "--optim.lr.text", "3e-5"],
    ],
)
def test_commands_without_one_are_not(words: list[str]) -> None:
    refuse(words)


@pytest.mark.parametrize(
    ("words", "need"),
    [
        ("train ufen_mtfn --data x", Need("rank", 1, 1, 0)),
        ("train mult --workers=2:4 --launch.cpus_per_worker 3 --launch.gpus-per-worker 0.5", Need("rank", 2, 3, 0.5)),
        ("sweep mult --workers 4 --trials 9", Need("rank", 4, 1, 0)),
        ("train mult --workers 4 --launch.min-workers=2", Need("rank", 2, 1, 0)),
        ("cluster run --nodes 2:4 --cpus 8 --gpus 1 -- train mult", Need("node", 2, 8, 1, waits=True)),
        ("train mult --launcher local --workers 99", None),
        ("train mult --launch.address other:6379 --workers 99", None),
        ("train mult --address other:6379 --workers 99", None),
        ("train mult --workers many", None),
        ("inspect /data", None),
    ],
)
def test_what_a_command_needs_is_read_from_its_words(words: str, need: Need | None) -> None:
    assert needed(words.split()) == need


def test_ranks_are_counted_node_by_node() -> None:
    assert TWO.fits(Need("rank", 1, 3, 0)) == 1 + 2, "12 CPUs, but no rank is on two nodes"
    assert TWO.fits(Need("rank", 1, 1, 1)) == 2
    assert TWO.fits(Need("rank", 1, 1, 0.5)) == 4
    assert TWO.fits(Need("rank", 1, 9, 0)) == 0
    assert str(TWO) == "1 node with 4 CPUs, 1 node with 8 CPUs and 2 GPUs"


def test_what_fits_or_is_not_known_is_sent_without_a_word() -> None:
    assert check(Need("rank", 12, 1, 0), TWO) is None
    assert check(None, TWO) is None
    assert check(Need("rank", 99, 1, 0), None) is None


def test_where_no_node_will_come_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"begins with 4 ranks x 1 CPUs and 1 GPUs, .* room for 2; use --workers 2, "):
        check(Need("rank", 4, 1, 1), TWO)
    with pytest.raises(ConfigError, match=r"room for 0; lower --launch\.cpus-per-worker"):
        check(Need("rank", 1, 16, 0), TWO)


def test_where_nodes_may_come_it_is_a_note() -> None:
    autoscaled = Nodes(TWO.each, fixed=False)
    note = check(Need("rank", 4, 1, 1), autoscaled)
    assert note and "refused unless nodes come first; put `cluster run --nodes N" in note
    note = check(Need("node", 4, 8, 0, waits=True), TWO)
    assert note and note.endswith("room for 1: it waits until there are more")
