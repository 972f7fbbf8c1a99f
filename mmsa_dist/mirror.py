"""A run's checkpoints in a bucket (`checkpoint.mirror`): what is saved is there too, and what is there is gone on from.

``<address>/<run>/`` holds the run's description and ``checkpoints/step-…/``, each with its manifest sent last: without
one there is no checkpoint. Sending waits for nobody and nobody for it: a thread sends what is newest, and a bucket that
is away costs a warning.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmsa_dist import checkpoint
from mmsa_dist.errors import ConfigError, DataError
from shards.remote.store import Patience, download, filesystem, read, with_patience
from shards.remote.url import folder_url, is_url

DESCRIPTION = ("recipe.yaml", "data.json", "plan.json", "environment.json", "mlflow.json")
"""Files of a run's folder that a run on another machine goes on with."""

END = (
    "events/rank-0.jsonl", "events/driver.jsonl", "predictions/valid.npz", "predictions/test.npz", "time.json",
    "mlflow.json", "result.json",
)  # fmt: skip
"""Files that a finished run leaves, its result last: a run with a result is a finished one. Its best weights are a
checkpoint's."""

LARGEST_LEFT = 2**30
"""Bytes of a file of `END` that is brought."""

LARGEST = 16 * 2**20
"""Bytes of a manifest or of a description; more is something else."""


class Mirror:
    """One run's place in a bucket.

    Args:
        address: of the run: a folder in a bucket.

    Raises:
        ConfigError: the address cannot be one, or cannot be written to.
    """

    def __init__(self, address: str) -> None:
        self.address = folder_url(address)
        scheme = self.address.partition("://")[0]
        if scheme in ("http", "https"):
            raise ConfigError(f"checkpoint.mirror: {scheme}:// cannot be written to; give s3://, gs:// or file://")
        self._fs = filesystem(scheme, Patience.of_environment().silence)

    @classmethod
    def of(cls, address: str, folder: Path) -> "Mirror":
        """That of the run in `folder`, below `checkpoint.mirror`."""
        if not is_url(address):
            raise ConfigError(
                f"checkpoint.mirror: {address} is no address; give s3://bucket/folder, gs://bucket/folder, or "
                f"{Path(address).absolute().as_uri()} for a folder"
            )
        return cls(f"{folder_url(address)}/{folder.name}")

    def describe(self, folder: Path) -> None:
        """Sends what there is of the run's description.

        Raises:
            ConfigError: access is denied. TransientError: the bucket does not answer.
        """
        self.put_files(folder, DESCRIPTION)

    def put_files(self, folder: Path, names: tuple[str, ...]) -> None:
        """Sends those of the run's files that there are: of a finished run's `END`.

        Raises:
            MmsaError: one could not be sent.
        """
        for name in names:
            if (folder / name).is_file():
                self._send(folder / name, name)

    def put(self, path: Path, step: int) -> None:
        """Sends the checkpoint at `path`, its manifest last; over one of the same step that an earlier attempt sent.

        Raises:
            MmsaError: it could not be sent.
        """
        place = f"checkpoints/step-{step:08d}"
        files = sorted(file.name for file in path.iterdir() if file.name != checkpoint.MANIFEST)
        self._remove(f"{place}/{checkpoint.MANIFEST}")
        for name in [*files, checkpoint.MANIFEST]:
            self._send(path / name, f"{place}/{name}")

    def keep(self, steps: set[int]) -> None:
        """Removes all other checkpoints, their manifests first; also what a kill left of one that was being sent."""
        folders = self._found("") if self.address.startswith("file://") else set[int]()  # a bucket has none
        for step in (folders | self._found("/*")) - steps:
            place = f"checkpoints/step-{step:08d}"
            for name in (checkpoint.MANIFEST, *checkpoint.FILES):
                self._remove(f"{place}/{name}")
            if step in folders:
                with suppress(OSError):
                    self._fs.rmdir(f"{self.address}/{place}")

    def steps(self) -> set[int]:
        """Steps of which there is a whole checkpoint."""
        return self._found(f"/{checkpoint.MANIFEST}")

    def _found(self, file: str) -> set[int]:
        """Steps in whose folders there is `file`, a slash and a name or ``*``; '' for all folders."""

        def found() -> list[str]:
            try:
                return list(self._fs.glob(f"{self.address}/checkpoints/step-*{file}"))
            except FileNotFoundError:
                return []

        places = (re.search(r"/checkpoints/step-(\d+)(/[^/]+)?$", name) for name in with_patience(self.address, found))
        return {int(place[1]) for place in places if place}

    def restore(self, folder: Path) -> int | None:
        """Brings the newest checkpoint into the run's `folder`, where it is newer than what is there and whole, and the
        best one where that is missing or damaged; gives the newest step that was brought, None for nothing.

        Raises:
            DataError: what is there is damaged. ConfigError, TransientError: it cannot be read.
        """
        held, saved = self.steps(), folder / "checkpoints"
        if not held:
            return None
        newer = [path for path in checkpoint.saved(saved) if checkpoint.step_of(path) >= max(held)]
        newer = [path for path in newer if checkpoint.damage(path) is None]
        brought = None if newer else max(held)
        best = checkpoint.best_step(newer[-1] if brought is None else self._bring(brought, folder))
        if best and (brought or best in held) and checkpoint.damage(checkpoint.step_folder(saved, best)):
            self._bring(best, folder)
            return brought or best
        return brought

    def bring_description(self, folder: Path) -> None:
        """Brings the run's description into `folder`, its recipe last: a folder without one is no run.

        Raises:
            DataError: there is none.
        """
        for name in reversed(DESCRIPTION):
            try:
                content = read(f"{self.address}/{name}", LARGEST)
            except DataError:
                if name == "recipe.yaml":
                    raise DataError(f"{self.address}: there is no run (no recipe.yaml)") from None
                continue
            (folder / name).write_bytes(content)

    def bring_end(self, folder: Path) -> None:
        """Brings what a finished run left, its best weights too, where `folder` has no result and the mirror has one.

        Raises:
            DataError: it is damaged. ConfigError, TransientError: it cannot be read.
        """
        if (folder / END[-1]).is_file() or self._read(END[-1]) is None:
            return
        self.restore(folder)
        saved = [path for path in checkpoint.saved(folder / "checkpoints") if checkpoint.damage(path) is None]
        if saved and (best := checkpoint.best_step(saved[-1])):
            checkpoint.keep_weights(checkpoint.step_folder(folder / "checkpoints", best), folder / "best")
        for name in END:
            if (content := self._read(name)) is not None:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)

    def _read(self, name: str) -> bytes | None:
        """A file of a finished run, None where it is not there."""
        with suppress(DataError):
            return read(f"{self.address}/{name}", LARGEST_LEFT)
        return None

    def _bring(self, step: int, folder: Path) -> Path:
        target = checkpoint.step_folder(folder / "checkpoints", step)
        place = f"{self.address}/checkpoints/{target.name}"
        partial = target.with_name(f".partial-{target.name}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            content = read(f"{place}/{checkpoint.MANIFEST}", LARGEST)
            for name in checkpoint.FILES:
                entry = _entry(content, name, place)
                with (partial / name).open("wb") as file:

                    def anew(file: Any = file) -> None:
                        file.seek(0)
                        file.truncate()

                    download(f"{place}/{name}", entry[0], entry[1], anew, file.write)
            (partial / checkpoint.MANIFEST).write_bytes(content)
            if target.exists():  # it is damaged
                checkpoint.put_aside(target)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return target

    def _send(self, file: Path, name: str) -> None:
        target = f"{self.address}/{name}"

        def attempt() -> None:
            if target.startswith("file://"):
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(file), target)

        with_patience(target, attempt)

    def _remove(self, name: str) -> None:
        def attempt() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{self.address}/{name}")

        with_patience(self.address, attempt)


def _entry(manifest: bytes, name: str, place: str) -> tuple[int, str]:
    """Size and sha256 of a file, of its manifest."""
    try:
        entry = json.loads(manifest)["files"][name]
        return int(entry["bytes"]), str(entry["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}/{checkpoint.MANIFEST}: cannot be read; remove {place}") from error


class Sender:
    """Sends checkpoints in a thread. What is newer takes the place of what waits, but for the best one.

    Args:
        saved: checkpoints of the run that are on the disk already; an earlier attempt may not have sent them.
        warn: is told, in that thread, of what could not be sent.
    """

    def __init__(self, mirror: Mirror, saved: list[Path], warn: Callable[[str], None]) -> None:
        self._mirror, self._warn = mirror, warn
        self._waiting = {checkpoint.step_of(path): _held(path) for path in saved}
        self._wanted = set(self._waiting)
        self._perhaps_sent = set(self._waiting)
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._work, name="send-checkpoints", daemon=True)
        self._thread.start()

    def offer(self, path: Path, best_step: int | None) -> None:
        """A checkpoint that is whole on the disk; it may be removed there as soon as this returns."""
        step = checkpoint.step_of(path)
        try:
            held = _held(path)
        except OSError as error:  # it is whole on the disk all the same
            self._warn(f"checkpoint of step {step:,} is not in the mirror: {path.parent}: {error.strerror or error}")
            return
        with self._changed:
            self._wanted = {step, *([best_step] if best_step else [])}
            for other in self._waiting.keys() - self._wanted:
                shutil.rmtree(self._waiting.pop(other), ignore_errors=True)
            self._waiting[step] = held
            self._changed.notify()

    def close(self, alive: Callable[[], object] = lambda: None) -> None:
        """Until all that was offered is sent, or could not be.

        Args:
            alive: is called every second meanwhile: a bucket that takes its time is no standstill.
        """
        with self._changed:
            self._over = True
            self._changed.notify()
        while self._thread.is_alive():
            self._thread.join(1.0)
            alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._over)
                if not self._waiting:
                    return
                step = min(self._waiting)
                path, wanted = self._waiting.pop(step), set(self._wanted)
            try:
                if step not in self._perhaps_sent or step not in self._mirror.steps():
                    self._mirror.put(path, step)
                self._perhaps_sent.discard(step)
                self._mirror.keep(wanted)
            except Exception as error:  # also one that is not ours: the next checkpoint is tried, whatever it is
                self._warn(f"checkpoint of step {step:,} is not in the mirror: {error}")
            shutil.rmtree(path, ignore_errors=True)


def _held(path: Path) -> Path:
    """The same checkpoint under a name at which nobody removes it but the sender, or a restart."""
    held = path.with_name(f".partial-send-{path.name}")
    shutil.rmtree(held, ignore_errors=True)
    held.mkdir()
    for file in path.iterdir():
        checkpoint.link_or_copy(file, held / file.name)
    return held
