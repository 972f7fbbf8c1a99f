"""What is seen only where all nodes' answers are: equal versions, clocks, slow ones among fast ones."""

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

from cluster.doctor.finding import Finding, State
from cluster.doctor.nodes import Node

SKEWED, WRONG = 1.0, 60.0
"""Seconds by which clocks may differ: beyond the first, times in logs are out of order; beyond the second, tokens and
certificates begin to fail (S3 refuses a request at 900)."""
NEEDED = ("python", "torch", "deepspeed", "ray", "numpy", "code")
"""Without which no node trains."""
SLOWER = 2.0
"""Times the fastest node's trial step that a step may take; all wait for the slowest."""

ByNode = dict[str, list[Finding]]


def versions(answers: ByNode) -> ByNode:
    """Lines for each package, of the facts of `software.look`: is it there, as asked for, and the same everywhere."""
    facts = {node: found[0].facts for node, found in answers.items() if found and found[0].facts}
    lines: ByNode = {node: [] for node in facts}
    if not facts:
        return lines
    reference = next(iter(facts))
    for package in facts[reference]["versions"]:
        meant = facts[reference]["versions"][package]
        for node, known in facts.items():
            lines[node].append(_version(package, known["versions"][package], meant, reference, node, known))
    return lines


def _version(
    package: str, own: str | None, meant: str | None, reference: str, node: str, known: dict[str, Any]
) -> Finding:
    name = "mmsa-dist" if package == "code" else package
    told = f"code {own}" if package == "code" and own else own or "missing"
    install = "" if package == "python" else f"{known['executable']} -m pip install "
    facts = {"version": own}
    if own is None:
        remedy = f"{install}{name if package == 'code' else f'{name}=={plain(meant)}' if meant else name} on that node"
        if package == "code":
            remedy += ", or send the command with `mmsa-dist submit`, which brings the code along"
        state: State = "fail" if package in NEEDED else "warn"
        return Finding("software", name, state, told, remedy, facts=facts)
    if plain(own) != plain(meant) and meant is not None:
        text = f"{told}; {reference} has {meant}"
        if package == "code":
            remedy = "install the same mmsa-dist on all nodes, or send commands with `mmsa-dist submit`"
        elif package == "python":
            remedy = f"use the same Python everywhere: {meant}"
        else:
            remedy = f"{install}{name}=={plain(meant)} on that node: ranks must compute alike"
        return Finding("software", name, "warn" if package == "mlflow" else "fail", text, remedy, facts=facts)
    wanted = known["ranges"].get(package)
    if wanted and not _within(own, wanted):
        remedy = f"{install}'{name}{wanted}'"
        return Finding("software", name, "fail", f"{told}; mmsa-dist needs {wanted}", remedy, facts=facts)
    return Finding("software", name, "ok", told, facts=facts)


def plain(version: str | None) -> str | None:
    """Without what it was built for, in which nodes may differ: 2.13.0 of 2.13.0+cpu."""
    return version and version.partition("+")[0]


def _within(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def clocks(nodes: list[Node], now: Callable[[], float] = time.time) -> ByNode:
    """How far each node's clock is from this machine's: the middle of the quickest of five calls."""
    lines: ByNode = {}
    for node in nodes:
        seen = []
        try:
            for _ in range(5):
                sent = now()
                theirs = node.call("now", timeout=10.0)
                back = now()
                seen.append((back - sent, theirs - (sent + back) / 2))
        except Exception:  # it has died since: the other checks tell
            continue
        trip, ahead = min(seen)
        lines[node.name] = [_clock(ahead, trip / 2)]
    return lines


def _clock(ahead: float, unsure: float) -> Finding:
    text = f"{abs(ahead):.3f} s {'ahead' if ahead > 0 else 'behind'} (give or take {unsure:.3f} s)"
    beyond, facts = abs(ahead) - unsure, {"ahead_s": ahead, "unsure_s": unsure}
    if beyond <= SKEWED:
        text = f"within {abs(ahead) + unsure:.2f} s of here"
        return Finding("cluster", "clock", "ok", text, facts=facts)
    remedy = (
        "let it follow a time server: systemctl enable --now chronyd (or systemd-timesyncd), then `chronyc makestep`"
    )
    return Finding("cluster", "clock", "fail" if beyond > WRONG else "warn", text, remedy, facts=facts)


def slow_ones(answers: ByNode) -> ByNode:
    """The trial's lines; a node whose steps take much longer than the others' is told so."""
    steps = {node: found[0].facts["step_s"] for node, found in answers.items() if found and "step_s" in found[0].facts}
    if len(steps) < 2:
        return answers
    usual = statistics.median_low(steps.values())
    lines = dict(answers)
    for node, step in steps.items():
        if step > SLOWER * usual:
            old = answers[node][0]
            remedy = (
                "see what else runs there (`top`), and whether its processor is throttled: all wait for the slowest"
            )
            text = re.sub("a step;", f"a step, the others {1e3 * usual:,.0f};", old.found)
            lines[node] = [Finding(old.group, old.check, "warn", text, remedy, facts=old.facts)]
    return lines
