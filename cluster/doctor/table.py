"""What was found, as one table for people and as JSON for scripts."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.doctor.finding import Finding

GROUPS = {
    "cluster": "cluster",
    "software": "software",
    "machine": "machine",
    "gpu": "GPUs",
    "network": "network",
    "storage": "storage of runs",
    "mlflow": "MLflow",
    "data": "data set",
    "trial": "trial run",
}
"""Group -> its title, in the table's order."""

STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
WORD = {"ok": "ok", "warn": "warn", "fail": "FAIL", "skip": "-"}
MOST_NODES = 4
"""Nodes that are named in one line, and lines that one check has where all is well."""


@dataclass(frozen=True)
class Line:
    """A finding, and the nodes on which it is the same."""

    finding: Finding
    nodes: list[str]


class Report:
    """All findings, node by node.

    Args:
        nodes: names of all that were asked.
    """

    def __init__(self, nodes: list[str]) -> None:
        self.nodes = nodes
        self._found: list[tuple[str, Finding]] = []

    def add(self, answers: dict[str, list[Finding]]) -> None:
        """Findings by node; those without a name for people (``mark``, ``port``) are left out."""
        for node, found in answers.items():
            self._found += [
                (node, each) for each in found if each.check not in ("mark", "port", "versions") or bad(each)
            ]

    @property
    def exit_code(self) -> int:
        """0 without a red line, else the smallest of theirs: 75 only where all of it may pass by itself."""
        return min((each.code for _, each in self._found if each.state == "fail"), default=0)

    def count(self, state: str) -> int:
        """Lines of the table in this state."""
        return sum(line.finding.state == state for line in self.lines())

    def lines(self) -> list[Line]:
        """In the table's order, what is the same on several nodes once."""
        order = list(GROUPS)
        checks = {(each.group, each.check): None for _, each in self._found}
        lines: list[Line] = []
        for group, check in sorted(checks, key=lambda pair: order.index(pair[0])):
            same: dict[tuple[str, str, str], Line] = {}
            for node, each in self._found:
                if (each.group, each.check) == (group, check):
                    line = same.setdefault((each.state, each.found, each.remedy), Line(each, []))
                    line.nodes.append(node)
            lines += same.values()
        return lines

    def json(self) -> str:
        """``{nodes, red, yellow, exit_code, findings: [{node, group, check, state, found, remedy, code, facts}]}``"""
        told: dict[str, Any] = {
            "nodes": self.nodes, "red": self.count("fail"), "yellow": self.count("warn"), "exit_code": self.exit_code,
            "findings": [{"node": node, **each.dump()} for node, each in self._found],
        }  # fmt: skip
        return json.dumps(told, indent=1, ensure_ascii=False)

    def show(self, console: Console) -> None:
        """The table, and one sentence below it."""
        several = len(self.nodes) > 1
        table = Table(show_header=True, header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("", no_wrap=True)
        table.add_column("check", no_wrap=True)
        if several:
            table.add_column("nodes", max_width=40)
        table.add_column("found", overflow="fold")
        group = check = ""
        for line in _shortened(self.lines()):
            each = line.finding
            if each.group != group:
                group, check = each.group, ""
                table.add_row("", Text(GROUPS[group], style="bold"))
            told = Text(each.found, style="dim" if each.state == "skip" else "")
            if each.remedy:
                told.append(f"\n→ {each.remedy}", style=STYLE[each.state].replace("bold ", ""))
            name = "" if each.check == check else f"  {each.check}"
            nodes = [Text(_named(line.nodes, len(self.nodes)))] if several else []
            table.add_row(Text(WORD[each.state], style=STYLE[each.state]), Text(name), *nodes, told)
            check = each.check
        console.print(table)
        console.print()
        console.print(Text(self.verdict(), style="bold"))

    def verdict(self) -> str:
        """The sentence below the table."""
        red, yellow = self.count("fail"), self.count("warn")
        if not red:
            return "ready" + (f", with {_counted(yellow, 'yellow line')} to look at" if yellow else "")
        also = f" and {_counted(yellow, 'yellow one')}" if yellow else ""
        return f"not ready: {_counted(red, 'red line')}{also}; each says what to do behind →"


def bad(finding: Finding) -> bool:
    """Whether somebody has to do something."""
    return finding.state in ("warn", "fail")


def console() -> Console:
    """Of standard output; colours on a terminal only, and none where NO_COLOR is set."""
    made = Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 140
    return made


def _shortened(lines: list[Line]) -> Iterable[Line]:
    """Of a check that is well in many words, a few lines; whatever is not well is shown whole."""
    shown: dict[tuple[str, str], int] = {}
    for line in lines:
        key = (line.finding.group, line.finding.check)
        if not bad(line.finding):
            shown[key] = shown.get(key, 0) + 1
            if shown[key] == MOST_NODES + 1:
                left = [
                    each for each in lines if (each.finding.group, each.finding.check) == key and not bad(each.finding)
                ]
                nodes = [node for each in left[MOST_NODES:] for node in each.nodes]
                text = "as the lines above, with other numbers (--json has them)"
                yield Line(Finding(*key, line.finding.state, text), nodes)
            if shown[key] > MOST_NODES:
                continue
        yield line


def _named(nodes: list[str], of: int) -> str:
    if len(nodes) == of:
        return f"all {of} nodes"
    if len(nodes) <= MOST_NODES:
        return ", ".join(nodes)
    return f"{len(nodes)} nodes: {', '.join(nodes[:MOST_NODES])}, …"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
