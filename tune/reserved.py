"""What a stopped trial had reserved of the cluster, given back.

Ray kills a trial that is stopped early, and with it the controller that would have freed its ranks' placement group.
Ray Train's own remedy asks the dashboard's state API, so it does nothing where the dashboard is off: the sweep would
wait for those CPUs for ever. The driver lives on and needs no dashboard.
"""

import time
from pathlib import Path

import ray
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from mmsa_dist import launch

PATIENCE = 5.0
"""Seconds that a trial which ended has to end its ranks itself."""


class Reserved:
    """The reservations of trials that ended."""

    def __init__(self) -> None:
        self._ended: dict[Path, float] = {}

    def ended(self, folder: Path) -> None:
        """The trial in `folder` ended: what it holds in `PATIENCE` seconds from now is taken from it."""
        self._ended[folder] = time.monotonic()

    def release(self) -> None:
        """Frees what is due; quick, to be called often."""
        now = time.monotonic()
        for folder in [folder for folder, since in self._ended.items() if now - since >= PATIENCE]:
            del self._ended[folder]
            free(folder)

    def release_all(self) -> None:
        """Frees all of it, waiting until it is due."""
        while self._ended:
            time.sleep(max(0.0, min(self._ended.values()) + PATIENCE - time.monotonic()))
            self.release()


def free(folder: Path) -> None:
    """What the trial in `folder` holds, now."""
    note = folder / launch.RESERVATION
    if not note.is_file():
        return  # it held nothing, or somebody freed it
    group = PlacementGroup(ray.PlacementGroupID.from_hex(note.read_text(encoding="utf-8").strip()))
    if placement_group_table(group).get("state") not in (None, "REMOVED"):
        remove_placement_group(group)
    note.unlink(missing_ok=True)
