"""The package from Python: what `import orchestrator` offers, and the example of docs/python-api.md, run as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

import orchestrator
from tests.places import ROOT

PAGE = ROOT / "docs" / "python-api.md"


def test_importing_it_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, orchestrator; print({'torch', 'ray', 'optuna', 'pyarrow'} & set(sys.modules), dir(orchestrator))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("set() [")
    assert "run_study" in done.stdout


def test_every_public_name_is_there_and_on_the_page() -> None:
    for name in orchestrator.__all__:
        assert getattr(orchestrator, name).__doc__, name
        assert name in PAGE.read_text()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'; it has Ledger, StudyRun, load_study"):
        orchestrator.nonsense  # noqa: B018


def test_a_ledger_that_is_not_there(tmp_path: Path) -> None:
    from orchestrator.ledger.studies import StorageError, StudyNotFound

    with pytest.raises(StudyNotFound, match=r"there is no study 'x' in .*; studies there: none"):
        orchestrator.open_ledger("x", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="must be a folder"):
        orchestrator.open_ledger("x", tmp_path / "file")


@pytest.mark.ray
def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(PAGE.read_text().split("```python\n")[1].split("```")[0], names)
    printed = capsys.readouterr()
    assert printed.out.startswith("3 {} 0.")
    assert printed.err == "", "quiet"
    done = names["done"]
    assert (done.name, done.done, done.complete, done.folder) == ("first", 3, True, str(tmp_path / "results" / "first"))
    trials, frame, front = names["trials"], names["frame"], names["front"]
    assert isinstance(trials, pa.Table)
    assert isinstance(frame, pd.DataFrame)
    assert (len(trials), list(frame.columns)) == (4, ["trial_id", "label", "status", "top1_pct", "size_bytes"])
    assert set(front["trial_id"].to_pylist()) <= set(frame["trial_id"])
    assert names["small"].column_names == ["label"]
    assert orchestrator.run_study(names["study"], storage="results", quiet=True).done == 3
