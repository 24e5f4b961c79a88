"""A whole study on each of the four tasks of digits, with both families: real Ray, a frontier at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.ledger.studies import open_ledger
from orchestrator.study.load import load_study
from orchestrator.sweep.driver import run_study
from tests.studies import ONE_EPOCH

OBJECTIVES = {
    "digit_vqa": ["vqa_pct"],
    "digit_entailment": ["top1_pct"],
    "digit_nlvr": ["top1_pct"],
    "digit_retrieval": ["text_recall1_pct", "image_recall1_pct"],
}
FAMILY = {"digit_vqa": "vilt", "digit_entailment": "meter", "digit_nlvr": "vilt", "digit_retrieval": "meter"}
LAYERS = {"vilt": "1,2", "meter": "2,4"}


@pytest.mark.ray
@pytest.mark.timeout(480)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_sweep_ends_with_a_frontier(kind: str, tmp_path: Path) -> None:
    family = FAMILY[kind]
    pumer = {"layers": LAYERS[family], "prune": 0.2, "image_merge": 0.3, "text_merge": 0.2, "distil": True}
    study = load_study({
        "name": "sweep",
        "model": {"family": family, "name": f"{family}_tiny"},
        "data": {"kind": kind, "train_limit": 64, "search_limit": 48, "report_limit": 48},
        "training": ONE_EPOCH,
        "objectives": [*OBJECTIVES[kind], "macs", "size_bytes"],
        "techniques": {"pumer": pumer, "weight_only": {"bits": [8], "group_size": [32]}},
        "recipes": [["pumer"], ["pumer", "weight_only"]],
        "trials": 2,
        "resources": {"cpus": 1, "max_concurrent": 2},
    })  # fmt: skip
    done = run_study(study, storage=tmp_path, quiet=True)
    assert (done.done, done.complete) == (2, True)

    ledger = open_ledger("sweep", tmp_path)
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
