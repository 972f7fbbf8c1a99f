"""The front door: a table from subcommand to function, imported only when called.

`mmsa-dist --help` imports nothing heavier than this file.
"""

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmsa_dist import hangup

COMMANDS: dict[str, tuple[str, str]] = {
    "pack": ("shards.cli:pack", "write a data set as WebDataset shards with an index"),
    "index": ("shards.cli:index", "index WebDataset tars that somebody else wrote, in place"),
    "inspect": ("shards.cli:inspect", "show what a packed data set holds"),
    "verify": ("shards.cli:verify", "check every checksum of a packed data set"),
    "unpack": ("shards.cli:unpack", "write a packed data set as a pickle of the MMSA toolkit"),
    "systems": ("mmsa_dist.systems_cli:main", "list the systems that can be trained, or show one"),
    "plan": ("mmsa_dist.planning:main", "show what a run would do and need, before anything starts"),
    "train": ("mmsa_dist.cli:train", "train a system, test it once, register it"),
    "labels": ("mmsa_dist.labels:main", "show the unimodal labels that a run has generated"),
    "predict": ("mmsa_dist.predict:main", "predict with a registered model or a run"),
    "robustness": (
        "mmsa_dist.robustness.command:main",
        "show what a model answers where a modality is missing",
    ),
    "export": ("mmsa_dist.export:main", "write a trained system as a folder that loads without DeepSpeed or Ray"),
    "models": ("mmsa_dist.registered.listing:main", "list the registered models, or the versions of one"),
    "compare": ("mmsa_dist.registered.compare:main", "show how two models differ, and how sure that is"),
    "promote": ("mmsa_dist.registered.promote:main", "move an alias to a version that passes the checks"),
    "spaces": ("tune.spaces_cli:main", "show what a sweep searches, and which paper each range comes from"),
    "sweep": ("tune.sweep:main", "search hyper-parameters, register the best"),
    "reproduce": ("tune.reproduce:main", "train a paper's table, show its figures beside ours"),
    "submit": ("cluster.submit:main", "send any of these commands to a Ray cluster"),
    "jobs": ("cluster.jobs:main", "what was sent to a Ray cluster: list, status, logs, watch, stop, result"),
    "doctor": ("cluster.doctor.command:main", "see whether this machine or every node of a cluster can train"),
    "cluster": ("cluster.commands:main", "write the files that make a cluster: KubeRay, ray up, Slurm"),
}

USAGE = """usage: mmsa-dist COMMAND ...

Distributed training of multimodal sentiment analysis.

commands:
{commands}

First steps:
  mmsa-dist pack generated --like mosi --out data/mosi      synthetic data; `pack mmsa FILE.pkl` reads real features
  mmsa-dist train ufen_mtfn --data data/mosi --workers 2 --zero 2 --alias champion
  mmsa-dist predict models:/ufen_mtfn@champion --data data/mosi --out predictions.csv

`mmsa-dist COMMAND --help` explains a command. Exit codes: 0 done, 2 the command or recipe is wrong, 3 the data is
wrong, 4 training failed, 75 something outside failed and trying again may help, 129 stopped as its terminal closed,
130 with Ctrl-C, 143 by SIGTERM.
Set MMSA_DEBUG=1 to see tracebacks."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code; every error that is the user's to mend is one sentence on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = _command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("mmsa-dist"))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        from mmsa_dist.suggest import nearest

        print(f"error: unknown command {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    came: list[int] = []
    try:
        with _terminable(came):
            return int(getattr(importlib.import_module(module), function)(rest) or 0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + (came[0] if came else signal.SIGINT)
    except BrokenPipeError:
        raise
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:  # ours to mend: show where
            traceback.print_exc()
            return 1
        if "MMSA_DEBUG" in os.environ:
            traceback.print_exc()
        print(f"{'stopped' if code > 128 else 'error'}: {error}", file=sys.stderr)
        return int(code)


@contextmanager
def _terminable(came: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does, where they would end this process: nothing half-written stays behind.

    Args:
        came: gets the signal's number; Ray raises a KeyboardInterrupt of its own for the one raised here.

    Not in a rank of torchrun: it may wait in a collective, where no handler of Python's runs, and would not end at all.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # comes twice, from the kernel and from the shell
            signal.signal(number, signal.SIG_IGN)
            hangup.leave_terminal()
        else:
            signal.signal(number, signal.SIG_DFL)  # a second one ends on the spot
        came.append(number)
        raise KeyboardInterrupt(number)

    ours = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if ours and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in taken:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
