"""`mmsa-dist models`: what is registered, and the versions of one model."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from shards.command_line import parsed
from shards.options import option

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from rich.console import RenderableType

    from mmsa_dist.tracking.version import Version

DESCRIPTION = """Lists the registered models; of one its versions, the newest first: aliases, data set and the beginning
of its fingerprint, the validation metric that chose the epoch, the same metric of the test split, run, code, and when.

Examples:
  mmsa-dist models
  mmsa-dist models ufen_mtfn
  mmsa-dist models ufen_mtfn --tracking-uri http://127.0.0.1:5000"""

NOTHING = """nothing is registered here yet: `mmsa-dist train SYSTEM --data FOLDER` registers what it trained, under the
system's name or --register NAME"""


@dataclass(frozen=True)
class Options:
    """What to list."""

    name: Annotated[tyro.conf.Positional[str | None], option("NAME")] = None
    """A registered model. Unset: the list of all."""
    tracking_uri: Annotated[str | None, option("URI")] = None
    """MLflow store. Unset: MLFLOW_TRACKING_URI, else the sqlite file in the folder of the runs."""
    runs_dir: Annotated[Path, option("FOLDER")] = Path("runs")
    """Folder of the runs."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist models`."""
    options = parsed(Options, argv, "mmsa-dist models", DESCRIPTION)
    from mmsa_dist.tracking import store
    from mmsa_dist.tracking.fetch import opened, versions_of
    from shards.progress import console, remarks

    what = "models" if options.name is None else f"model {options.name!r}"
    uri, client = opened(options.tracking_uri, options.runs_dir, what)
    with store.said(uri):
        models = all_versions(client) if options.name is None else {options.name: versions_of(client, options.name)}
    if not models:
        remarks.print(" ".join(NOTHING.split()), soft_wrap=True)
    elif options.name is None:
        console.print(models_table(models))
        remarks.print("mmsa-dist models NAME shows the versions of one", soft_wrap=True)
    elif not models[options.name]:
        remarks.print(f"{options.name} has no version; mmsa-dist train --register {options.name} makes one")
    else:
        console.print(versions_table(options.name, models[options.name]))
        remarks.print(
            f"mmsa-dist compare models:/{options.name}/A models:/{options.name}/B shows how two differ; "
            f"mmsa-dist promote {options.name} --version V --alias ALIAS checks one and gives it an alias",
            soft_wrap=True,
        )
    return 0


def all_versions(client: "MlflowClient") -> "dict[str, list[Version]]":
    """Registered model -> its versions, the newest first; names in order."""
    from mmsa_dist.tracking.version import Version

    aliases = {model.name: dict(model.aliases) for model in _paged(client.search_registered_models)}
    found = defaultdict(list)
    for each in _paged(client.search_model_versions):
        found[each.name].append(Version.of(each, aliases.get(each.name, {})))
    return {name: sorted(found[name], key=lambda version: -int(version.number)) for name in sorted(aliases)}


def models_table(models: "dict[str, list[Version]]") -> "RenderableType":
    """A model a row; its data set and validation metric are those of the newest version."""
    from rich.table import Table

    table = Table("model", "versions", "aliases", "data set (newest)", "validation (newest)")
    for name, versions in models.items():
        held = sorted((alias, each.number) for each in versions for alias in each.aliases)
        aliases = ", ".join(f"{alias} = {number}" for alias, number in held)
        newest = versions[0] if versions else None
        data, valid = (newest.data or "-", figure(newest, "valid", named=True)) if newest else ("-", "-")
        table.add_row(name, f"{len(versions):,}", aliases or "-", data, valid)
    return table


def versions_table(name: str, versions: "list[Version]") -> "RenderableType":
    """A version a row: below the data set its fingerprint, below the run the code that it ran."""
    from rich.table import Table

    table = Table("version", "aliases", title=name, title_justify="left")
    table.add_column("data set\nfingerprint", overflow="fold")
    table.add_column("valid", justify="right", no_wrap=True)
    table.add_column("test", justify="right", no_wrap=True)
    table.add_column("run\ncode", overflow="fold")
    table.add_column("created\n(UTC)", no_wrap=True)
    for each in versions:
        table.add_row(
            each.number,
            "\n".join(each.aliases) or "-",
            f"{each.data or '-'}\n{(each.fingerprint or '-')[:8]}",
            figure(each, "valid", named=True),
            figure(each, "test"),
            f"{each.tags.get('run_dir') or each.run_id or '-'}\n{(each.code or '-').removeprefix('mmsa-dist ')}",
            datetime.fromtimestamp(each.created / 1000, UTC).strftime("%Y-%m-%d\n%H:%M"),
        )
    return table


def figure(version: "Version", split: str, *, named: bool = False) -> str:
    """The metric of `split` by which the version's epoch was chosen; a dash where it is not known."""
    from mmsa_dist.report import label, value_text

    metrics = version.metrics(split)
    if version.monitor is None or version.monitor not in metrics:
        return "-"
    value = value_text(version.monitor, metrics[version.monitor])
    return f"{label(version.monitor)} {value}" if named else value


def _paged(search: Callable[..., Any]) -> Iterator[Any]:
    """All that one of MLflow's searches finds, page after page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return
