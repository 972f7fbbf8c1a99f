"""Whether a bucket can be written to, listed and read, by the very calls that training makes.

A program for `mmsa-dist doctor`, which reads one line of JSON from it:

    python -m shards.remote.probe leave|read|forget ADDRESS TOKEN
    python -m shards.remote.probe write ADDRESS TOKEN NUMBER MIB

``leave`` writes an object that ``read`` finds from another machine and ``forget`` removes; ``write`` removes its own.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.errors import ConfigError, DataError, MmsaError, TransientError
from shards.remote.store import Patience, download, filesystem, read, with_patience
from shards.remote.url import folder_url

MIB = 2**20


class Place:
    """A folder of a bucket, to be written to.

    Raises:
        ConfigError: it is none that can be.
    """

    def __init__(self, address: str) -> None:
        self.address = folder_url(address)
        scheme = self.address.partition("://")[0]
        if scheme in ("http", "https"):
            raise ConfigError(f"{self.address}: cannot be written to; give a folder, s3://… or gs://…")
        self._fs = filesystem(scheme, Patience.of_environment().silence)

    def put(self, name: str, file: Path) -> None:
        target = f"{self.address}/{name}"

        def attempt() -> None:
            if target.startswith("file://"):
                self._fs.makedirs(self.address, exist_ok=True)
            self._fs.put_file(str(file), target)

        with_patience(target, attempt)

    def names(self, beginning: str) -> list[str]:
        def found() -> list[str]:
            try:
                return [str(path).rpartition("/")[2] for path in self._fs.glob(f"{self.address}/{beginning}*")]
            except FileNotFoundError:
                return []

        return with_patience(self.address, found)

    def remove(self, name: str) -> None:
        def attempt() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{self.address}/{name}")

        with_patience(self.address, attempt)


def leave(place: Place, token: str) -> dict[str, Any]:
    """Writes the object that others are to read."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(token.encode())
        file.flush()
        place.put(f"{token}-mark", Path(file.name))
    return {}


def look(place: Place, token: str) -> dict[str, Any]:
    """Reads it.

    Raises:
        DataError: it is not there, or another one.
    """
    if read(f"{place.address}/{token}-mark", MIB) != token.encode():
        raise DataError(f"{place.address}: another object is read than was written; name a bucket that nobody rewrites")
    return {}


def forget(place: Place, token: str) -> dict[str, Any]:
    """Removes all that the doctor with this token has written."""
    for name in place.names(token):
        place.remove(name)
    return {}


def write(place: Place, token: str, number: int, mib: int) -> dict[str, Any]:
    """Writes an object, lists it, reads it, removes it; gives the bytes a second of both ways.

    Raises:
        DataError: what was written is not listed, or read otherwise. TransientError: no room to make it.
    """
    name = f"{token}-{number}"
    try:
        with tempfile.NamedTemporaryFile() as file:
            for _ in range(mib):
                file.write(os.urandom(MIB))
            file.flush()
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            began = time.perf_counter()
            place.put(name, Path(file.name))
            written = time.perf_counter() - began
    except OSError as error:
        raise TransientError(
            f"{tempfile.gettempdir()}: {mib} MiB cannot be made there ({error.strerror}); set TMPDIR to a larger disk"
        ) from error
    try:
        if name not in place.names(token):
            raise DataError(f"{place.address}: an object that was written is not listed; let this user list the bucket")
        began = time.perf_counter()
        download(f"{place.address}/{name}", mib * MIB, digest, lambda: None, lambda piece: None)
        taken = time.perf_counter() - began
    finally:
        place.remove(name)
    return {"write_bytes_per_s": mib * MIB / written, "read_bytes_per_s": mib * MIB / taken}


def main(argv: list[str]) -> int:
    """Entry; 0, or the exit code of what went wrong, with its sentence on standard error."""
    step, address, token, *numbers = argv
    try:
        place = Place(address)
        steps = {"leave": leave, "read": look, "forget": forget}
        told = write(place, token, *map(int, numbers)) if step == "write" else steps[step](place, token)
    except MmsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
