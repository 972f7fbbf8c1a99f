"""`mmsa-dist cluster`: from one description of a cluster to the files that make it, and what runs within it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cluster.command_line import parsed
from cluster.errors import ConfigError, TransientError
from cluster.suggest import nearest

USAGE = """usage: mmsa-dist cluster init [--to cluster.yaml]
       mmsa-dist cluster render TARGET [--from cluster.yaml] [--to DIR|-]
       mmsa-dist cluster run --nodes N --cpus N -- COMMAND …

One file describes a cluster and the command that it shall run; from it the files are written that make such a cluster,
as a person would write them: commented, with the head at the usual price and spot workers, the dashboard reached by
token within the cluster's network alone, checkpoints as often as failures make it worth while.

commands:
  init     write a commented description to start from
  render   write the files of a target, and say how to use them
  run      within a cluster: wait for its nodes, then run a command, or go on with what it has begun (the files call it)

targets:
{targets}

First steps:
  mmsa-dist cluster init                                        # writes cluster.yaml: edit it
  mmsa-dist cluster render kuberay-job --from cluster.yaml --to -
  mmsa-dist cluster render slurm --from cluster.yaml --to .

`mmsa-dist cluster COMMAND --help` explains a command. docs/cluster.md shows the way for Kubernetes, for EC2 and Google
Cloud, and for Slurm."""

EXAMPLE = Path(__file__).with_name("example.yaml")
"""What ``init`` writes."""

Kind = Literal["ray-up-aws", "ray-up-gcp", "kuberay-cluster", "kuberay-job", "slurm"]


@dataclass(frozen=True)
class Init:
    """Write a commented description of a cluster to start from: mmsa-dist cluster init [--to cluster.yaml]"""

    to: Annotated[str, tyro.conf.arg(metavar="FILE|-")] = "cluster.yaml"
    """The file; it must not be there yet. `-` prints it."""


@dataclass(frozen=True)
class Render:
    """Write the files that make a cluster: mmsa-dist cluster render kuberay-job --from cluster.yaml --to .

    The first lines of each file say how it is used.
    """

    target: Annotated[tyro.conf.Positional[Kind], tyro.conf.arg(metavar="TARGET")]
    """Which kind of cluster."""
    from_: Annotated[Path, tyro.conf.arg(name="from", metavar="FILE")] = Path("cluster.yaml")
    """The description; `mmsa-dist cluster init` writes one."""
    to: Annotated[str, tyro.conf.arg(metavar="DIR|-")] = "."
    """The folder for the file; `-` prints it."""


def main(argv: list[str]) -> int:
    """Entry of `mmsa-dist cluster`.

    Raises:
        ConfigError: an unknown command, or what the command itself raises.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        from cluster.manifests import TARGETS

        width = max(map(len, TARGETS))
        print(USAGE.format(targets="\n".join(f"  {name:{width}}  {each.about}" for name, each in TARGETS.items())))
        return 0 if argv else 2
    commands: dict[str, Callable[[list[str]], int]] = {"init": init, "render": render, "run": run}
    if argv[0] not in commands:
        raise ConfigError(f"unknown command {argv[0]!r} of mmsa-dist cluster{nearest(argv[0], commands)}")
    return commands[argv[0]](argv[1:])


def init(argv: list[str]) -> int:
    """Entry of `mmsa-dist cluster init`.

    Raises:
        ConfigError: the file is there already. TransientError: it cannot be written.
    """
    options = parsed(Init, argv, "mmsa-dist cluster init")
    text = EXAMPLE.read_text(encoding="utf-8")
    if options.to == "-":
        print(text, end="")
        return 0
    path = Path(options.to)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"--to {path}: is there already; give another name, or remove it") from error
    except OSError as error:
        raise TransientError(f"--to {path}: cannot be written: {error.strerror}") from error
    print(f"wrote {path}: edit it, then `mmsa-dist cluster render kuberay-job --from {path} --to -` shows a file of it")
    return 0


def render(argv: list[str]) -> int:
    """Entry of `mmsa-dist cluster render`.

    Raises:
        ConfigError: the description is wrong, or lacks something for this target. TransientError: no file can be made.
    """
    options = parsed(Render, argv, "mmsa-dist cluster render")
    from cluster.description import load
    from cluster.manifests import TARGETS

    description, target = load(options.from_), TARGETS[options.target]
    try:
        text = target.text(description)
    except ConfigError as error:
        raise ConfigError(f"{options.from_}: {error}") from error
    if unused := [key for key in target.ignores if description.sets(key)]:
        print(f"note: {options.target} makes no use of {', '.join(unused)}", file=sys.stderr)
    if options.to == "-":
        print(text, end="")
        return 0
    path = Path(options.to) / f"{description.name}.{target.file}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TransientError(f"--to {options.to}: {path} cannot be written: {error.strerror}") from error
    print(f"wrote {path}: its first lines say how it is used")
    return 0


def run(argv: list[str]) -> int:
    """Entry of `mmsa-dist cluster run`."""
    from cluster.run import main as begin

    return begin(argv)
