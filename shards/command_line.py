"""What tyro says of a command line that it refuses, as one sentence like all others."""

import contextlib
import io
import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

import tyro

from shards.errors import ConfigError
from shards.suggest import nearest

Options = TypeVar("Options")


def parsed(
    options: type[Options], argv: list[str], prog: str, description: str | None = None, *, twins: bool = True
) -> Options:
    """The options of a command, of the words behind its name.

    Args:
        twins: each flag has one that begins with ``--no-``.

    Raises:
        ConfigError: they cannot be understood. SystemExit(0) after ``--help``.
    """
    config = () if twins else (tyro.conf.FlagCreatePairsOff,)
    output = io.StringIO()
    asked_for_help = any(word in ("-h", "--help") for word in argv)
    try:
        with contextlib.nullcontext() if asked_for_help else contextlib.redirect_stderr(output):
            return tyro.cli(options, args=argv, prog=prog, description=description, config=config)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_refused(options, output.getvalue(), prog)) from None


def _refused(options: type[Any], text: str, prog: str) -> str:
    line = " ".join(re.sub(r"[╭─╮│╰╯]", " ", text).split())
    if choice := re.search(r"invalid choice '(.*?)' for argument '(\S+)'\. Expected one of \((.*?),?\)", line):
        valid = [name.strip("'") for name in sorted(choice[3].split(", ")) if name != "'None'"]
        return f"{choice[2]} {choice[1]}: there is none such{nearest(choice[1], valid)}"
    if unknown := re.search(r"Unrecognized options: (\S+?),? ", f"{line} "):
        near = re.search(r"Perhaps you meant: (--[\w-]+)", line)
        close = [near[1]] if near else get_close_matches(unknown[1], _flags(options), n=1)
        what = f"unknown option {unknown[1]}" if unknown[1].startswith("-") else f"one word too many: {unknown[1]}"
        return what + (f"; did you mean {close[0]}?" if close else "") + f" ({prog} --help lists all)"
    if "Missing from" in line:
        listed = text.partition("For full helptext")[0]
        named = re.findall(r"^[│ ] {5}(\S+)", listed, re.MULTILINE)  # their descriptions are indented further
        return f"{', '.join(named)} missing; see {prog} --help"
    if valueless := re.search(r"Missing value for argument '(.*?)'", line):
        name = valueless[1] if valueless[1].startswith("-") else valueless[1].upper()
        return f"{name}: a value is missing; see {prog} --help"
    if none := re.search(r"Error parsing (\S+): no type matching (.*) could be instantiated from \[(.*?)\]", line):
        wanted = [each for each in re.findall(r"{(.*?)}", none[2]) if each != "None"]
        return f"{none[1]} {' '.join(none[3].split(', '))}: expected {' or '.join(wanted)}"
    return readable(text).replace(f"`{options.__name__}.", "`").removeprefix("Error parsing ")


def _flags(options: type[Any]) -> list[str]:
    return [f"--{field.name.replace('_', '-')}" for field in fields(options)] if is_dataclass(options) else []


def readable(text: str) -> str:
    """tyro's boxed message as one line: of a value that is refused its key and why, without the box and the manual."""
    line = " ".join(re.sub(r"[╭─╮│╰╯]", " ", text).split())
    line = re.sub(r" For further information visit \S+", "", line)
    if refused := re.search(r"Error parsing (\S+): \d+ validation errors? for \w+ (.*)", line):
        parts = [] if refused[1] == "Recipe" else [refused[1]]
        found = re.findall(
            r"(?:(\S+) )?((?:Input|String) [^\[]*|Value error, [^\[]*) \[type=\w+, input_value=(.*?), input_",
            refused[2],
        )
        if found:
            sentences = [
                (".".join([*parts, key] if key else parts).replace("-", "_"), why.removeprefix("Value error, "), value)
                for key, why, value in found
            ]
            return "; ".join(
                f"`{key}`: {why[0].lower()}{why[1:]}" + f", found {value}" * (not value.startswith("{"))
                for key, why, value in sentences
            )
    line = re.sub(r"^(Value error|Invalid choice|Parsing error|Missing argument|Unrecognized options) ", "", line)
    line = re.sub(r" ?(Argument helptext: |For full helptext, ).*", "", line)
    return line or "the command line cannot be understood; see --help"
