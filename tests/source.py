"""The project's own source as data: its files, what each imports and where, and which room each file belongs to."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.places import ROOT

PACKAGES = ("orchestrator", "workers")
LOOSE = ("orchestrator", "workers", "workers/techniques")
"""Folders whose own files are rooms of their own: they lie on different levels."""


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        target: dotted name; of a name in a module both ``module`` and ``module.name`` stand.
        inside: within a function.
        typing: under ``if TYPE_CHECKING``.
        said: a comment says why it stands there.
    """

    target: str
    line: int
    inside: bool
    typing: bool
    said: bool


@cache
def files() -> tuple[Path, ...]:
    return tuple(sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Returns every import of a file, wherever it stands."""
    lines = path.read_text().splitlines()
    found: list[Import] = []

    def visit(node: ast.AST, inside: bool, typing: bool) -> None:
        for child in ast.iter_child_nodes(node):
            here = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            hidden = typing or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            if isinstance(child, ast.Import | ast.ImportFrom):
                said = _said(lines, child)
                for target in _targets(child):
                    found.append(Import(target, child.lineno, inside, typing, said))
            visit(child, here, hidden)

    visit(tree(path), False, False)
    return tuple(found)


def _said(lines: list[str], node: ast.Import | ast.ImportFrom) -> bool:
    """Whether a comment stands on the statement, before it, or on the first of the imports right before it."""
    first = node.lineno - 1
    while first > 0 and lines[first - 1].strip().startswith(("from ", "import ")):
        first -= 1
    return any("#" in line for line in lines[max(first - 1, 0) : node.end_lineno])


def _targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses(path: Path, package: str) -> bool:
    """Whether a file imports a package, types left out."""
    return any((i.target == package or i.target.startswith(package + ".")) and not i.typing for i in imports(path))


@cache
def own_imports(path: Path) -> frozenset[tuple[Path, Import]]:
    """Returns the project's own files that a file imports, types included; of ``from a import b`` the module ``b``, else ``a``."""
    known = _by_module()
    found: set[tuple[Path, Import]] = set()
    for one in imports(path):
        if one.target not in known:
            continue
        deeper = {i.target for i in imports(path) if i.line == one.line and i.target.startswith(one.target + ".")}
        names = {target for target in deeper if target in known}
        if not deeper or deeper - names:  # something of the module itself, not only modules in it
            found.add((known[one.target], one))
    return frozenset(found)


@cache
def _by_module() -> dict[str, Path]:
    return {module(p): p for p in files()}


def room(path: Path) -> str:
    """Returns the folder of a file, or the file itself where the folder's files are rooms of their own."""
    folder = path.parent.relative_to(ROOT).as_posix()
    return name(path) if folder in LOOSE else folder


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Returns one circle of a graph, its first node again at the end; [] where there is none."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for other in sorted(arrows.get(node, ())):
            if found := walk(other, [*trail, node]):
                return found
        done.add(node)
        return []

    for node in sorted(arrows):
        if found := walk(node, []):
            return found
    return []
