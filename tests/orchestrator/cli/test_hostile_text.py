"""Failures, cells and labels with what a terminal would obey: commands show them and obey nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.ledger import Ledger
from tests.cli_calls import call
from tests.ledger_rows import make_row
from tests.orchestrator.test_old_results import NAME, WRITTEN
from workers.node.storage import open_storage

EVIL = "boom \x1b]0;owned\x07\x1b[2J\u202eline\none\r\x9btwo\tend"
SHOWN = r"boom \x1b]0;owned\x07\x1b[2J\u202eline one \x9btwo end"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(WRITTEN, tmp_path_factory.mktemp("evil") / "storage"))
    row = make_row(3, status="error", context="98bffa91a83a6f17")
    row |= {"failure": EVIL, "label": EVIL, "trial_id": "e" * 12, "study": NAME}
    Ledger(open_storage(folder), NAME).write_attempt(row)
    (folder / NAME / "attempts" / "bad\x1b[2J.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("query", NAME, "select failure, label, 1 as \"\x1b[2J\" from trials where status = 'error'"),
        ("show", NAME, "e" * 12),
        ("status", NAME),
        ("query", NAME, "select '\x1b[2J' from nowhere"),
        ("show", NAME, "\x1b[2J"),
        ("pareto", NAME, "--where", "\x1b[2J"),
    ],
)
def test_a_terminal_obeys_nothing(storage: Path, arguments: tuple[str, ...]) -> None:
    done = call(*arguments, storage=storage)
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert not any(c for c in text.replace("\n", "") if not c.isprintable()), text


def test_text_is_shown_and_files_keep_it(storage: Path) -> None:
    statement = "select failure from trials where status = 'error'"
    assert SHOWN.replace("\n", " ") in call("query", NAME, statement, storage=storage).stdout
    (row,) = json.loads(call("query", NAME, statement, "--format", "json", storage=storage).stdout)
    assert row["failure"] == EVIL
    assert EVIL.replace('"', '""') in call("query", NAME, statement, "--format", "csv", storage=storage).stdout
