"""The words of a command of this floor as its options; what cannot be understood is one sentence, as everywhere here.

tyro reads the words. What it says of those that it refuses fills a box, so that is caught and said shorter.
"""

import contextlib
import dataclasses
import io
import re
from difflib import get_close_matches
from typing import Any, TypeVar

import tyro

from cluster.errors import ConfigError
from cluster.suggest import nearest

Options = TypeVar("Options")


def parsed(options: type[Options], argv: list[str], prog: str) -> Options:
    """The options of a command, of the words behind its name.

    Args:
        options: a dataclass; its docstring is the command's description.

    Raises:
        ConfigError: they cannot be understood. SystemExit(0) after ``--help``.
    """
    output = io.StringIO()
    asked_for_help = any(word in ("-h", "--help") for word in argv)
    try:
        with contextlib.nullcontext() if asked_for_help else contextlib.redirect_stderr(output):
            return tyro.cli(options, args=argv, prog=prog, description=options.__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_refused(options, argv, output.getvalue(), prog)) from None


def value_of(command: list[str], option: str) -> str | None:
    """The value of an option within the words of somebody's command; None where it has none."""
    for at, word in enumerate(command):
        if word == option and at + 1 < len(command):
            return command[at + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _refused(options: type[Any], argv: list[str], text: str, prog: str) -> str:
    known = _flags(options)
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            close = get_close_matches(name, known, n=1)
            did_you = f"; did you mean {close[0]}?" if close else ""
            return f"unknown option {word.partition('=')[0]}{did_you} ({prog} --help lists all)"
    line = " ".join(re.sub(r"[╭─╮│╰╯]", " ", text).split())
    if choice := re.search(r"invalid choice '(.*?)' for argument '(\S+)'\. Expected one of \((.*?),?\)", line):
        valid = re.findall("'(.*?)'", choice[3])
        return f"{choice[2]} {choice[1]}: there is none such{nearest(choice[1], valid)}"
    if unknown := re.search(r"Unrecognized options: (\S+?),? ", f"{line} "):
        return f"one word too many: {unknown[1]} ({prog} --help says what is expected)"
    if missing := re.findall(r"^[│ ] {5}(\S+)", text.partition("For full helptext")[0], re.MULTILINE):
        return f"{', '.join(missing)} missing; see {prog} --help"
    if valueless := re.search(r"Missing value for argument '(.*?)'", line):
        return f"{valueless[1]}: a value is missing; see {prog} --help"
    line = re.sub(r"^(Value error|Invalid choice|Parsing error|Missing argument) ", "", line)
    line = re.sub(r" ?(Argument helptext: |For full helptext, ).*", "", line)
    return (line or "the command line cannot be understood") + f"; see {prog} --help"


def _flags(options: type[Any]) -> list[str]:
    """Every option there is, with the one that a name such as ``--from`` stands for."""
    flags = ["--help"]
    for each in dataclasses.fields(options):
        name = each.name.strip("_").replace("_", "-")
        flags += [f"--{name}", f"--no-{name}"] if each.type is bool else [f"--{name}"]
    return flags
