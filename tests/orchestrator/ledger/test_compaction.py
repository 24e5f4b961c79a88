"""Compaction loses and repeats nothing, whoever is killed or reads meanwhile."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from orchestrator.ledger import Ledger, LedgerError, compaction
from tests import ledger_rows
from tests.ledger_rows import STUDY, files, ids, make_row, synthetic
from tests.places import ROOT
from workers.node.storage import LocalStorage, Storage, StorageFault

storage = ledger_rows.storage


class Killed(Exception):
    pass


class KilledAt:
    """A storage whose process dies before its ``n``-th write or deletion."""

    def __init__(self, storage: Storage, n: int) -> None:
        self.inner, self.left = storage, n

    def __getattr__(self, name: str):
        method = getattr(self.inner, name)
        if name not in ("put_atomic", "put_if_absent", "delete"):
            return method

        def counted(*args):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return method(*args)

        return counted


def test_killed_at_any_point_nothing_is_lost_or_repeated(storage):
    for row in range(3):
        Ledger(storage, STUDY).write_attempt(make_row(row))
    Ledger(storage, STUDY).compact()
    for n in range(40):
        ledger = Ledger(storage, STUDY)
        for k in range(3):
            ledger.write_attempt(make_row(100 * (n + 1) + k))
        expected = 3 * (n + 2)
        dying = Ledger(KilledAt(storage, n), STUDY)  # type: ignore[arg-type]
        try:
            dying.compact()
            finished = True
        except Killed:
            finished = False
        assert len(set(ids(ledger))) == len(ids(ledger)) == expected, n
        assert ledger.trials(["attempts"])["attempts"].to_pylist() == [1] * expected
        assert ledger.measurements(["trial_id"]).num_rows == expected
        assert ledger.problems() == []
        ledger.compact()
        assert len(ids(ledger)) == expected
        assert len(files(storage, "attempts")) <= 3, "what the newest generation took in is deleted with the next one"
        assert len([f for f in files(storage, "ledger") if f.startswith("manifest")]) <= 2
        if finished:
            return
    raise AssertionError("never finished")


class Unsure:
    """A storage that does what it is told, and answers a write as if it had not, or not at all."""

    def __init__(self, storage: Storage, seed: int) -> None:
        self.inner, self.chance = storage, random.Random(seed)

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self.inner.put_if_absent(name, data)
        if self.chance.random() < 0.5:
            return False
        raise StorageFault("the answer was lost")


@pytest.mark.parametrize("seed", range(4))
def test_answers_that_are_lost_lose_no_row(storage, seed):
    """Told that it lost, the winner of a generation deleted the parts that its own manifest named: 17 trials became 0."""
    for n in range(17):
        Ledger(storage, STUDY).write_attempt(make_row(n))
    for _ in range(4):
        try:
            Ledger(Unsure(storage, seed), STUDY).compact()  # type: ignore[arg-type]
        except StorageFault:
            continue
        finally:
            ledger = Ledger(storage, STUDY)
            assert len(ids(ledger)) == len(set(ids(ledger))) == 17
            assert ledger.problems() == []


def test_what_is_written_wrongly_replaces_nothing(storage):
    class Rotten(Unsure):
        put_if_absent = property(lambda self: self.inner.put_if_absent)  # type: ignore[assignment]

        def put_atomic(self, name: str, data: bytes) -> None:
            self.inner.put_atomic(name, data[:-1])

    for n in range(17):
        Ledger(storage, STUDY).write_attempt(make_row(n))
    with pytest.raises(LedgerError, match="reads as something else"):
        Ledger(Rotten(storage, 0), STUDY).compact()  # type: ignore[arg-type]
    assert len(ids(Ledger(storage, STUDY))) == 17
    assert Ledger(storage, STUDY).compact() == 17


def test_a_second_compactor_loses_and_deletes_nothing(storage, monkeypatch):
    first, second = Ledger(storage, STUDY), Ledger(storage, STUDY)
    first.write_attempt(make_row(1))
    real = compaction.parquet_bytes

    def overtaken(table):
        monkeypatch.setattr(compaction, "parquet_bytes", real)
        second.write_attempt(make_row(2))
        assert second.compact() == 2
        return real(table)

    monkeypatch.setattr(compaction, "parquet_bytes", overtaken)
    assert first.compact() == 0
    assert ids(first) == ["a1x0", "a2x0"]
    assert len(files(storage, "ledger")) == 3


def test_a_stale_compactor_that_creates_an_old_generation_loses(storage, monkeypatch):
    first, second = Ledger(storage, STUDY), Ledger(storage, STUDY)
    first.write_attempt(make_row(1))
    real = compaction.parquet_bytes

    def overtaken_twice(table):
        monkeypatch.setattr(compaction, "parquet_bytes", real)
        for n in (2, 3):
            second.write_attempt(make_row(n))
            second.compact()
        return real(table)

    monkeypatch.setattr(compaction, "parquet_bytes", overtaken_twice)
    assert first.compact() == 0
    first.write_attempt(make_row(4))
    first.compact()
    assert ids(first) == ["a1x0", "a2x0", "a3x0", "a4x0"]
    assert first.problems() == []


def test_an_attempt_written_again_after_compaction_stays_one(storage):
    ledger = Ledger(storage, STUDY)
    for _ in range(3):
        ledger.write_attempt(make_row(1))
        ledger.compact()
    assert ids(ledger) == ["a1x0"]
    assert ledger.measurements().num_rows == 1
    assert ledger.trials(["attempts"])["attempts"].to_pylist() == [1]


def test_files_stay_few_and_rows_are_seldom_rewritten(tmp_path, monkeypatch):
    ledger, written = Ledger(LocalStorage(tmp_path), STUDY), []
    real = compaction.parquet_bytes
    monkeypatch.setattr(compaction, "parquet_bytes", lambda t: written.append(len(t)) or real(t))
    for n in range(64):
        ledger.append(synthetic(10, start=10 * n))
    assert len(ids(ledger)) == 640
    assert len(files(ledger.storage, "ledger")) <= 2 * 7 + 1
    assert sum(written) <= 640 * 8
    assert ledger.compact(min_rows=1) == 0


READER = """
import sys
from orchestrator.ledger import Ledger
from workers.node.storage import open_storage
ledger, last = Ledger(open_storage(sys.argv[1]), "digits"), set()
while len(last) < int(sys.argv[2]):
    found = ledger.attempts(["attempt_id"])["attempt_id"].to_pylist()
    trials, measured = ledger.trials(["trial_id", "status"]).num_rows, ledger.measurements(["attempt_id"]).num_rows
    assert len(found) == len(set(found)), "an attempt was seen twice"
    assert last <= set(found), f"attempts disappeared: {last - set(found)}"
    assert trials >= len(found) and measured >= len(found)
    assert ledger.problems() == [], ledger.problems()
    last = set(found)
    print(len(last), flush=True)
"""


def test_a_second_process_always_sees_a_consistent_state(tmp_path):
    total = 120
    command = [sys.executable, "-c", READER, str(tmp_path), str(total)]
    ledger, rng = Ledger(LocalStorage(tmp_path), STUDY), np.random.default_rng(0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as reader:
        try:
            for n in range(total):
                if n % 10 == 0:  # the reader's next look races with the next rows, however busy the machine is
                    assert any(int(line) >= n for line in reader.stdout), "the reader has ended"
                ledger.write_attempt(make_row(n))
                if rng.random() < 0.4:
                    ledger.compact()
            reader.communicate()
            assert reader.returncode == 0
        finally:
            reader.kill()
