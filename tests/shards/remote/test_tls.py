"""Servers that are spoken to by TLS: a certificate that is not trusted is said to be so, once; one that is, is read."""

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shards.errors import ConfigError
from shards.index import Index
from shards.remote import store
from shards.remote.store import read
from tests.shards.made import packed, utterances
from tests.shards.remote import servers

ROOT = Path(__file__).parents[3]
LOOPBACK = x509.IPAddress(ip_address("127.0.0.1"))
ELSEWHERE = x509.DNSName("elsewhere.example")
NOT_TRUSTED = "the server's certificate is not trusted; see SSL_CERT_FILE, for S3 AWS_CA_BUNDLE"


def self_signed(path: Path, host: x509.GeneralName = LOOPBACK, days: float = 1) -> Path:
    """A certificate that nobody signed but itself, good for so many days from yesterday, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "owner")])
    begin = datetime.now(UTC) - timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([host]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(pem) + private)
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("certificate") / "own.pem", days=2)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return packed(tmp_path_factory.mktemp("packed") / "made", utterances({"train": 20}), shard_bytes=20_000)


def test_a_certificate_that_nobody_vouches_for(
    local: Index, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMSA_REMOTE_BACKOFF", "30")  # a second try would be seen by its pause alone
    began = time.monotonic()
    with servers.web(local.folder, certificate) as server:
        with pytest.raises(ConfigError) as error:
            Index.load(server.url)
        assert str(error.value) == f"{server.url}/index.json: {NOT_TRUSTED}"
        assert server.connections == 1 and not server.gets
    assert time.monotonic() - began < 15
    assert error.value.__context__ is None, "no library's words in the chain"


def test_a_certificate_that_the_user_vouches_for(local: Index, certificate: Path) -> None:
    """The variable is read when Python loads its certificates: in a process of its own."""
    with servers.web(local.folder, certificate) as server:
        command = [sys.executable, "-m", "tests.shards.remote.reading", server.url, "5"]
        environment = {**os.environ, "SSL_CERT_FILE": str(certificate)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        used = [local.shards[n] for n in local.shards_of("train")]
        assert len(used) > 1
        assert server.gets == {name: 1 for shard in used for name in (shard.url, shard.table)} | {"index.json": 1}


@pytest.mark.parametrize("wrong", ["", "nobody vouches for it", "it is of another host", "it is out of date"])
def test_an_s3_endpoint_with_a_certificate(
    tmp_path: Path, certificate: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "o.json").write_bytes(b"{}")
    if wrong == "it is of another host":
        certificate = self_signed(tmp_path / "other.pem", ELSEWHERE, days=2)
    if wrong == "it is out of date":
        certificate = self_signed(tmp_path / "old.pem", days=0.5)
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    if wrong != "nobody vouches for it":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    with servers.web(tmp_path, certificate) as server:
        for name, value in (("ENDPOINT_URL", server.url), ("ACCESS_KEY_ID", "AKIA1"), ("SECRET_ACCESS_KEY", "hush")):
            monkeypatch.setenv(f"AWS_{name}", value)
        store._filesystem.cache_clear()  # the environment is another
        if not wrong:
            assert read("s3://bucket/o.json", 100) == b"{}"
            return
        with pytest.raises(ConfigError) as error:
            read("s3://bucket/o.json", 100)
        assert str(error.value) == f"s3://bucket/o.json: {NOT_TRUSTED}"
        assert server.connections == 1 and not server.gets
    assert error.value.__context__ is None
