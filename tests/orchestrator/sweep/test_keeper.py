"""Ray that dies around a study, and signals that end one: the study goes on by itself, or ends in order and can be gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.ledger.status import study_status
from orchestrator.ledger.studies import open_ledger
from tests.processes import Study, kill_group, until
from tests.studies import fault_study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

NOTICE_S = 30.0
"""What clouds leave between a notice and the end."""


def sleeping(folder: Path, *more: str, name: str = "kept", **config: object) -> Study:
    """Returns a study whose first trial sleeps for ever the first time, before ``more`` kinds."""
    kinds = ["sleep_once", *more]
    return Study(folder, fault_study(name, kinds, **config), VITPARETO_FAULT_MARK=str(folder / "slept"))


def asleep(study: Study) -> bool:
    return Path(study.env["VITPARETO_FAULT_MARK"]).exists()


def ended_in_order(study: Study, output: str, *more: str) -> None:
    """Checks what every early end leaves: no process, no mark, no loose row, the frontier, the way to go on."""
    assert "Traceback" not in output
    assert f"go on with: vitpareto resume {study.name} --storage {study.storage.url}" in output
    assert study.left() == []
    assert not study.marks()
    assert study.ledger.compact() == 0, "nothing is left to compact; the files that were are kept for a generation"
    assert study.storage.exists(f"{study.name}/frontier.parquet")
    status = study_status(open_ledger(study.name, study.storage.url))
    assert (status["state"], status["running"], status["waiting"]) == ("stopped", 0, 0)
    assert f"{status['done']} of {status['budget']} trials" in output


def all_ok_once(study: Study) -> None:
    """Checks that every recipe was evaluated, once; what was in flight when Ray was lost may have rows that say so."""
    kinds = study.kinds()
    assert set(kinds) == {"baseline", *study.config["techniques"]["fault"]["kind"]}
    assert all(statuses.pop() == "ok" for statuses in kinds.values()), kinds
    assert {status for lost in kinds.values() for status in lost} <= {"node_lost", "worker_died"}, kinds


@pytest.mark.parametrize(
    "part",
    [
        "gcs_server",
        pytest.param("raylet", marks=pytest.mark.slow),
        pytest.param("ray::DashboardAgent", marks=pytest.mark.slow),
        pytest.param("ray::RuntimeEnvAgent", marks=pytest.mark.slow),
    ],
)
def test_a_local_ray_that_dies_is_replaced(tmp_path: Path, part: str) -> None:
    study = sleeping(tmp_path, "none")
    process = study.start()
    try:
        until(lambda: asleep(study), process)
        (victim,) = study.parts(part)
        victim.kill()
        output = process.communicate()[0]
    finally:
        kill_group(process)
    assert process.returncode == 0, output
    assert "Ray is lost: " in output
    assert "another one goes on from the ledger" in output
    assert "2 of 2 trials" in output
    all_ok_once(study)
    assert study.left() == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_ray_that_dies_again_and_again(tmp_path: Path) -> None:
    """At other moments of a run: in the baseline, in a trial, between two."""
    study = sleeping(tmp_path, "none", "uneven")
    process = study.start()
    try:
        study.hold("training")
        until(study.held, process)
        first = study.driver()
        study.parts("gcs_server")[0].kill()
        until(lambda: study.driver() != first, process)
        study.release()
        until(lambda: asleep(study), process)
        second = study.driver()
        study.parts("raylet")[0].kill()
        until(lambda: study.driver() != second and study.attempts()[1:], process)
        study.parts("gcs_server")[0].kill()
        output = process.communicate()[0]
    finally:
        kill_group(process)
    assert process.returncode == 0, output
    all_ok_once(study)


@pytest.mark.slow
def test_a_driver_that_is_killed_under_its_keeper_is_replaced(tmp_path: Path) -> None:
    study = sleeping(tmp_path)
    process = study.start()
    try:
        until(lambda: asleep(study), process)
        os.kill(study.driver(), signal.SIGKILL)
        output = process.communicate()[0]
    finally:
        kill_group(process)
    assert process.returncode == 0, output
    assert "the driver's process was ended by SIGKILL; another one goes on from the ledger" in output
    all_ok_once(study)


@pytest.mark.slow
def test_a_cluster_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    study = sleeping(tmp_path)
    study.env["RAY_AUTH_MODE"] = "disabled"
    cluster = subprocess.Popen(
        [sys.executable, "-m", "tests.hold_cluster"], env=study.env, stdout=subprocess.PIPE, text=True
    )
    assert cluster.stdout is not None
    try:
        address = cluster.stdout.readline().strip()
        process = study.start("run", str(study.file), "--quiet", "--address", address)
        try:
            until(lambda: asleep(study), process)
            study.parts("gcs_server")[0].kill()
            output = process.communicate()[0]
        finally:
            kill_group(process)
    finally:
        cluster.kill()
        cluster.wait()
        cluster.stdout.close()
    assert process.returncode == 1, output
    assert "stopped early: Ray is lost: Ray's GCS does not answer at " in output
    assert output.rstrip().count(f"--storage {study.storage.url} --address {address}") == 1
    for part in study.left():
        part.kill()
    assert [r["status"] for r in study.attempts()] == ["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_ends_a_run_in_order(tmp_path: Path, number: signal.Signals) -> None:
    study = sleeping(tmp_path, "none")
    process = study.start()
    try:
        until(lambda: asleep(study), process)
        os.killpg(process.pid, number)  # as a terminal does
        output = process.communicate()[0]
    finally:
        kill_group(process)
    assert process.returncode == 128 + number, output
    ended_in_order(study, output)
    assert "2 of 2 trials" in study.finish("resume", study.name, "--quiet")
    all_ok_once(study)


@pytest.mark.slow
def test_a_stop_that_goes_to_every_process(tmp_path: Path) -> None:
    """As systemd and Slurm do: Ray's own processes get the signal beside the driver."""
    study = sleeping(tmp_path)
    process = study.start()
    try:
        until(lambda: asleep(study), process)
        for part in study.left():
            part.terminate()
        output = process.communicate()[0]
    finally:
        kill_group(process)
    assert process.returncode == 128 + signal.SIGTERM, output
    ended_in_order(study, output)


@pytest.mark.slow
def test_a_second_signal_hands_back_at_once_and_a_third_changes_nothing(tmp_path: Path) -> None:
    study = sleeping(tmp_path)
    process = study.start()
    try:
        until(lambda: asleep(study), process)
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.7)
        output = process.communicate()[0]
    finally:
        kill_group(process)
    assert process.returncode == 128 + signal.SIGINT, output
    ended_in_order(study, output)


@pytest.mark.slow
def test_a_pre_emption(tmp_path: Path) -> None:
    """What was found is safe before the end comes; the trial in flight is issued again."""
    study = sleeping(tmp_path, "none", resources={"max_concurrent": 1})
    process = study.start()
    try:
        until(lambda: asleep(study), process)
        process.terminate()
        try:
            output = process.communicate(timeout=NOTICE_S)[0]
        finally:
            study.kill(process)
    finally:
        kill_group(process)
    ended_in_order(study, output)
    assert "2 of 2 trials" in study.finish("resume", study.name, "--quiet")
    all_ok_once(study)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_signal_at_every_phase(tmp_path: Path) -> None:
    """Before Ray, while Ray starts, in the baseline, while the report split is told; then the run ends as if nothing was."""
    study = Study(tmp_path, fault_study("phases", ["none"]))
    command = ("run", str(study.file))
    process: subprocess.Popen[str]
    phases = {
        "imports": lambda: any("driver_process" in word for p in study.left() for word in command_line(p)),
        "ray": lambda: study.parts("gcs_server"),
        "baseline": lambda: study.held(),
        "report": lambda: study.attempts()[1:],
    }
    for phase, reached in phases.items():
        if phase == "baseline":
            study.hold("training")
        process = study.start(*command)
        try:
            until(reached, process)
            process.terminate()
            study.release()
            output = process.communicate()[0]
        finally:
            kill_group(process)
        complete = json.loads(study.storage.read("phases/study.json")).get("complete") if phase == "report" else False
        # what is being saved when the signal comes is not broken off, and then nothing is left to go on with
        assert process.returncode == (0 if complete else 128 + signal.SIGTERM), (phase, output)
        assert "Traceback" not in output, (phase, output)
        assert study.left() == [], phase
    study.run()
    assert study.kinds() == {"baseline": ["ok"], "none": ["ok"]}
    rows = study.ledger.trials(["trial_id", "is_baseline"]).to_pylist()
    frontier = {row["trial_id"] for row in rows if row["is_baseline"]}  # the other is no better, and some bytes larger
    assert study.ledger.reported() == frontier


@pytest.mark.slow
def test_a_ray_that_does_not_start_is_told_in_one_line(tmp_path: Path) -> None:
    study = Study(tmp_path, fault_study("slow_ray", ["none"]), RAY_gcs_server_port_wait_time_s="0")
    output = study.finish("run", str(study.file), "--quiet", status=1)
    assert output.count("Ray did not start (") == 2
    assert "Ray did not start on this machine, tried 3 times: " in output
    assert "Traceback" not in output
    assert study.left() == []
    del study.env["RAY_gcs_server_port_wait_time_s"]
    study.run()
    assert json.loads(study.storage.read("slow_ray/study.json"))["complete"] is True
