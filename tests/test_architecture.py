"""The import arrows, drawn from the AST: who may import whom, and what a reading command loads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

ONE_PLACE = {
    "optuna": {"orchestrator/sweep/searcher.py"},
    "moocore": {"orchestrator/frontier/dominance.py"},
    "duckdb": {"orchestrator/frontier/query.py"},
    "matplotlib": {"orchestrator/report/plots.py"},
    "plotly": {"orchestrator/report/render.py"},
    "onnxruntime": {"workers/artefact/export.py"},
    "pyarrow.parquet": {
        "orchestrator/ledger/ledger.py",
        "orchestrator/ledger/snapshot.py",
        "workers/tasks/encoded_images.py",
        "workers/tasks/example_tables.py",
    },
}
RAY = {
    "orchestrator/sweep/after_search.py",
    "orchestrator/sweep/worker_failures.py",
    "orchestrator/sweep/ray_session.py",
    "orchestrator/cluster/submit.py",
    "orchestrator/cluster/package.py",
    "orchestrator/sweep/supervision.py",
    "orchestrator/sweep/trainable.py",
}
STANDARD_LIBRARY_ONLY = ("workers/trial.py", "workers/techniques/record.py")


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Returns the dotted names that a file imports, ``from a import b`` as ``a`` and ``a.b``; type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            inner = not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
            for block in ("body", "orelse", "finalbody", "handlers"):
                if inner and isinstance(getattr(node, block, None), list):
                    visit(getattr(node, block))

    visit(tree.body)
    return found


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", modules("workers"), ids=name)
def test_workers_import_neither_the_orchestrator_nor_its_libraries(path: Path) -> None:
    for package in ("orchestrator", "ray", "optuna", "pydantic", "duckdb", "rich", "typer", "moocore", "pandas"):
        assert not uses(path, package), f"{name(path)} imports {package}"


@pytest.mark.parametrize("package", ONE_PLACE)
def test_each_library_has_one_place(package: str) -> None:
    users = {name(p) for p in [*modules("orchestrator"), *modules("workers")] if uses(p, package)}
    assert users == ONE_PLACE[package]


def test_ray_is_used_where_studies_run_and_by_the_job_client_only() -> None:
    assert {name(p) for p in modules("orchestrator") if uses(p, "ray")} == RAY


@pytest.mark.parametrize("file", STANDARD_LIBRARY_ONLY)
def test_what_crosses_the_boundary_needs_the_standard_library_only(file: str) -> None:
    tops = {n.split(".")[0] for n in imports(ROOT / file)}
    assert tops <= set(sys.stdlib_module_names) | {"__future__"}


def test_no_file_pickles() -> None:
    for path in [*modules("orchestrator"), *modules("workers")]:
        for package in ("pickle", "cloudpickle", "dill", "joblib", "shelve"):
            assert not uses(path, package), f"{name(path)} imports {package}"


def test_composition_and_maths_are_leaves() -> None:
    assert not any(uses(ROOT / "orchestrator/frontier/dominance.py", p) for p in ("orchestrator", "workers"))


READING = ["status", "show {trial}", "pareto", 'query "SELECT count(*) FROM trials"']


@pytest.mark.parametrize(
    "module", ["orchestrator.cli", "orchestrator.ledger", "orchestrator.frontier.query", "orchestrator.study.load"]
)
def test_importing_what_reading_needs_loads_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps([m for m in ('torch', 'ray', 'timm', 'optuna') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
