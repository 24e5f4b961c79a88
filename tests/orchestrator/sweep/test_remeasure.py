"""Real studies on real Ray: one artefact under twelve names, and measuring again what noise leaves undecided."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from tests.cli_calls import refused
from tests.processes import Study
from tests.studies import ONE_WORKER, fault_study, tiny_study

QUICK_AA = {"protocol": "quick", "threads": 1, "noise_runs": 6}


@pytest.mark.ray
@pytest.mark.slow  # times something, on a machine that should be quiet
@pytest.mark.timeout(900)
def test_one_artefact_under_twelve_names_is_one_group_in_speed(tmp_path: Path) -> None:
    study = Study(
        tmp_path,
        fault_study(
            "aa",
            ["none"],
            techniques={"fault": {"kind": ["none"], "level": {"low": 0, "high": 11, "step": 1}}},
            objectives=["latency_ms_p50", "throughput_images_per_s"],
            recipes=[[{"fault": {"kind": "none", "level": level}}] for level in range(12)],
            trials=12,
            measurement=QUICK_AA,
            resources={"cpus": 1, "max_concurrent": 1},
        ),
    )
    study.run(wait_s=600)
    assert [row["status"] for row in study.attempts()] == ["ok"] * 13
    groups = json.loads(study.finish("pareto", "aa", "--format", "json"))
    (group,) = groups
    assert len(group["members"]) >= 12  # and the uncompressed model, which they are, may be the thirteenth
    # One group is no proof where a weak baseline passes for noise: the copies must be as fast as the unit on the whole.
    for kind, most in (("latency", 0.02), ("throughput", 0.05)):
        records = [r for r in study.ledger.measurements(["kind", "ratio"]).to_pylist() if r["kind"] == kind]
        assert len(records) >= 12
        assert abs(math.log(statistics.median(r["ratio"] for r in records))) < most, kind
    assert group["certain"]


@pytest.mark.ray
def test_what_noise_leaves_undecided_is_measured_again_within_the_budget(tmp_path: Path) -> None:
    # Every other call of either recipe takes next to no time, and six pairs have three of each kind: both speeds' intervals
    # reach from there to the baseline's speed on any machine, and who is the faster of the two, of one size each, rests on it.
    short = {"window_s": 0.0, "latency_pairs": 6, "throughput_pairs": 3, "noise_runs": 1, "threads": 1}
    study = Study(
        tmp_path,
        tiny_study(
            "again",
            objectives=["size_bytes", "latency_ms_p50"],
            techniques={
                "magnitude_prune": {"head_ratio": [0.0], "mlp_ratio": [0.3, 0.4], "round_to": [1]},
                "fault": {"kind": ["uneven"], "level": [0]},
            },
            recipes=[
                [
                    {"magnitude_prune": {"head_ratio": 0.0, "mlp_ratio": ratio, "round_to": 1}},
                    {"fault": {"kind": "uneven", "level": 0}},
                ]
                for ratio in (0.3, 0.4)
            ],
            trials=2,
            measurement=short,
            budget={"remeasure": 2},
            resources=ONE_WORKER,
        ),
    )
    study.run()
    first = study.ledger.remeasured()
    assert 1 <= len(first) <= 2
    rows = study.ledger.measurements(["trial_id", "attempt_id", "kind", "artefact", "samples"]).to_pylist()
    again = [r for r in rows if r["attempt_id"] is None and r["kind"] == "latency"]
    assert sorted(r["trial_id"] for r in again) == sorted(first)
    for row in again:
        own = next(r for r in rows if r["trial_id"] == row["trial_id"] and r["attempt_id"] is not None)
        assert row["artefact"] == own["artefact"]
        assert row["samples"]
    before = {r["attempt_id"] for r in study.attempts()}
    output = study.finish("remeasure", "again", "--times", "1")
    assert "measured again" in output
    assert len(study.ledger.remeasured()) - len(first) == int(output.split("measured again ")[1].split()[0])
    assert {r["attempt_id"] for r in study.attempts()} == before
    assert "there is no study 'other'" in refused("remeasure", "other", storage=tmp_path / "results")
