"""Who holds an alias: it moves to another version here and nowhere else, and the version remembers how it got it."""

import getpass
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mmsa_dist.errors import ConfigError
from mmsa_dist.metrics import is_better
from mmsa_dist.report import value_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROMOTED = "promoted."
"""Begins the tags of a version that tell of its last promotion to an alias: ``promoted.champion.at``, ``.by``,
``.from`` (version that held the alias, or none), ``.forced``, ``.reason``, ``.failed`` (checks that were overruled)."""

NOBODY = "none"
MOMENT = 30.0
"""Seconds within which promotions are of the same moment: from a record to the move of the alias, and clocks apart."""


def check_alias(alias: str) -> None:
    """Says before any work that MLflow takes no such alias.

    Raises:
        ConfigError: it does not.
    """
    if not re.fullmatch(r"[\w-]{1,255}", alias) or alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise ConfigError(
            f"--alias {alias!r}: MLflow takes letters, digits, '-' and '_', and neither `latest` nor names like `v1`, "
            "which mean versions; e.g. champion"
        )


def promote_better(client: "MlflowClient", name: str, version: str, alias: str, monitor: str) -> str | None:
    """Moves `alias` to `version`, which was just trained, unless the version that has it did better on validation of
    the same data.

    Of two runs that end together the better one keeps it: whoever moves last sees the other's record.

    Args:
        monitor: validation metric to compare by; each version carries its own as the tag ``valid.<metric>``.

    Returns:
        None where `version` has the alias now; otherwise why not, in a sentence.
    """
    before = records(client, name, alias)
    for _ in range(3):
        holder = holder_of(client, name, alias)
        if holder == version:
            break
        if holder is not None and (note := _better(client, name, version, holder, alias, monitor)):
            return note
        reason = "asked for when it was trained"
        if holder is not None and not _comparable(client, name, version, holder):
            reason += f"; not compared with version {holder}, which learnt from other data"
        move(client, name, version, alias, holder, reason=reason)
    better = put_right(
        client, name, alias, version, before, lambda mine, its: _better(client, name, mine, its, alias, monitor)
    )
    return better[1] if better else None


def records(client: "MlflowClient", name: str, alias: str) -> dict[str, dict[str, str]]:
    """What each version remembers of its last promotion to `alias`."""
    from mmsa_dist.tracking.fetch import versions_of

    return {
        version.number: {key: value for key, value in version.tags.items() if key.startswith(f"{PROMOTED}{alias}.")}
        for version in versions_of(client, name)
    }


def put_right(
    client: "MlflowClient",
    name: str,
    alias: str,
    version: str,
    before: Mapping[str, Mapping[str, str]],
    kept: Callable[[str, str], str | None],
) -> tuple[str, str] | None:
    """After a move of `alias` to `version`: gives it to the best of those that were promoted in the same moment.

    MLflow has no way to move an alias only if it is where it was. But a promotion is recorded before the alias moves,
    and whoever moves it looks at the records once more, until what they moved it to is the best of all recorded. So
    the last move of all, whoever made it, has seen every record, and is to the best.

    Args:
        before: `records` when `version` was judged. What was recorded within a `MOMENT` may have been recorded by then
            and its alias not yet moved, so it counts all the same.
        kept: of two versions, why the second keeps the alias; None where it does not.

    Returns:
        None where `version` is the best; otherwise the one that is, and why.
    """
    moved_to = version
    while True:
        best, why = version, ""
        for rival, record in records(client, name, alias).items():
            new = record != before.get(rival, {}) or _lately(record.get(f"{PROMOTED}{alias}.at"))
            if rival != version and new and (note := kept(best, rival)):
                best, why = rival, note
        if best == moved_to:
            return None if best == version else (best, kept(version, best) or why)
        client.set_registered_model_alias(name, alias, best)
        moved_to = best


def _lately(at: str | None) -> bool:
    try:
        return at is not None and abs((datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()) < MOMENT
    except (ValueError, TypeError):  # written by somebody else
        return False


def holder_of(client: "MlflowClient", name: str, alias: str) -> str | None:
    """The version that holds `alias` now."""
    holder = client.get_registered_model(name).aliases.get(alias)
    return None if holder is None else str(holder)


def move(
    client: "MlflowClient",
    name: str,
    version: str,
    alias: str,
    holder: str | None,
    *,
    reason: str | None = None,
    failed: Sequence[str] = (),
) -> None:
    """Records the promotion on `version`, then moves `alias` to it: no alias stands where nobody knows why.

    Args:
        holder: the version that holds it now.
        failed: checks that did not pass and were overruled.
    """
    told = {
        "at": datetime.now(UTC).isoformat(timespec="microseconds"),
        "by": user(),
        "from": holder or NOBODY,
        "forced": str(bool(failed)).lower(),
        **({"reason": reason} if reason else {}),
        **({"failed": "; ".join(failed)} if failed else {}),
    }
    tags = {f"{PROMOTED}{alias}.{key}": value for key, value in told.items()}
    before = client.get_model_version(name, version).tags
    for key in before.keys() - tags.keys():
        if key.startswith(f"{PROMOTED}{alias}."):  # of an earlier promotion
            client.delete_model_version_tag(name, version, key)
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_alias(name, alias, version)


def user() -> str:
    """Who runs this, as the system knows them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container that has no name for the user's number
        return "unknown"


def _comparable(client: "MlflowClient", name: str, version: str, holder: str) -> bool:
    mine, its = (client.get_model_version(name, v).tags.get("data.fingerprint") for v in (version, holder))
    return bool(mine == its)


def _better(client: "MlflowClient", name: str, version: str, holder: str, alias: str, monitor: str) -> str | None:
    """Why `holder` keeps the alias; None where it does not. Versions of other data cannot be compared."""
    mine, its = (client.get_model_version(name, v).tags for v in (version, holder))
    if mine.get("data.fingerprint") != its.get("data.fingerprint"):
        return None
    new, old = (float(tags[f"valid.{monitor}"]) if f"valid.{monitor}" in tags else None for tags in (mine, its))
    if old is None or not is_better(monitor, old, new):
        return None
    shown = value_text(monitor, new)
    return (
        f"{alias} stays with version {holder} of {name}: its validation {monitor} {value_text(monitor, old)} on the "
        f"same data is better than {shown} of version {version}; to move it all the same: "
        f"mmsa-dist promote {name} --version {version} --alias {alias} --force --reason WHY"
    )
