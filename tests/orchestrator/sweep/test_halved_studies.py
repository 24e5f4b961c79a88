"""Studies that are stopped early, with real trainings: what they save, and that a kill at any rung costs and changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.frontier.dominance import nondominated
from orchestrator.ledger import Ledger
from orchestrator.ledger.status import study_status
from orchestrator.study.load import load_study
from orchestrator.study.schema import model_info
from orchestrator.sweep.opening import open_sweep
from orchestrator.sweep.state import RUNNER
from orchestrator.sweep.trainable import run_specs
from tests.cli_calls import call
from tests.processes import Study, until
from tests.studies import ONE_WORKER, tiny_study
from workers.node.storage import LocalStorage
from workers.techniques import versions

EPOCHS = 8


def pruned(ratio: float, head: float = 0.0) -> list[dict[str, Any]]:
    return [{"magnitude_prune": {"head_ratio": head, "mlp_ratio": ratio, "round_to": 1}}]


def halved_study(name: str, recipes: list[Any], **changes: Any) -> dict[str, Any]:
    """Returns a study whose recipes are all given, so that it asks for the same ones whatever is stopped early."""
    study: dict[str, Any] = {
        "training": {
            "baseline": {"epochs": 3, "lr": 3e-3},
            "recovery": {"epochs": EPOCHS, "lr": 1e-3, "batch_size": 32},
        },
        "techniques": {
            "magnitude_prune": {
                "head_ratio": [0.0, 0.5],
                "mlp_ratio": {"low": 0.1, "high": 0.6, "step": 0.1},
                "round_to": [1],
            }
        },
        "recipes": recipes,
        "trials": len(recipes),
        "resources": ONE_WORKER,
    }
    return tiny_study(name, **{**study, **changes})


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_here(values: dict[str, Any], folder: Path) -> Ledger:
    """Runs a study in this process, one trial after the other, without Ray."""
    config, storage = load_study(values), LocalStorage(folder)
    context = config.context()
    ledger = Ledger(storage, config.name, config.parsed_constraints(), context.digest)
    ledger.write_study({"config": config.to_dict(), "token": "", "context": context.digest})
    place = {"storage_url": storage.url, "token": "", "versions": versions()}
    sweep = open_sweep(config, context, model_info(context), ledger, **place)
    while (work := sweep.next_work()) is not None:
        sweep.ended(work, run_specs(work.to_dict(RUNNER)))
    assert sweep.finished
    return ledger


def epochs(ledger: Ledger) -> Counter[str]:
    """Returns key of a recovery to the epochs of it that were trained, by the records of the stages."""
    found: Counter[str] = Counter()
    for row in ledger.attempts(["stages"]).to_pylist():
        for stage in json.loads(row["stages"] or "[]"):
            if stage["kind"] == "recovery":
                found[stage["key"]] += stage["epochs"]
    return found


def told(ledger: Ledger) -> list[tuple[Any, ...]]:
    rows = ledger.attempts(["trial_id", "status", "rung", "top1_pct", "size_bytes"]).to_pylist()
    return sorted(tuple(row.values()) for row in rows)


def points(ledger: Ledger) -> dict[str, list[float]]:
    rows = ledger.trials(["label", "status", "top1_pct", "size_bytes"]).to_pylist()
    return {r["label"]: [r["top1_pct"], r["size_bytes"]] for r in rows if r["status"] == "ok"}


@pytest.mark.usefixtures("_one_thread")
def test_a_halved_study_trains_less_and_finishes_what_is_on_the_frontier(tmp_path: Path) -> None:
    """Most recipes are too large, which is known at the first rung; of the others nobody can tell so early who is dominated."""
    recipes = [pruned(round(0.1 * step, 1), head) for head in (0.0, 0.5) for step in range(1, 7)]
    limit = {"constraints": ["size_bytes < 17000"]}
    whole = run_here(halved_study("whole", recipes, early_stopping="none", **limit), tmp_path)
    halved = run_here(halved_study("halved", recipes, **limit), tmp_path / "other")
    assert epochs(whole).total() == EPOCHS * len(recipes)
    assert epochs(halved).total() < 0.75 * EPOCHS * len(recipes)
    fine = {name: point for name, point in points(whole).items() if point[1] < 17000}
    members = nondominated(list(fine.values()), ["maximize", "minimize"])
    found = points(halved)
    assert {name for name, member in zip(fine, members, strict=True) if member} <= found.keys()
    assert {name: points(whole)[name] for name in found} == found, (
        "what was finished has the numbers it has without rungs"
    )
    status = study_status(halved)
    assert sum(status["paused"].values()) == len(recipes) + 1 - len(found)
    assert (status["done"], status["failed"]) == (len(recipes), {})
    stopped = sum(count * float(rung.rstrip("%")) / 100 * EPOCHS for rung, count in status["paused"].items())
    assert status["paused_epochs"] == pytest.approx(stopped)
    assert status["paused_s"] > 0


RECIPES = [pruned(0.1), pruned(0.6), pruned(0.2), pruned(0.5), pruned(0.3)]
SMALL = {"constraints": ["size_bytes < 21000"]}
"""Which the first and the third are not."""


FIRST_ROWS = {2: "stopped 0.125", 4: "stopped 0.375", 8: "ok None"}
"""Rows of one worker come in an order of their own: the baseline, two at the first rung, one of them at the second, ..., and the eighth is
the first end. Number of rows to what the newest of them is."""


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kills", [pytest.param((2,), id="first rung"), pytest.param((2, 4, 8), marks=pytest.mark.slow, id="every rung")]
)
def test_a_driver_killed_at_a_rung_trains_nothing_twice_and_decides_alike(
    tmp_path: Path, kills: tuple[int, ...]
) -> None:
    config = halved_study("survivor", RECIPES, **SMALL)
    study = Study(tmp_path, config)
    seen: list[str] = []
    for rows in kills:  # held where that many rows are written
        study.hold(str(rows))
        process = study.start()
        try:
            until(lambda: study.held() and len(study.attempts()) >= rows, process)  # noqa: B023 - called here only
        finally:
            study.kill(process)
        study.release()
        newest = study.attempts()[-1]
        seen.append(f"{newest['status']} {newest['rung']}")
        assert len(study.attempts()) == rows
    assert seen == [FIRST_ROWS[rows] for rows in kills]
    if len(kills) > 1:
        kill_in_training(study)
    study.run()

    whole = run_here(config, tmp_path / "whole")
    assert told(study.ledger) == told(whole)
    assert epochs(study.ledger) == epochs(whole)
    assert all(count <= EPOCHS for count in epochs(study.ledger).values())
    check_finishing(study)


def kill_in_training(study: Study) -> None:
    """Kills the driver in the middle of the way from a rung: what it did there is not lost without having been counted."""
    study.hold("training")
    before = epochs(study.ledger)
    process = study.start()
    try:
        until(study.held, process)
    finally:
        study.kill(process)
    study.release()
    assert epochs(study.ledger) == before


def check_finishing(study: Study) -> None:
    """A stopped trial is brought to its end by `resume --finish`, by what is left of its training."""
    stopped = [r for r in study.ledger.trials(["trial_id", "status", "rung"]).to_pylist() if r["status"] == "stopped"]
    assert stopped, "one that is stopped is needed here"
    trial, rung = stopped[0]["trial_id"], stopped[0]["rung"]
    before = epochs(study.ledger).total()
    shown = call("show", study.name, trial, storage=Path(study.storage.url))
    assert f"vitpareto resume {study.name} --finish {trial}" in shown.output
    said = study.finish("resume", study.name, "--quiet", "--finish", trial[:8])
    assert "Traceback" not in said
    (row,) = [r for r in study.ledger.trials(["trial_id", "status"]).to_pylist() if r["trial_id"] == trial]
    assert row["status"] == "ok"
    assert epochs(study.ledger).total() >= before + EPOCHS * (1 - rung)
    refused = call("resume", study.name, "--finish", trial, storage=Path(study.storage.url))
    assert refused.exit_code == 2
    assert f"must be a trial that was stopped early; {trial} is ok" in refused.output
    unknown = call("resume", study.name, "--finish", "zz", storage=Path(study.storage.url))
    assert unknown.exit_code == 2
    assert "no trial has an id that starts so" in unknown.output
