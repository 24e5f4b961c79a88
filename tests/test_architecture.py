"""The rules of the house, read from the source: which folder may import which, who uses which library, what lies where."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT
from tests.source import circle, files, imports, module, name, own_imports, room, tree, uses
from workers.techniques import FOLDERS

# --- arrows -----------------------------------------------------------------------------------------------------------


def rooms() -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {}
    for path in files():
        arrows.setdefault(room(path), set()).update(room(p) for p, _ in own_imports(path) if room(p) != room(path))
    return arrows


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_folders_import_each_other_one_way_only() -> None:
    arrows = rooms()
    assert {"orchestrator/sweep", "workers/techniques/tokens", "workers/trial.py"} <= set(arrows)
    found = circle(arrows)
    assert not found, " -> ".join(found)


def test_no_files_import_each_other() -> None:
    arrows = {name(path): {name(p) for p, _ in own_imports(path)} - {name(path)} for path in files()}
    found = circle(arrows)
    assert not found, " -> ".join(found)


CONTRACT = "workers/techniques/contract"
"""Drawn by itself: it asks of techniques what only an artefact shows, so it stands above both."""


def picture() -> dict[str, int]:
    """Returns the line, counted from the bottom, on which docs/architecture.md draws each folder or file of a package."""
    text = (ROOT / "docs/architecture.md").read_text()
    drawn = text.split("    orchestrator   ", 1)[1].split("\n\n", 1)[0].splitlines()
    column = len("    orchestrator   ") + drawn[0].index("workers")
    found: dict[str, int] = {}
    for line, row in enumerate(reversed(drawn[1:])):
        found |= {f"orchestrator/{word}": line for word in row[:column].split()}
        found |= {f"workers/{word}": line for word in row[column:].split()}
    return found


def test_the_picture_of_the_house_is_that_of_the_source() -> None:
    def place(where: str) -> str:
        return where if where == CONTRACT else "/".join(where.removesuffix(".py").split("/")[:2])

    lines = picture()
    outside = {"orchestrator/__init__", "workers/__init__"}
    assert {place(room) for room in rooms()} - outside == set(lines)
    for start, ends in rooms().items():
        for end in ends:
            one, two = place(start), place(end)
            if one != two and one not in outside and one.split("/")[0] == two.split("/")[0]:
                assert lines[one] > lines[two], f"{start} -> {end}"


HANDED_ON = {
    "orchestrator.cli": "app",
    "orchestrator.ledger": "ledger",
    "workers.artefact": "folder",
}
"""Folders that hand on in ``__init__`` what others use of their main file."""


@pytest.mark.parametrize("folder", HANDED_ON)
def test_others_use_what_a_folder_hands_on(folder: str) -> None:
    inner = f"{folder}.{HANDED_ON[folder]}"
    outside = [path for path in files() if not module(path).startswith(folder)]
    assert [name(path) for path in outside if uses(path, inner)] == []


def test_nothing_private_is_imported() -> None:
    private = [
        f"{name(path)}:{i.line}: {i.target}"
        for path in files()
        for i in imports(path)
        if i.target.split(".")[0] in ("orchestrator", "workers") and i.target.rpartition(".")[2].startswith("_")
    ]
    assert private == []


HEAVY = {
    "PIL",
    "obstore",
    "huggingface_hub",
    "onnxruntime",
    "onnxscript",
    "optuna",
    "plotly",
    "pyarrow",
    "ray",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torchao",
    "torchvision",
    "transformers",
}
"""Libraries that are slow to import, or that an installation may lack."""


def test_an_import_inside_a_function_keeps_something_heavy_out() -> None:
    """The commands say so once, in ``orchestrator/cli/app.py``; elsewhere a comment says what is spared."""
    wrong = []
    for path in files():
        if name(path).startswith("orchestrator/cli/"):
            continue
        for one in imports(path):
            top = one.target.split(".")[0]
            fine = one.said if top in ("orchestrator", "workers") else top in HEAVY
            if one.inside and not one.typing and not fine:
                wrong.append(f"{name(path)}:{one.line}: {one.target}")
    assert wrong == []


# --- libraries --------------------------------------------------------------------------------------------------------

ONE_PLACE = {
    "ray": {"orchestrator/sweep", "orchestrator/cluster"},
    "optuna": {"orchestrator/sweep/searcher.py", "orchestrator/sweep/journal.py", "orchestrator/sampling"},
    "moocore": {"orchestrator/frontier/dominance.py"},
    "duckdb": {"orchestrator/frontier/query.py"},
    "typer": {"orchestrator/cli"},
    "matplotlib": {"orchestrator/report/plots.py"},
    "plotly": {"orchestrator/report/render.py"},
    "pydantic": {"orchestrator/study"},
    "onnxruntime": {"workers/artefact/export.py"},
    "obstore": {"workers/node/storage/objects.py"},
    "pyarrow.parquet": {"orchestrator/ledger", "orchestrator/sampling/tables.py", "workers/tasks"},
}
"""Who uses a library: a file, or a folder of which some do. Ledgers are written by one folder, data sets are read by another, tables of outcomes by a file."""


@pytest.mark.parametrize("package", ONE_PLACE)
def test_each_library_has_one_place(package: str) -> None:
    places = ONE_PLACE[package]
    users = {name(path) for path in files() if uses(path, package)}
    assert {place for user in users for place in (user, user.rpartition("/")[0]) if place in places} == places
    assert {user for user in users if user not in places and user.rpartition("/")[0] not in places} == set()


def test_parquet_is_written_in_one_file() -> None:
    writers = {
        name(path)
        for path in files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr in ("write_table", "ParquetWriter")
        and "pq" in ast.unparse(node)
    }
    assert writers == {"orchestrator/ledger/parquet_files.py"}


@pytest.mark.parametrize("path", [p for p in files() if name(p).startswith("workers")], ids=name)
def test_workers_import_neither_the_orchestrator_nor_its_libraries(path: Path) -> None:
    for package in ("orchestrator", "ray", "optuna", "pydantic", "duckdb", "rich", "typer", "moocore", "pandas"):
        assert not uses(path, package), f"{name(path)} imports {package}"


STANDARD_LIBRARY_ONLY = (
    "workers/trial.py",
    "workers/metrics.py",
    "workers/model_info.py",
    "workers/techniques/families.py",
    "workers/techniques/record.py",
)


@pytest.mark.parametrize("file", STANDARD_LIBRARY_ONLY)
def test_what_crosses_the_boundary_needs_the_standard_library_only(file: str) -> None:
    own = {target for target in STANDARD_LIBRARY_ONLY if target != file}
    for one in imports(ROOT / file):
        top = one.target.split(".")[0]
        ours = (
            one.target.rpartition(".")[0].replace(".", "/") + ".py" in own
            or one.target.replace(".", "/") + ".py" in own
        )
        assert one.typing or ours or top in sys.stdlib_module_names or top == "__future__", one.target


def test_no_file_pickles() -> None:
    for path in files():
        for package in ("pickle", "cloudpickle", "dill", "joblib", "shelve"):
            assert not uses(path, package), f"{name(path)} imports {package}"


# --- places -----------------------------------------------------------------------------------------------------------


def test_every_folder_says_what_happens_there() -> None:
    for path in files():
        if path.name == "__init__.py" and name(path) != "workers/__init__.py":
            assert ast.get_docstring(tree(path)), name(path)


def technique_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / "workers/techniques" / folder).glob("*.py"))]


def test_technique_folders_hold_techniques_what_belongs_to_one_and_what_several_share() -> None:
    for path in technique_files():
        own = FOLDERS[path.parent.name]
        exported = any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TECHNIQUE" for node in tree(path).body
        )
        assert exported == (path.stem in own), f"{name(path)}: a technique exports TECHNIQUE and is named in FOLDERS"
        of_one = any(path.stem.startswith(f"{technique}_") for technique in own)
        assert exported or of_one or path.stem.startswith("shared_") or path.stem == "__init__", name(path)


def owner(path: Path) -> str:
    """Returns the technique that a file belongs to, or the file where it belongs to none alone."""
    names = [name for names in FOLDERS.values() for name in names]
    return next((n for n in names if path.stem == n or path.stem.startswith(f"{n}_")), name(path))


def test_what_is_called_shared_is() -> None:
    """Of what is found by name on demand (workers/techniques/backbones.py), the name stands as a text."""
    users: dict[Path, set[str]] = {path: set() for path in technique_files() if path.stem.startswith("shared_")}
    for user in files():
        for target in {target for target, _ in own_imports(user)} & set(users):
            users[target].add(owner(user))
    texts = [
        re.sub(r"\{.*?\}", "[a-z]+", ast.unparse(node)[2:-1])
        for path in technique_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.JoinedStr) and "shared_" in ast.unparse(node)
    ]
    lonely = {module(path): sorted(found) for path, found in users.items() if len(found) < 2}
    assert [path for path in lonely if not any(re.fullmatch(text, path) for text in texts)] == [], lonely


def test_a_backbone_s_half_is_found_in_one_way() -> None:
    for path in files():
        if name(path) != "workers/models/__init__.py":
            assert 'getattr(model, "family"' not in path.read_text(), (
                f"{name(path)}: see workers/techniques/backbones.py"
            )


def test_tests_mirror_the_folders() -> None:
    for package in ("orchestrator", "workers"):
        source = {p.relative_to(ROOT) for p in (ROOT / package).rglob("*") if p.is_dir() and any(p.glob("*.py"))}
        tests = {
            p.relative_to(ROOT / "tests") for p in (ROOT / "tests" / package).rglob("*") if any(p.glob("test_*.py"))
        }
        assert tests - source == set()
        without = {f for f in source - tests if not (ROOT / "tests" / f.parent / f"test_{f.name}.py").is_file()}
        assert without == set()


READING = [
    "orchestrator.cli",
    "orchestrator.ledger",
    "orchestrator.frontier.query",
    "orchestrator.study.load",
    "orchestrator.sweep.keeper",
]


@pytest.mark.parametrize("imported", READING)
def test_importing_what_reading_needs_loads_neither_torch_nor_ray(imported: str) -> None:
    code = f"import sys, json, {imported}; print(json.dumps([m for m in ('torch', 'ray', 'timm', 'optuna') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
