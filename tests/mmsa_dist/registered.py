"""Versions made of one really trained and registered model, each with files of its own that a test may spoil."""

import shutil
from pathlib import Path

from mmsa_dist.tracking.fetch import located_version, version_of
from mmsa_dist.tracking.version import Version
from tests.mmsa_dist.conftest import Tracked

NAMES = iter(f"model-{n}" for n in range(10_000))


def fresh(tracked: Tracked) -> str:
    """The name of a new registered model without versions."""
    name = next(NAMES)
    tracked.client.create_registered_model(name)
    return name


def register(tracked: Tracked, name: str, into: Path, **tags: str | None) -> tuple[Version, Path]:
    """Another version of `name`, like the tracked one, and the folder of its files, a copy below `into`.

    Args:
        tags: tags that differ, a dot written as two underscores; None leaves one out.
    """
    source = version_of(tracked.client, "tiny", "1")
    place = Path(located_version(tracked.client, source).place.removeprefix("file://"))
    files = into / f"{name}-{len(list(into.iterdir()))}"
    shutil.copytree(place, files)
    changed = {key.replace("__", "."): value for key, value in tags.items()}
    kept = {
        key: value
        for key, value in {**source.tags, **changed}.items()
        if value is not None and not key.startswith("promoted.")
    }
    made = tracked.client.create_model_version(name, str(files), source.run_id, kept, description=source.description)
    return version_of(tracked.client, name, str(made.version)), files


def holder(tracked: Tracked, name: str, alias: str = "champion") -> str | None:
    """The version that holds the alias."""
    found = tracked.client.get_registered_model(name).aliases.get(alias)
    return None if found is None else str(found)
