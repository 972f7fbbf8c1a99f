"""`mmsa-dist promote`: an alias moves to another version, through the checks of `gate`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mmsa_dist.errors import ConfigError, MmsaError, TrainingError, TransientError
from shards.command_line import parsed
from shards.options import Flag, option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow import MlflowClient

    from mmsa_dist.registered.gate import Check
    from mmsa_dist.tracking.version import Version

DESCRIPTION = """Moves an alias to a version of a registered model, once it has passed four checks:
  metadata     signature, input example and its answers, recipe, data fingerprint, code version, validation and test
               metrics and model card are there
  validation   on validation it does at least as well as the version that holds the alias, on the same data
  load test    it loads from the registry in a process of its own, with the code that it carries and without any pickle
  answers      to its input example it answers what it answered when it was registered, to 1e-5

Each check prints a line. Where one fails nothing is moved: exit code 2 where the version is not the one to promote, 4
where the model does not load or answers otherwise. --force moves the alias all the same. Who did it, when, why and in
spite of what is kept as tags of the version: promoted.ALIAS.by, .at, .from, .reason, .forced, .failed.

Examples:
  mmsa-dist promote ufen_mtfn --version 3 --alias champion
  mmsa-dist promote ufen_mtfn --version 3 --alias champion --dry-run
  mmsa-dist promote ufen_mtfn --version 2 --alias champion --force --reason 'version 3 was trained on a wrong split'"""


@dataclass(frozen=True)
class Options:
    """What to move, and where."""

    name: Annotated[tyro.conf.Positional[str], option("NAME")]
    """The registered model; `mmsa-dist models` lists them."""
    version: Annotated[str, option("V")]
    """The version that is to get the alias; `mmsa-dist models NAME` lists them."""
    alias: Annotated[str, option("ALIAS")]
    """The alias to move, e.g. champion."""
    force: Flag = False
    """Move it in spite of checks that fail; which those were is recorded."""
    reason: Annotated[str | None, option("TEXT")] = None
    """Why, for those who come later; recorded."""
    dry_run: Flag = False
    """Make the checks and move nothing; the exit code is that of a promotion without --force."""
    tracking_uri: Annotated[str | None, option("URI")] = None
    """MLflow store. Unset: MLFLOW_TRACKING_URI, else the sqlite file in the folder of the runs."""
    runs_dir: Annotated[Path, option("FOLDER")] = Path("runs")
    """Folder of the runs."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist promote`."""
    options = parsed(Options, argv, "mmsa-dist promote", DESCRIPTION, twins=False)
    from mmsa_dist.tracking import aliases, store
    from mmsa_dist.tracking.fetch import opened, version_of
    from shards.progress import console

    aliases.check_alias(options.alias)
    uri, client = opened(options.tracking_uri, options.runs_dir, f"model {options.name!r}")
    with store.said(uri):
        version = version_of(client, options.name, options.version)
        before = aliases.records(client, options.name, options.alias)
        held = aliases.holder_of(client, options.name, options.alias)
        holder = version_of(client, options.name, held) if held else None
    failed = [check for check in _checks(uri, client, version, holder, options.alias) if not check.passed]
    if failed and (options.dry_run or not options.force):
        raise _refusal(version, options.alias, failed, options.dry_run)
    if options.dry_run:
        console.print(f"{version.address} may become {options.alias}; nothing was moved (--dry-run)", soft_wrap=True)
    elif held == version.number:
        console.print(f"{version.address} holds {options.alias} already; nothing was moved", soft_wrap=True)
    else:
        with store.said(uri):
            _move(client, version, options, held, failed)
            _put_right(client, version, options, before)
        was = f", which version {held} held" if held else ""
        spite = f", in spite of: {', '.join(check.name for check in failed)} (recorded)" if failed else ""
        console.print(f"{version.address} is {options.alias} now{was}{spite}", soft_wrap=True)
    return 0


def _checks(
    uri: str, client: "MlflowClient", version: "Version", holder: "Version | None", alias: str
) -> "list[Check]":
    """All checks of `version`, each printed when it is done."""
    from mmsa_dist.registered import gate
    from mmsa_dist.tracking import store
    from mmsa_dist.tracking.fetch import download, located_version
    from shards.progress import console

    made = []
    with tempfile.TemporaryDirectory(prefix="mmsa-") as scratch:
        with store.said(uri):
            place = located_version(client, version).place
            (Path(scratch) / "model").mkdir()
            folder = download(uri, version.address, place, f"{scratch}/model")
        for check in gate.checks(version, holder, alias, folder, Path(scratch)):
            console.print(str(check), soft_wrap=True)
            made.append(check)
    return made


def _refusal(version: "Version", alias: str, failed: "list[Check]", dry_run: bool) -> MmsaError:
    """Why `version` does not get the alias, and what to do; the error that fits the worst of it."""
    error = TrainingError if any(check.error is TrainingError for check in failed) else ConfigError
    reasons = "; ".join(f"{check.name}: {check.found}" for check in failed)
    remedies = "; ".join(dict.fromkeys(check.remedy for check in failed))
    done = "holds" if alias in version.aliases else "may not become" if dry_run else "does not become"
    return error(
        f"{version.address} {done} {alias}{', and would not get it now' * (done == 'holds')}; nothing was moved: "
        f"{reasons}. To do: {remedies}; or --force with a --reason, which is recorded"
    )


def _move(
    client: "MlflowClient", version: "Version", options: Options, held: str | None, failed: "list[Check]"
) -> None:
    """Moves the alias, if it is still where it was when the checks began.

    Raises:
        TransientError: somebody else moved it since.
    """
    from mmsa_dist.tracking import aliases

    now = aliases.holder_of(client, version.name, options.alias)
    if now != held:
        raise TransientError(
            f"{options.alias} of {version.name} went from version {held or aliases.NOBODY} to {now or aliases.NOBODY} "
            "while the checks ran; nothing was moved: promote again"
        )
    told = [f"{check.name}: {check.found}" for check in failed]
    aliases.move(client, version.name, version.number, options.alias, held, reason=options.reason, failed=told)


def _put_right(
    client: "MlflowClient", version: "Version", options: Options, before: "Mapping[str, Mapping[str, str]]"
) -> None:
    """Gives the alias to a version that was promoted in the same moment and that `version` does not come up to.

    Args:
        before: `aliases.records` when the checks began.

    Raises:
        TransientError: there is one.
    """
    from mmsa_dist.registered import gate
    from mmsa_dist.tracking import aliases
    from mmsa_dist.tracking.fetch import version_of

    def kept(mine: str, its: str) -> str | None:
        """Why version `its` keeps the alias before version `mine`."""
        new, held = (version_of(client, version.name, number) for number in (mine, its))
        check = gate.as_good(new, held, options.alias)
        return None if check.passed else check.found

    if options.force:
        return
    better = aliases.put_right(client, version.name, options.alias, version.number, before, kept)
    if better is not None:
        number, found = better
        raise TransientError(
            f"version {number} of {version.name} was promoted to {options.alias} in the same moment, and keeps it: "
            f"{found}; look at both (mmsa-dist models {version.name}) and promote again if need be"
        )
