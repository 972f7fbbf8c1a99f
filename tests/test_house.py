"""The house keeps its order: imports go one way, the front door is light, pins and ranges agree, pages are true."""

import ast
import contextlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from benchmarks import render
from mmsa_dist.__main__ import COMMANDS, USAGE, main

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "shards": set(),
    "mmsa_dist": {"shards"},
    "tune": {"mmsa_dist", "shards"},
    "cluster": set(),
}
"""Package -> the others of the four that it may import."""
LINES = 450
"""A file "not much beyond 400 lines"."""
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """Top-level package and line of every import statement."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: not functions' bodies, not what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def where(path: Path, line: int, name: str) -> str:
    return f"{path.relative_to(ROOT)}:{line} imports {name}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    forbidden = MAY_IMPORT.keys() - MAY_IMPORT[package] - {package} | {"tests", "benchmarks"}
    wrong = [
        where(path, line, name)
        for path in modules(package)
        for name, line in imported(ast.walk(tree(path)))
        if name in forbidden
    ]
    assert modules(package), f"{package} holds no module"
    assert not wrong


@pytest.mark.parametrize("package", ["shards", "mmsa_dist"])
def test_ray_and_mlflow_are_imported_where_they_are_used(package: str) -> None:
    """A machine without them still trains with the local launcher; `serving` is code that MLflow itself loads."""
    wrong = [
        where(path, line, name)
        for path in modules(package)
        if path.parent.name != "serving"
        for name, line in imported(at_import(tree(path)))
        if name in {"ray", "mlflow", "optuna"}
    ]
    assert not wrong


def test_help_imports_nothing_but_the_front_door() -> None:
    """No third-party module at all: that is what keeps `mmsa-dist --help` under half a second."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "from mmsa_dist.__main__ import main\n"
        "assert main(['--help']) == 0\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    usage, _, names = done.stdout.rpartition("Set MMSA_DEBUG=1 to see tracebacks.")
    assert names.split() == ["mmsa_dist"]
    assert all(re.search(rf"^  {command} ", usage, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_function(command: str) -> None:
    """Read, not imported: the check costs nothing and needs no Ray."""
    module, _, function = COMMANDS[command][0].partition(":")
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    functions = {node.name: node for node in tree(path).body if isinstance(node, ast.FunctionDef)}
    assert function in functions
    assert [a.arg for a in functions[function].args.args] == ["argv"]
    assert ast.unparse(functions[function].returns or ast.Constant(None)) == "int"


def test_console_script_is_the_front_door() -> None:
    (point,) = entry_points(group="console_scripts", name="mmsa-dist")
    assert point.value == "mmsa_dist.__main__:main"


@pytest.mark.parametrize(
    "folder", ["shards", "mmsa_dist", "tune", "cluster", "tests", "benchmarks"], ids=lambda folder: folder
)
def test_files_are_short(folder: str) -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in modules(folder)}
    assert {path: n for path, n in lengths.items() if n > LINES} == {}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.partition("==") for line in lines if line.strip() and not line.startswith("#")]
    assert all(separator and wanted for _, separator, wanted in pinned), "constraints.txt holds exact pins only"
    names = [canonicalize_name(name) for name, _, _ in pinned]
    assert sorted(set(names)) == sorted(names), "constraints.txt pins a package twice"
    return {canonicalize_name(name): Version(wanted) for name, _, wanted in pinned}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in (*project["dependencies"], *(text for extra in extras for text in extra))]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_ranges_and_pins_agree(requirement: Requirement) -> None:
    pinned = pins()
    name = canonicalize_name(requirement.name)
    assert name in pinned, f"pyproject.toml asks for {name}, constraints.txt does not pin it"
    assert requirement.specifier.contains(pinned[name]), f"{name} is pinned to {pinned[name]}, outside {requirement}"


def test_readme_lists_every_command_and_no_other() -> None:
    table = (ROOT / "README.md").read_text().partition("\n## Commands\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `mmsa-dist ([a-z]+)", table, re.MULTILINE)
    assert sorted(rows) == sorted(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_commands_and_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(snippets(text))
    assert set(re.findall(r"^\s*(?:\$ )?mmsa-dist ([a-z]+)\b", code, re.MULTILINE)) <= COMMANDS.keys()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\s*(?:\$ )?make ([a-z-]+)\b", code, re.MULTILINE)) <= targets
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def snippets(text: str) -> list[str]:
    """Code blocks and inline code of a page, lines joined that end in a backslash."""
    joined = text.replace("\\\n", " ")
    return [*re.findall(r"^```.*?^```", joined, re.MULTILINE | re.DOTALL), *re.findall(r"`([^`\n]+)`", joined)]


def written_commands() -> dict[tuple[str, ...], set[str]]:
    """Command, with its format or system where it has one -> options that the pages and the front door use with it."""
    found: dict[tuple[str, ...], set[str]] = {}
    texts = [*(code for page in PAGES for code in snippets(page.read_text(encoding="utf-8"))), USAGE]
    for line in "\n".join(texts).splitlines():
        match = re.match(r"\s*(?:\$ |# .*)?mmsa-dist (pack|train|[a-z]+)\b(.*?)(?: -- .*|#.*)?$", line)
        if match and match[1] in COMMANDS:
            words = match[2].split()
            named = words[:1] if match[1] in {"pack", "train"} and words and re.fullmatch("[a-z_]+", words[0]) else []
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            found.setdefault((match[1], *named), set()).update(options)
    return found


@pytest.mark.parametrize("command", sorted(written_commands()), ids=" ".join)
def test_pages_use_options_that_exist(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    texts = ""
    for words in {command, command[:1]}:
        with contextlib.suppress(SystemExit):
            main([*words, "--help"])
        texts += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][a-z0-9._-]*", texts))
    assert written_commands()[command] <= known | {"--help"}


def test_pages_show_what_was_measured() -> None:
    assert not render.behind(render.load()), "run: python -m benchmarks.render"


def test_package_data_is_declared() -> None:
    """A recipe or a search space that a wheel leaves behind would be missed only by those who install it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*"):
            inside = path.relative_to(ROOT / package)
            if path.is_file() and path.suffix not in {".py", ".pyc"}:
                assert any(inside.match(pattern) for pattern in declared.get(package, [])), f"{package}/{inside}"
