"""A damaged ledger is usable again after a repair: what can be read is kept, what is lost is named, nothing is deleted."""

from __future__ import annotations

import json

import pytest

from orchestrator.ledger import Ledger, LedgerError
from orchestrator.ledger.repair import repair
from orchestrator.ledger.schema import ATTEMPTS, MEASUREMENTS
from tests import ledger_rows
from tests.ledger_rows import STUDY, files, flip, make_row, settle
from workers.node.lease import acquire
from workers.node.storage import Storage

storage = ledger_rows.storage

RECORD = {
    "config": {"trials": 3, "objectives": {"params": "minimize"}, "techniques": {"tome": {}}, "constraints": []},
    "context": "one",
    "token": "t",
    "complete": True,
}


def written(storage: Storage, count: int = 4) -> Ledger:
    ledger = Ledger(storage, STUDY)
    ledger.write_study(RECORD)
    for n in range(count):
        ledger.write_attempt(make_row(n))
    ledger.compact()
    settle(storage)
    return ledger


def part(storage: Storage, kind: str) -> str:
    return f"{STUDY}/ledger/{[f for f in files(storage, 'ledger') if f.startswith(kind)][-1]}"


def rows(storage: Storage) -> tuple[list, list]:
    ledger = Ledger(storage, STUDY)
    return (
        ledger.attempts().sort_by("attempt_id").to_pylist(),
        ledger.measurements().sort_by("attempt_id").to_pylist(),
    )


def aside(storage: Storage, file: str) -> list[bytes]:
    times = storage.folders(f"{STUDY}/damaged")
    names = [f"{STUDY}/damaged/{time}/{file.removeprefix(f'{STUDY}/')}" for time in times]
    return [storage.read(name) for name in names if storage.exists(name)]


def test_a_whole_study_is_left_alone(storage):
    written(storage)
    before = files(storage, "ledger")
    done = repair(storage, STUDY, apply=True)
    assert (done.needed, done.applied, done.trials, files(storage, "ledger")) == (False, False, 4, before)


@pytest.mark.parametrize("column", ["top1_pct", "recipe", "is_baseline", "number", "device"])
def test_a_damaged_column_comes_back_from_the_others(storage, column):
    ledger = written(storage)
    before = rows(storage)
    name = part(storage, "attempts")
    damaged = flip(storage, name, ATTEMPTS, column)
    dry = repair(storage, STUDY)
    assert (dry.applied, list(dry.aside), storage.read(name)) == (False, [name], damaged)
    done = repair(storage, STUDY, apply=True)
    assert (done.trials, done.recovered, done.lost, done.null_columns) == (4, 4, [], [])
    assert aside(storage, name) == [damaged]
    assert (Ledger(storage, STUDY).problems(), rows(storage)) == ([], before)
    assert ledger.study_record() == RECORD


def test_what_only_describes_may_be_lost(storage):
    written(storage)
    flip(storage, part(storage, "attempts"), ATTEMPTS, "provenance")
    flip(storage, part(storage, "measurements"), MEASUREMENTS, "samples")
    done = repair(storage, STUDY, apply=True)
    assert (done.recovered, done.lost, done.null_columns) == (4, [], ["provenance", "samples"])
    found = Ledger(storage, STUDY).attempts(["top1_pct", "provenance"]).to_pylist()
    assert [row["provenance"] for row in found] == [None] * 4
    assert None not in [row["top1_pct"] for row in found]


@pytest.mark.parametrize("how", ["column", "empty", "missing", "other"])
def test_lost_trials_are_named_and_are_to_be_run_again(storage, how):
    ledger = written(storage)
    name = part(storage, "attempts")
    if how == "column":
        flip(storage, name, ATTEMPTS, "status")
    elif how == "missing":
        storage.delete(name)
    else:
        storage.put_atomic(name, b"" if how == "empty" else storage.read(part(storage, "measurements")))
    ledger.write_attempt(make_row(7))
    done = repair(storage, STUDY, apply=True)
    assert done.lost == sorted(make_row(n)["trial_id"] for n in range(4))
    assert (done.trials, done.recovered) == (1, 0)
    assert Ledger(storage, STUDY).problems() == []
    assert [row["attempt_id"] for row in rows(storage)[1]] == ["a7x0"]  # no measurement of an attempt that is gone
    assert ledger.study_record() == {k: v for k, v in RECORD.items() if k != "complete"}


def test_lost_measurements_leave_the_trials(storage):
    written(storage)
    before = rows(storage)
    storage.put_atomic(part(storage, "measurements"), b"PAR1")
    done = repair(storage, STUDY, apply=True)
    assert (done.lost, done.trials) == ([], 4)
    assert done.without_records == sorted(row["trial_id"] for row in before[0])
    assert rows(storage) == (before[0], [])


def test_parts_of_older_generations_and_loose_files_count(storage):
    ledger = written(storage, 2)  # so few that the next compaction takes them in
    old = {name: storage.read(f"{STUDY}/ledger/{name}") for name in files(storage, "ledger") if name[0] != "m"}
    ledger.write_attempt(make_row(8))
    loose = f"{STUDY}/attempts/{files(storage, 'attempts')[0]}"
    content = storage.read(loose)
    ledger.compact()
    before = rows(storage)
    for name, data in old.items():  # as a compaction that was killed before it swept leaves them
        storage.put_atomic(f"{STUDY}/ledger/{name}", data)
    storage.put_atomic(loose, content)
    storage.put_atomic(part(storage, "attempts"), b"")
    done = repair(storage, STUDY, apply=True)
    assert (done.trials, done.recovered, done.lost) == (3, 2, [])
    assert (rows(storage), Ledger(storage, STUDY).problems()) == (before, [])
    assert Ledger(storage, STUDY).compact() == 1
    assert rows(storage) == before


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_ledger_without_its_manifest(storage, how):
    ledger = written(storage)
    ledger.write_attempt(make_row(8))
    ledger.compact(min_rows=2)
    before = rows(storage)
    name = f"{STUDY}/ledger/manifest-000001.json"
    storage.put_atomic(name, b"{") if how == "damaged" else storage.delete(name)
    done = repair(storage, STUDY, apply=True)
    assert (done.trials, done.lost) == (5, [])
    assert aside(storage, name) == ([b"{"] if how == "damaged" else [])
    assert (rows(storage), Ledger(storage, STUDY).problems()) == (before, [])
    assert Ledger(storage, STUDY).compact() == 1


def test_asks_are_written_anew_from_their_attempts(storage):
    ledger = Ledger(storage, STUDY)
    ledger.write_study(RECORD)
    row = make_row(1)
    ask = {"recipe": row["recipe"], "params": {"r": 1}, "distributions": {}, "system_attrs": {}}
    ledger.write_attempt({**row, "optuna": {**ask, "number": 1}})
    ledger.write_ask(row["context"], 1, {**ask, "specs": [row["spec"]]})
    before = ledger.asks(row["context"])
    name = f"{STUDY}/asks/{files(storage, 'asks')[0]}"
    storage.put_atomic(name, b'{"number": 1')
    assert ledger.asks(row["context"]) == []
    assert repair(storage, STUDY, apply=True).asks == 1
    assert ledger.asks(row["context"]) == before
    assert (aside(storage, name), ledger.problems()) == ([b'{"number": 1'], [])


def test_every_bad_file_is_set_aside(storage):
    ledger = written(storage)
    bad = {
        "attempts/notes.txt": b"notes",
        f"attempts/{make_row(9)['trial_id']}.x.json": b"{",
        "reports/0123.json": b"[]",
        "running/0123.json": b"7",
        "asks/one.00000003.json": b"{}",
        "baselines/one-cpu-latency.json": b"null",
        "ledger/readme.md": b"?",
        "frontier.parquet": b"PAR1",
        "study.json": b"{}",
    }
    for name, data in bad.items():
        storage.put_atomic(f"{STUDY}/{name}", data)
    done = repair(storage, STUDY, apply=True)
    assert set(done.aside) == {f"{STUDY}/{name}" for name in bad}
    assert done.lost == sorted({"0123", make_row(9)["trial_id"]})
    assert ledger.problems() == []
    assert all(aside(storage, name) == [data] for name, data in bad.items())


def test_what_is_newer_is_not_damaged(storage):
    written(storage)
    newer = json.dumps({**make_row(9), "schema_version": 99}).encode()
    storage.put_atomic(f"{STUDY}/attempts/{make_row(9)['trial_id']}.a9x0.json", newer)
    storage.put_atomic(part(storage, "attempts"), b"")
    with pytest.raises(LedgerError, match=r"99.*with the vitpareto that wrote it"):
        repair(storage, STUDY, apply=True)


def test_a_study_that_runs_is_not_repaired(storage):
    written(storage)
    lease = acquire(storage, f"{STUDY}/lease")
    assert lease is not None
    with lease, pytest.raises(LedgerError, match="is being run"):
        repair(storage, STUDY, apply=True)
    repair(storage, STUDY, apply=True)
