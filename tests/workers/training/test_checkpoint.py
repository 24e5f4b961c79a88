"""A training that was killed goes on where it was, to the same bit; what is damaged or foreign is passed over."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.study.load import load_study
from tests.probes import SETTINGS, Config, make_model, make_split, technique, weights
from tests.processes import until
from tests.studies import tiny_study
from workers import artefact
from workers.node import deadline
from workers.node.deadline import DeadlineExceeded
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.stages.graph import compile_recipe
from workers.training import checkpoint, loop
from workers.training.checkpoint import Checkpoints
from workers.training.loop import TrainingDiverged, TrainingReport, train
from workers.trial import Recipe, TrialSpec

FOLDER = "stages/k/training"
ALWAYS = 1e-9
"""Seconds between two states: one after every step."""


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def _states_at_any_price(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checkpoint, "MOST_SHARE", math.inf)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


def fit(
    model: nn.Module,
    storage: LocalStorage | None,
    *,
    kill_at: int | None = None,
    tick: Callable[[], None] = lambda: None,
    **more: Any,
) -> TrainingReport:
    """Trains; ``kill_at`` ends it before that step, counted from 0 over the whole training."""

    def count(module: nn.Module, config: Config, progress: float) -> None:
        if kill_at is not None and round(progress * total) == kill_at:
            raise Killed

    split = make_split()
    settings = {**SETTINGS, "epochs": 4, "checkpoint_s": ALWAYS, **more}
    total = settings["epochs"] * math.ceil(len(split) / settings["batch_size"])
    checkpoints = None if storage is None else Checkpoints(storage, FOLDER, "identity")
    steps = [(technique(on_progress=count), Config())]
    return train(
        model, split, settings, seed=3, device="cpu", steps=steps, validation=split, checkpoints=checkpoints, tick=tick
    )


def killed(storage: LocalStorage, at: int, **more: Any) -> None:
    with pytest.raises(Killed):
        fit(make_model(0.3), storage, kill_at=at, **more)


KINDS: list[dict[str, Any]] = [
    {"ema_decay": 0.9, "patience": 3, "augment": "flip_crop", "mixup": 0.2},
    {"optimizer": "sgd", "lr": 0.1, "amp": "fp16", "accumulate": 2},
]


@pytest.mark.parametrize("at", [1, 4, 7, 15])  # in an epoch, after its last batch, later, before the last step
@pytest.mark.parametrize("settings", KINDS, ids=["adamw", "sgd"])
def test_going_on_ends_at_the_same_weights(storage: LocalStorage, settings: dict[str, Any], at: int) -> None:
    whole = make_model(0.3)
    expected = fit(whole, None, **settings)
    killed(storage, at, **settings)
    model = make_model(0.3)
    report = fit(model, storage, **settings)
    assert torch.equal(weights(model), weights(whole))
    assert report.resumed_at == at
    assert (report.steps, report.final_loss, report.best_epoch) == (
        expected.steps,
        expected.final_loss,
        expected.best_epoch,
    )


def test_going_on_twice(storage: LocalStorage) -> None:
    whole = make_model(0.3)
    fit(whole, None)
    killed(storage, 3)
    killed(storage, 9)
    model = make_model(0.3)
    assert fit(model, storage).resumed_at == 9
    assert torch.equal(weights(model), weights(whole))


class Drift(nn.Module):
    """Counts its calls in a buffer that the state dict leaves out, and adds them up to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model(0.3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + (1 if self.training else 0)
        out: Tensor = self.inner(x) * (1 + 0.01 * self.calls)
        return out


def test_buffers_outside_the_state_dict_are_part_of_the_state(storage: LocalStorage) -> None:
    whole, model = Drift(), Drift()
    fit(whole, None)
    with pytest.raises(Killed):
        fit(Drift(), storage, kill_at=6)
    fit(model, storage)
    assert model.calls == whole.calls == 16
    assert torch.equal(weights(model), weights(whole))


def test_two_generations_are_kept_and_are_no_pickles(storage: LocalStorage) -> None:
    killed(storage, 5)
    names = storage.files(FOLDER)
    assert [n.split(".")[0] for n in names] == ["000004", "000004", "000005", "000005"]
    assert {n.rsplit(".", 1)[1] for n in names} == {"json", "safetensors"}
    record = json.loads(storage.read(f"{FOLDER}/000005.json"))
    assert record["values"]["done"] == 5
    Checkpoints(storage, FOLDER, "identity").clear()
    assert storage.files(FOLDER) == []


def damage(storage: LocalStorage, number: int, how: str) -> None:
    json_name = f"{FOLDER}/{number:06d}.json"
    record = json.loads(storage.read(json_name))
    tensors = f"{FOLDER}/{record['tensors']}"
    if how == "truncated":
        storage.put_atomic(tensors, storage.read(tensors)[:-5])
    elif how == "flipped":
        data = bytearray(storage.read(tensors))
        data[-3] ^= 1
        storage.put_atomic(tensors, bytes(data))
    elif how == "absent":
        storage.delete(tensors)
    elif how == "no json":
        storage.put_atomic(json_name, b"{")
    else:
        storage.put_atomic(json_name, json.dumps({**record, how: "other"}).encode())


@pytest.mark.parametrize("how", ["truncated", "flipped", "absent", "no json", "identity", "format"])
def test_a_damaged_or_foreign_state_is_passed_over(
    storage: LocalStorage, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, model = make_model(0.3), make_model(0.3)
    fit(whole, None)
    killed(storage, 7)
    damage(storage, 7, how)
    assert fit(model, storage).resumed_at == 6
    assert torch.equal(weights(model), weights(whole))
    assert "000007.json: this state of a training is passed over" in caplog.text


def test_a_state_of_another_model_or_length_is_passed_over(
    storage: LocalStorage, caplog: pytest.LogCaptureFixture
) -> None:
    killed(storage, 7)
    wider = nn.Sequential(nn.Flatten(), nn.Linear(9, 17), nn.GELU(), nn.Linear(17, 3))
    assert fit(wider, storage).resumed_at == 0
    assert "it is of another model, device or number of steps" in caplog.text
    Checkpoints(storage, FOLDER, "identity").clear()
    killed(storage, 7)
    assert fit(make_model(0.3), storage, epochs=5).resumed_at == 0
    Checkpoints(storage, FOLDER, "identity").clear()
    killed(storage, 7)
    assert fit(make_model(0.3), storage, ema_decay=0.9).resumed_at == 0


def test_short_trainings_write_nothing(storage: LocalStorage) -> None:
    for every in (120.0, None):
        killed(storage, 7, checkpoint_s=every)
        assert storage.files(FOLDER) == []


def test_writing_takes_a_small_share_of_the_time(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MOST_SHARE", 0.05)
    checkpoints = Checkpoints(storage, FOLDER, "identity")
    assert checkpoints.due(0.0)
    checkpoints._cost_s = 1000.0  # a state that took so long comes again after 20 times that
    assert not checkpoints.due(0.0)
    checkpoints._written -= 20_001
    assert checkpoints.due(0.0)


def test_a_diverged_training_leaves_nothing_to_go_on_from(storage: LocalStorage) -> None:
    with pytest.raises(TrainingDiverged):
        fit(make_model(), storage, optimizer="sgd", lr=1e20, grad_clip=None)
    assert storage.files(FOLDER) == []


@pytest.mark.parametrize("at", [1, 4, 7, 15])
def test_what_was_done_by_the_deadline_is_kept(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Whatever ``checkpoint_s`` says: an interval longer than the limit would never keep anything."""
    monkeypatch.setattr(loop, "CHUNK_S", 0.0)
    looks: list[int] = []

    def tick() -> None:
        looks.append(1)
        if len(looks) == ticks:
            raise DeadlineExceeded("60.0 s of work of 60 s allowed")

    whole, model, ticks = make_model(0.3), make_model(0.3), at + (at - 1) // 4  # one more a finished epoch of 4 steps
    fit(whole, None)
    with pytest.raises(DeadlineExceeded) as caught:
        fit(make_model(0.3), storage, checkpoint_s=3600.0, tick=tick)
    assert f"allowed; the training had done {at} of 16 steps (epoch {(at - 1) // 4 + 1} of 4), and would" in str(
        caught.value
    )
    assert str(caught.value).endswith(f"; the next try goes on from step {at}")
    assert fit(model, storage).resumed_at == at
    assert torch.equal(weights(model), weights(whole))


def test_a_baseline_that_is_cut_off_again_and_again_comes_further_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline, "GRACE", 100.0)  # a busy machine may take long for a step
    context = load_study(tiny_study(training={"baseline": {"epochs": 100_000}})).context()
    spec = TrialSpec("s", "t", Recipe(), 0, context, LocalStorage(tmp_path).url, timeout_s=1.0)
    steps = []
    for _ in range(2):
        result = run_trial(spec)
        assert result.status == "timeout"
        assert "budget.trial_timeout must not be exceeded" in str(result.failure)
        steps.append(int(str(result.failure).split("the next try goes on from step ")[1].split()[0]))
    assert 0 < steps[0] < steps[1]


SAVES_AND_WAITS = """
import sys, time
from workers.__main__ import main
from workers.training.checkpoint import Checkpoints
write = Checkpoints.write
def write_and_wait(*arguments):
    write(*arguments)
    time.sleep(86400)
Checkpoints.write = write_and_wait
sys.exit(main())
"""
"""`python -m workers` that stays where it has saved its first state, to be killed there however busy the machine is."""


def test_a_killed_process_costs_the_stage_nothing_that_was_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real process, killed with SIGKILL in the middle of its baseline training, and another that runs the trial again."""
    training = {"baseline": {"epochs": 10, "checkpoint_s": 0.001, "ema_decay": 0.99, "patience": 50}}
    context = load_study(tiny_study(training=training)).context()
    specs = {
        name: TrialSpec("s", "t", Recipe(), 0, context, LocalStorage(tmp_path / name).url)
        for name in ("killed", "whole")
    }
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(specs["killed"].to_dict()))
    storage = LocalStorage(tmp_path / "killed")
    key = compile_recipe(Recipe(), 0, context)[0].key
    command = [sys.executable, "-c", SAVES_AND_WAITS, str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        until(lambda: [n for n in storage.files(f"stages/{key}/training") if n.endswith(".json")], process)
    finally:
        process.kill()
        process.communicate()
    with caplog.at_level("INFO", logger="vitpareto"):
        for spec in specs.values():
            assert run_trial(spec).status == "ok"
    assert [m for m in caplog.messages if "going on" in m] == ["going on after step 1 of 50"]
    assert storage.files(f"stages/{key}/training") == []
    killed, whole = (artefact.files(tmp_path / name / "stages" / key) for name in specs)
    assert killed == whole
