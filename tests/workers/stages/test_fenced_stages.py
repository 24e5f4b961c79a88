"""Two runners of one stage, because the lease of one went to the other: what the first to commit has written stays whole."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.study.load import load_study
from tests.studies import tiny_study
from workers import artefact
from workers.node.deadline import Deadline
from workers.node.lease import LeaseLost, generations
from workers.node.storage import LocalStorage
from workers.run import workbench
from workers.stages import runners
from workers.stages.cache import ensure
from workers.stages.graph import Stage, compile_recipe, prefix
from workers.stages.workbench import Workbench
from workers.trial import Recipe, StageRun, TrialSpec


class Watched(LocalStorage):
    """Calls ``before`` with the name of whatever is to be written."""

    before: Callable[[str], None] = staticmethod(lambda name: None)

    def put_atomic(self, name: str, data: bytes) -> None:
        self.before(name)
        super().put_atomic(name, data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self.before(name)
        return super().put_if_absent(name, data)


class Two:
    """A runner and its successor, whose trainings give different weights, as those of two kinds of machines do."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        context = load_study(tiny_study()).context()
        self.storage = Watched(folder)
        self.spec = TrialSpec("s", "t", Recipe(), 0, context, self.storage.url)
        self.stage: Stage = compile_recipe(Recipe(), 0, context)[0]
        self.first, self.second = self._bench(), self._bench()
        self.runs: dict[str, StageRun] = {}
        self.in_training: Callable[[], None] = lambda: None
        self.successor_in_training: Callable[[], None] = lambda: None
        train = runners.loop.train

        def other_weights(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
            done = train(model, *arguments, **options)
            succeeds = self.second.lease is not None and threading.current_thread() is not threading.main_thread()
            with torch.no_grad():
                model.get_submodule("head").bias.add_(2.0 if succeeds else 1.0)
            (self.successor_in_training if succeeds else self.in_training)()
            return done

        monkeypatch.setattr(runners.loop, "train", other_weights)

    def _bench(self) -> Workbench:
        bench = workbench(self.spec, Deadline(None), {})
        bench.storage = self.storage
        return bench

    def succeed(self) -> threading.Thread:
        """Lets the successor, in a thread, find the first runner silent for too long."""
        assert self.first.lease is not None
        record = json.dumps({**self.first.lease.owner, "state": "failed"})
        self.storage.put_atomic(f"{self.folder}/leases/000001.json", record.encode())
        thread = threading.Thread(target=self._run_second)
        thread.start()
        wait(lambda: generations(self.storage, f"{self.folder}/leases") == 2)
        return thread

    def _run_second(self) -> None:
        self.runs["second"] = ensure(self.second, self.stage)

    def run(self) -> None:
        self.runs["first"] = ensure(self.first, self.stage)

    @property
    def folder(self) -> str:
        return prefix(self.stage.key)

    def committed(self) -> bool:
        return self.storage.exists(f"{self.folder}/manifest.json")

    def check(self, winner: str, start: int) -> None:
        """One runner's files are there, whole, and both runners know it."""
        assert {name: run.cached for name, run in self.runs.items()} == {
            name: name != winner for name in ("first", "second")
        }
        number = "" if start == 1 else f".{start:06d}"
        tensors, probe = f"model{number}.safetensors", f"probe{number}.safetensors"
        assert self.storage.files(self.folder) == sorted(["manifest.json", tensors, probe])
        for bench in (self.first, self.second):
            bench.check_parity(self.stage, bench.load(self.stage.key))
        shipped = artefact.files(self.first.folder(self.stage.key))
        assert list(shipped) == ["model.safetensors", "manifest.json"]
        assert json.loads(shipped["manifest.json"])["tensors"]["file"] == "model.safetensors"
        assert artefact.size_bytes(self.first.folder(self.stage.key)) == sum(map(len, shipped.values()))


def wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Two:
    return Two(tmp_path, monkeypatch)


def test_a_successor_that_has_finished(two: Two) -> None:
    two.in_training = lambda: two.succeed().join()
    two.run()
    two.check("second", start=2)


def test_a_successor_that_runs_is_waited_for(two: Two) -> None:
    two.in_training = lambda: threads.append(two.succeed())
    two.successor_in_training = lambda: wait(lambda: two.first.lease is None)  # the other one has noticed
    threads: list[threading.Thread] = []
    two.run()
    threads[0].join()
    two.check("second", start=2)


def test_a_successor_that_finishes_just_before_the_manifest_is_written(two: Two) -> None:
    def before(name: str) -> None:
        if name.endswith("/manifest.json") and threading.current_thread() is threading.main_thread():
            two.succeed().join()

    two.storage.before = before
    two.run()
    two.check("second", start=2)


def test_a_successor_that_is_outrun(two: Two) -> None:
    """The first runner looks for a successor, is stopped, and goes on to write the manifest while the successor trains."""

    def before(name: str) -> None:
        if name.endswith("/manifest.json") and threading.current_thread() is threading.main_thread():
            threads.append(two.succeed())

    threads: list[threading.Thread] = []
    two.storage.before = before
    two.successor_in_training = lambda: wait(two.committed)
    two.run()
    threads[0].join()
    two.check("first", start=1)


def test_what_a_killed_runner_left_goes_with_its_successor(two: Two) -> None:
    two.storage.put_atomic(f"{two.folder}/leases/000001.json", b'{"state": "failed"}')
    two.storage.put_atomic(f"{two.folder}/model.safetensors", b"half of a model")
    two.storage.put_atomic(f"{two.folder}/probe.safetensors", b"its logits")
    two.run()
    two.runs["second"] = ensure(two.second, two.stage)
    two.check("first", start=2)


def test_a_training_ends_when_a_successor_is_seen(two: Two) -> None:
    """Not only at the end of hours: the heart has seen it, the next tick ends it."""
    seen: list[bool] = []

    def lost() -> None:
        two.succeed().join()
        assert two.first.lease is not None
        two.first.lease._renew(1)
        with pytest.raises(LeaseLost):
            two.first.tick()
        seen.append(two.first.lease.lost)

    two.in_training = lost
    two.run()
    assert seen == [True]
    two.check("second", start=2)
