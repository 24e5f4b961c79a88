"""What a trial's process does where the storage does not take its attempt, or is another one: it tells its driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from orchestrator.sweep.trainable import run_specs
from orchestrator.sweep.worker_failures import blind_node, blind_words
from tests.mounts import Mount, mounted
from tests.studies import tiny_study
from workers.node.storage import LocalStorage
from workers.node.storage_faults import StorageNotSeen, check_seen
from workers.trial import Recipe, TrialResult, TrialSpec

TOKEN = "of this study"
ON_THE_WAY: list[Callable[[], object]] = []
"""What happens to the storage while the trial runs."""


def trial(spec: TrialSpec) -> TrialResult:
    for happen in ON_THE_WAY:
        happen()
    return TrialResult(spec.trial_id, "1", "ok", None, {"top1_pct": 1.0, "size_bytes": 2.0}, 1.0, 0.1)


def run(disk: Mount, *on_the_way: Callable[[], object]) -> list[dict[str, Any]]:
    ON_THE_WAY[:] = on_the_way
    context = load_study(tiny_study()).context()
    spec = TrialSpec("s", "0123456789ab", Recipe(), 0, context, str(disk.folder), TOKEN)
    here = "tests.orchestrator.sweep.test_trainable:trial"
    return run_specs({"specs": [spec.to_dict()], "optuna": None, "runner": here})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    with mounted(tmp_path / "results") as made:
        yield made


@pytest.fixture
def ledger(disk: Mount) -> Ledger:
    made = Ledger(LocalStorage(disk.folder), "s")
    made.write_study({"token": TOKEN})
    return made


def test_an_attempt_that_cannot_be_written_is_told_to_the_driver(disk: Mount, ledger: Ledger) -> None:
    def told(*on_the_way: Callable[[], object]) -> str:
        (outcome,) = run(disk, *on_the_way)
        assert (outcome["status"], outcome["written"], outcome["metrics"]) == ("storage_fault", False, {})
        return str(outcome["failure"])

    assert "No space left on device" in told(disk.fill)
    assert "No space left on device" in told(), "also before the trial"
    (disk.folder / "filler").unlink()
    assert "Read-only file system" in told(lambda: disk.remount("ro"))
    disk.remount("rw")
    assert len(ledger.attempts(["attempt_id"])) == 0
    assert [o["status"] for o in run(disk)] == ["ok"]
    assert ledger.attempts(["status"])["status"].to_pylist() == ["ok"]
    assert ledger.running() == {}


def test_a_mount_that_is_lost_on_the_way_gets_no_attempt(disk: Mount, ledger: Ledger) -> None:
    for on_the_way in ([disk.mount], []):  # an empty one over it
        with pytest.raises(StorageNotSeen, match="does not see the study's storage"):
            run(disk, *on_the_way)
        assert list(disk.folder.iterdir()) == [], "nobody would find it there"
    disk.unmount()
    assert [o["status"] for o in run(disk)] == ["ok"]
    assert len(ledger.attempts(["attempt_id"])) == 1


@pytest.mark.parametrize("record", [None, "{", "[]", "{}", '{"token": "of another one"}'])
def test_a_node_sees_a_storage_by_the_study_s_token(tmp_path: Path, record: str | None) -> None:
    storage = LocalStorage(tmp_path)
    if record is not None:
        storage.put_atomic("s/study.json", record.encode())
    check_seen(storage, "s", "")
    with pytest.raises(StorageNotSeen):
        check_seen(storage, "s", TOKEN)
    storage.put_atomic("s/study.json", f'{{"token": "{TOKEN}"}}'.encode())
    check_seen(storage, "s", TOKEN)


def test_the_driver_reads_which_node_is_blind_from_ray_s_words() -> None:
    words = "ray.exceptions.RayTaskError(StorageNotSeen): ray::step() (pid=7)\n  File ...\n"
    words += "workers.node.storage_faults.StorageNotSeen: " + blind_words("a node does not see it: mount it", "0af3")
    assert blind_node(words) == ("0af3", "a node does not see it: mount it")
    assert blind_node("the worker is gone") is None
    assert blind_words("outside of Ray", None) == "outside of Ray"
