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

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

TIMEOUT_S = 8.0
HOG_BYTES = 4e9
"""Growth of the memory in use at which Ray's monitor steps in."""


def test_every_failure_of_a_worker_becomes_a_typed_row(tmp_path: Path) -> None:
    kinds = ["hang", "sleep", "die", "die_once", "nan", "allocate", "raise", "none"]
    training = {"baseline": {"epochs": 60}, "recovery": {"epochs": 1}}
    config = fault_study("faults", kinds, training=training, budget={"trial_timeout": TIMEOUT_S})
    study = Study(tmp_path, config, VITPARETO_FAULT_MARK=str(tmp_path / "died"))
    process = study.start()
    try:
        until(study.executions, process)  # the baseline trains
        (killed,) = study.marks().values()
        os.kill(killed["pid"], signal.SIGKILL)
        output = process.communicate(timeout=200)[0]
    finally:
        kill_group(process)
    assert process.returncode == 0, output
    assert study.kinds() == {
        "baseline": ["worker_died", "ok"],
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
    rows = study.attempts()
    assert json.loads(rows[0]["provenance"])["pid"] == killed["pid"]
    assert "worker process has died" in rows[0]["failure"]
    assert all(r["failure"] for r in rows if r["status"] != "ok")
    raised = next(r["failure"] for r in rows if r["status"] == "error")
    assert raised.startswith("RuntimeError: the fault technique was told to raise\n")
    assert not study.marks()


def test_a_host_out_of_memory_kill_marks_the_recipe(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + HOG_BYTES) / memory.total
    if threshold > 0.95:
        pytest.skip(
            f"needs {HOG_BYTES / 1e9:.0f} GB of free memory and a twentieth of the machine's left, to run out of it safely"
        )
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
