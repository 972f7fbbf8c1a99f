"""A PostgreSQL of one test run: a real server in a temporary folder, on loopback, with a password."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

USER, DATABASE = "mmsa", "tracking"


@dataclass
class Postgres:
    """A server that runs.

    Attributes:
        port: on 127.0.0.1.
        password: of `USER`.
    """

    folder: Path
    port: int
    password: str
    process: subprocess.Popen[bytes]

    def uri(self, password: str | None = None, database: str = DATABASE) -> str:
        return f"postgresql://{USER}:{password or self.password}@127.0.0.1:{self.port}/{database}"


def binaries() -> Path | None:
    """The folder of ``initdb`` and ``postgres``, on the PATH or where Debian puts them; None where there is none."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


def missing() -> str:
    """Why there is no PostgreSQL to test against; empty where there is."""
    if find_spec("psycopg") is None:
        return "the driver psycopg is not installed: pip install 'mmsa-dist[postgres]'"
    if binaries() is None:
        return "no PostgreSQL server is installed: initdb is neither on the PATH nor in /usr/lib/postgresql/*/bin"
    if os.geteuid() == 0 and _other_user() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return ""


def _other_user() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@contextmanager
def started() -> Iterator[Postgres]:
    """A new server with the empty database `DATABASE`; gone afterwards."""
    place = binaries()
    assert place is not None
    user = _other_user() if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: it holds a socket
    password = secrets.token_hex(8)
    (folder / "password").write_text(password)
    if user:
        entry = pwd.getpwnam(user)
        for path in (folder, folder / "password"):
            os.chown(path, entry.pw_uid, entry.pw_gid)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def run(*words: str) -> None:
        done = subprocess.run(words, user=user, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    data = folder / "data"
    process = None
    try:
        made = ["-U", USER, "--auth=scram-sha-256", "--pwfile", str(folder / "password"), "-E", "UTF8", "--locale=C"]
        run(str(place / "initdb"), "-D", str(data), *made, "--no-sync")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [place / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-c", "fsync=off"],
                user=user, cwd=folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        server = Postgres(folder, port, password, process)
        _create_database(server)
        yield server
    finally:
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)  # its fast shutdown: clients are sent away
            process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _create_database(server: Postgres) -> None:
    """Once it answers."""
    import psycopg

    deadline = time.monotonic() + 120
    while True:
        try:
            with psycopg.connect(server.uri(database="postgres"), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {DATABASE}")
            return
        except psycopg.OperationalError:
            log = (server.folder / "log").read_text()
            assert server.process.poll() is None and time.monotonic() < deadline, log
            time.sleep(0.1)
