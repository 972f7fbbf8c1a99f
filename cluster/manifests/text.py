"""Pieces of text that manifests are made of."""

import json
import re
import textwrap

import yaml

from cluster.errors import ConfigError


def quoted(value: str) -> str:
    """A string as YAML, in double quotes: never read as a number, a time or a truth."""
    return json.dumps(value, ensure_ascii=False)


def plain(value: str) -> str:
    """A string as a person writes it in YAML: bare where that is read as the same string, else in quotes."""
    if re.fullmatch(r"[\w./@:+-]+", value, re.ASCII) and yaml.safe_load(f"key: {value}") == {"key": value}:
        return value
    return quoted(value)


def block(text: str, indent: int = 0, **pieces: str) -> str:
    """Text without the indentation that it has in our source, moved in by `indent`.

    Args:
        pieces: what stands in place of a line ``@name``, with that line's indentation; an empty one leaves no line.
    """
    lines: list[str] = []
    for line in textwrap.dedent(text).strip().splitlines():
        bare = line.strip()
        if bare.startswith("@"):
            piece, inner = pieces[bare[1:]], " " * (len(line) - len(line.lstrip()))
            lines += [inner + each for each in textwrap.dedent(piece).strip().splitlines()]
        else:
            lines.append(line)
    return "\n".join(" " * indent + line if line.strip() else "" for line in lines)


def comment(text: str, indent: int = 0, width: int = 110) -> str:
    """A paragraph as comment lines."""
    mark = " " * indent + "# "
    return textwrap.fill(text, width, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)


def needed(value: str | None, key: str, why: str) -> str:
    """A value that this kind of manifest cannot do without.

    Raises:
        ConfigError: it is missing.
    """
    if value is None:
        raise ConfigError(f"{key} is missing: {why}")
    return value
