"""Storages that fill up, close or vanish under a running study: real mounts, real drivers. No recipe pays for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import Mount, mounted
from tests.processes import Study, kill_group, until
from tests.studies import fault_study
from workers import artefact
from workers.node.storage import LocalStorage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


FAULTS: dict[str, tuple[Callable[[Mount], object], Callable[[Mount], object], str]] = {
    "full": (Mount.fill, lambda disk: (disk.folder / "filler").unlink(), "No space left on device"),
    "read-only": (lambda disk: disk.remount("ro"), lambda disk: disk.remount("rw"), "Read-only file system"),
    "gone": (Mount.mount, Mount.unmount, "is another folder than before: was its file system unmounted"),
}


@pytest.mark.parametrize(
    "fault", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("read-only", "gone"))]
)
def test_a_study_pauses_while_its_storage_cannot_be_used_and_loses_no_recipe(tmp_path: Path, fault: str) -> None:
    with mounted(tmp_path / "results", "48m") as disk:
        breaks, mends, words = FAULTS[fault]
        mark = str(tmp_path / "raised")
        config = fault_study("s", ["raise_once", "none"], trials=4, retries=1)
        study = Study(tmp_path, config, VITPARETO_FAULT_MARK=mark)
        output = run_until_the_third_row(study, lambda: breaks(disk))
        last = next(line for line in output.splitlines() if line.startswith("stopped early: storage: "))
        assert words in last
        assert f"; go on with: vitpareto resume s --storage {study.storage.url}" in last
        assert "Traceback" not in output
        mends(disk)
        done = study.attempts()
        assert {r["status"] for r in done} <= {"ok", "error", "storage_fault"}
        assert sum(r["status"] == "error" for r in done) == 1, "the one that was told to raise"

        baseline = next(iter(study.completed() & {s["key"] for s in json.loads(done[0]["stages"])}))
        truncated = disk.folder / "stages" / baseline / artefact.TENSORS
        truncated.write_bytes(truncated.read_bytes()[:1000])
        refused = study.finish("resume", "s", "--quiet", "--retry", "eror", status=2)
        assert "--retry eror: must be of infeasible, " in refused
        study.finish("resume", "s", "--quiet", "--retry", "error")
        rows = study.ledger.trials(["status"]).to_pylist()
        assert [r["status"] for r in rows] == ["ok"] * 5, "4 trials and the baseline"
        assert not list(disk.folder.glob("**/.*")), "nothing half-written is left"
        assert not study.marks()


def run_until_the_third_row(study: Study, breaks: Callable[[], object]) -> str:
    """Runs a study whose storage ``breaks`` when its third row was written; returns what it printed."""
    study.hold("3")
    process = study.start()
    try:
        until(study.held, process)  # who wrote it, and whoever comes after
        breaks()
        study.release()
        output = process.communicate()[0]
    finally:
        kill_group(process)
    assert process.returncode == 1, output
    return str(output)


@pytest.mark.slow  # over a minute: three nodes, two studies
def test_a_node_that_does_not_see_the_storage_gets_no_work(tmp_path: Path) -> None:
    with mounted(tmp_path / "results"):
        pass  # skips where nothing can be mounted
    config = fault_study("s", ["none"], trials=6)
    study = Study(tmp_path, config, RAY_AUTH_MODE="disabled")
    command = [sys.executable, "-m", "tests.blind_nodes", str(study.file), study.storage.url]
    done = subprocess.run(command, env=study.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seen, alone = json.loads(done.stdout.splitlines()[-1])
    assert seen["complete"]
    assert [r["status"] for r in study.attempts()] == ["ok"] * 7
    warned = [line for line in done.stderr.splitlines() if " gets no work: " in line]
    nodes = Counter(line.split("Ray node ")[1].split()[0] for line in warned)
    assert len(nodes) == 2
    assert max(nodes.values()) <= 2, "each of the two nodes once a study, if it answered before the study ended"
    assert all("does not see the study's storage" in line for line in warned)
    assert not alone["complete"]
    assert alone["reason"].startswith("storage: no node sees the study's storage: ")
    assert alone["done"] == 0
    assert LocalStorage(tmp_path / "results").files("s_alone/attempts") == []
