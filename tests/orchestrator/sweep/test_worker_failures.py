"""Workers that fail in every way: each failure becomes a typed row, and the sweep goes on to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes import Study, kill_group, until
from tests.studies import fault_study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

TIMEOUT_S = 6.0
MOST_HOG_BYTES = 8e9


def test_every_failure_of_a_worker_becomes_a_typed_row(tmp_path: Path) -> None:
    kinds = ["die_once", "nan", "allocate", "raise", "none", "hang", "sleep"]
    config = fault_study("faults", kinds, trials=5, budget={"trial_timeout": None})
    study = Study(tmp_path, config, VITPARETO_FAULT_MARK=str(tmp_path / "died"))
    study.hold("training")
    process = study.start()
    try:
        (killed,) = until(study.held, process)  # in the training of the baseline
        os.kill(killed, signal.SIGKILL)
        study.release()
        output = process.communicate()[0]
    finally:
        kill_group(process)
    assert process.returncode == 0, output
    assert "5 of 5 trials" in output
    study.change(trials=7, budget={"trial_timeout": TIMEOUT_S})  # for those that must reach it alone
    assert "7 of 7 trials" in study.run()
    assert study.kinds() == {
        "baseline": ["worker_died", "ok"],
        "die_once": ["worker_died", "ok"],
        "nan": ["infeasible"],
        "allocate": ["host_oom"],
        "raise": ["error"],
        "none": ["ok"],
        "hang": ["timeout"],
        "sleep": ["timeout"],
    }
    rows = study.attempts()
    assert json.loads(rows[0]["provenance"])["pid"] == killed
    assert "worker process has died" in rows[0]["failure"]
    assert all(r["failure"] for r in rows if r["status"] != "ok")
    raised = next(r["failure"] for r in rows if r["status"] == "error")
    assert raised.startswith("RuntimeError: the fault technique was told to raise\n")
    ended = [r["failure"] for r in rows if r["status"] == "timeout"]
    assert any(text.startswith("DeadlineExceeded: ") for text in ended), "what still reacts needs no watchdog"
    assert not study.marks()


def test_a_host_out_of_memory_kill_marks_the_recipe(tmp_path: Path) -> None:
    # Ray's monitor steps in where half of what is free now is gone: whatever else the machine runs must grow by gigabytes to
    # be taken for the hog, and what is left is far more than the hog takes until the monitor's next look, so that the kernel
    # has no reason to step in first.
    memory = psutil.virtual_memory()
    growth = min(max(4e9, memory.available / 2), MOST_HOG_BYTES)
    threshold = (memory.total - memory.available + growth) / memory.total
    if threshold > 0.95:
        pytest.skip("needs 4 GB of free memory and a twentieth of the machine's left, to run out of it safely")
    study = Study(
        tmp_path,
        fault_study("hogs", ["hog", "none"]),
        RAY_memory_usage_threshold=f"{threshold:.4f}",
        RAY_memory_monitor_refresh_ms="50",
    )
    study.run()
    kinds = study.kinds()
    assert kinds["hog"] == ["host_oom"]
    assert kinds["none"] in (["ok"], ["worker_died", "ok"]), "killed beside the culprit at most, and then retried"


def test_a_lost_node_is_told_from_a_dead_worker(tmp_path: Path) -> None:
    alone = {"max_concurrent": 1}  # so that the node of the only trial is the sleeper's
    study = Study(
        tmp_path,
        fault_study("lost_nodes", ["sleep_once", "none", "die"], resources=alone, retries=1),
        VITPARETO_FAULT_MARK=str(tmp_path / "slept"),
        RAY_AUTH_MODE="disabled",
        RAY_health_check_period_ms="1000",  # Ray asks five times before it takes a node for lost
    )
    command = [sys.executable, "-m", "tests.lose_node", str(study.file), study.storage.url]
    done = subprocess.run(command, env=study.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert study.kinds() == {
        "baseline": ["ok"],
        "sleep_once": ["node_lost", "ok"],
        "none": ["ok"],
        "die": ["worker_died"] * 2,
    }
