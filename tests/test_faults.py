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
from tests.studies import fault_study, tiny_study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

TIMEOUT_S = 8.0
HOG_BYTES = 2.5e9
"""Growth of the memory in use at which Ray's monitor steps in."""


def test_every_failure_inside_a_trial_becomes_a_typed_row(tmp_path: Path) -> None:
    kinds = ["hang", "sleep", "die", "die_once", "nan", "allocate", "raise", "none"]
    config = fault_study("faults", kinds, budget={"trial_timeout": TIMEOUT_S})
    study = Study(tmp_path, config, VITPARETO_FAULT_MARK=str(tmp_path / "died"))
    output = study.run()
    assert study.kinds() == {
        "baseline": ["ok"],
        "hang": ["timeout"],
        "sleep": ["timeout"],
        "die": ["worker_died"] * 3,  # and two retries
        "die_once": ["worker_died", "ok"],
        "nan": ["infeasible"],
        "allocate": ["host_oom"],
        "raise": ["error"],
        "none": ["ok"],
    }
    assert "8 of 8 trials" in output
    failures = {r["label"]: r["failure"] for r in study.attempts() if r["status"] != "ok"}
    assert all(failures.values())
    raised = next(text for label, text in failures.items() if "raise" in label)
    assert raised.startswith("RuntimeError: the fault technique was told to raise\n")
    assert not study.marks()


def test_a_worker_killed_in_training_is_retried(tmp_path: Path) -> None:
    config = tiny_study("killed", trials=2, training={"baseline": {"epochs": 60}, "recovery": {"epochs": 1}})
    study = Study(tmp_path, config)
    process = study.start()
    try:
        until(study.executions, process)
        (mark,) = study.marks().values()
        os.kill(mark["pid"], signal.SIGKILL)
        output = process.communicate(timeout=120)[0]
    finally:
        kill_group(process)
    assert process.returncode == 0, output
    rows = study.attempts()
    assert [(r["is_baseline"], r["status"]) for r in rows] == [
        (True, "worker_died"),
        (True, "ok"),
        (False, "ok"),
        (False, "ok"),
    ]
    assert json.loads(rows[0]["provenance"])["pid"] == mark["pid"]


def test_a_host_out_of_memory_kill_marks_the_recipe(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + HOG_BYTES) / memory.total
    if threshold > 0.95:
        pytest.skip("not enough free memory to run out of it safely")
    study = Study(
        tmp_path,
        fault_study("hogs", ["hog", "none"]),
        RAY_memory_usage_threshold=f"{threshold:.4f}",
        RAY_memory_monitor_refresh_ms="50",
    )
    study.run()
    assert study.kinds() == {"baseline": ["ok"], "hog": ["host_oom"], "none": ["ok"]}


def test_a_lost_node_is_told_from_a_dead_worker(tmp_path: Path) -> None:
    study = Study(
        tmp_path,
        fault_study("nodes", ["sleep_once", "none"]),
        VITPARETO_FAULT_MARK=str(tmp_path / "slept"),
        RAY_AUTH_MODE="disabled",
    )
    command = [sys.executable, "-m", "tests.lose_node", str(study.file), study.storage.url]
    done = subprocess.run(command, env=study.env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert study.kinds() == {"baseline": ["ok"], "sleep_once": ["node_lost", "ok"], "none": ["ok"]}
