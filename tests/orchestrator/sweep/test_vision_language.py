"""A whole study on each of the four tasks of digits, with both families, a frontier at the end: two on a real Ray, which sees no
difference between tasks, and two by its workers' functions in this process, where each starts in no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.ledger import Ledger
from orchestrator.ledger.studies import open_ledger
from orchestrator.study.load import load_study
from orchestrator.study.schema import StudyConfig, model_info
from orchestrator.sweep import after_search, worker_tasks
from orchestrator.sweep.driver import run_study
from orchestrator.sweep.frontier_history import write_frontier
from orchestrator.sweep.opening import open_sweep
from orchestrator.sweep.state import RUNNER
from orchestrator.sweep.trainable import run_specs
from tests.studies import ONE_EPOCH, ONE_WORKER
from workers.node.storage import LocalStorage
from workers.techniques import versions

OBJECTIVES = {
    "digit_vqa": ["vqa_pct"],
    "digit_entailment": ["top1_pct"],
    "digit_nlvr": ["top1_pct"],
    "digit_retrieval": ["text_recall1_pct", "image_recall1_pct"],
}
FAMILY = {"digit_vqa": "vilt", "digit_entailment": "meter", "digit_nlvr": "vilt", "digit_retrieval": "meter"}
LAYERS = {"vilt": "1,2", "meter": "2,4"}


def study(kind: str) -> StudyConfig:
    family = FAMILY[kind]
    pumer = {"layers": LAYERS[family], "prune": 0.2, "image_merge": 0.3, "text_merge": 0.2, "distil": True}
    return load_study({
        "name": "sweep",
        "model": {"family": family, "name": f"{family}_tiny"},
        "data": {"kind": kind, "train_limit": 64, "search_limit": 48, "report_limit": 48},
        "training": ONE_EPOCH,
        "objectives": [*OBJECTIVES[kind], "macs", "size_bytes"],
        "techniques": {"pumer": pumer, "weight_only": {"bits": [8], "group_size": [32]}},
        "recipes": [["pumer"], ["pumer", "weight_only"]],
        "trials": 2,
        "resources": ONE_WORKER,
    })  # fmt: skip


@pytest.mark.ray
@pytest.mark.timeout(480)
@pytest.mark.parametrize("kind", ["digit_vqa", "digit_retrieval"])
def test_a_sweep_ends_with_a_frontier(kind: str, tmp_path: Path) -> None:
    done = run_study(study(kind), storage=tmp_path, quiet=True)
    assert (done.done, done.complete) == (2, True)
    check(kind, tmp_path)


@pytest.mark.parametrize("kind", ["digit_entailment", "digit_nlvr"])
def test_a_sweep_without_ray_ends_with_a_frontier(kind: str, tmp_path: Path) -> None:
    config, storage = study(kind), LocalStorage(tmp_path)
    context = config.context()
    ledger = Ledger(storage, "sweep", config.parsed_constraints(), context.digest)
    ledger.write_study({"config": config.to_dict(), "token": "", "context": context.digest})
    sweep = open_sweep(
        config, context, model_info(context), ledger, storage_url=storage.url, token="", versions=versions()
    )
    while (work := sweep.next_work()) is not None:
        sweep.ended(work, run_specs(work.to_dict(RUNNER)))
    assert sweep.finished
    for spec in after_search.unreported(sweep):
        ledger.write_report(spec.trial_id, spec.recipe.hash, *worker_tasks.report(spec.to_dict()))
    write_frontier(sweep)
    check(kind, tmp_path)


def check(kind: str, storage: Path) -> None:
    """The numbers of the three trials, and that there is a frontier."""
    ledger = open_ledger("sweep", storage)
    trials = {row["techniques"]: row for row in ledger.trials().to_pylist()}
    assert {row["status"] for row in trials.values()} == {"ok"}
    whole, reduced = trials[""], trials["pumer"]
    assert reduced["macs"] < 0.9 * whole["macs"]
    assert len(ledger.frontier()) >= 1
    for name in OBJECTIVES[kind]:
        assert all(0 <= row[name] <= 100 for row in trials.values())
    if kind == "digit_retrieval":
        for side in ("text", "image"):
            at = [round(json.loads(whole["metrics"])[f"{side}_recall{k}_pct"], 6) for k in (1, 5, 10)]
            assert at == sorted(at)
            assert at[-1] > 0
