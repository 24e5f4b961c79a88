"""Jobs on a cluster: what is checked before anything is sent, and a real local Ray head with token authentication."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator import open_ledger
from orchestrator.cluster import package
from orchestrator.cluster import submit as s
from orchestrator.ledger.status import study_status
from tests.places import ROOT
from tests.processes import environment
from tests.studies import ONE_WORKER, tiny_study

pytestmark = pytest.mark.timeout(480)  # the only limit of the waits below: a busy machine takes its time

QUICK = ROOT / "search_spaces" / "quick.yaml"
ATTEMPTS = 3
"""To start a head on ports that were free a moment before."""

# --- before anything is sent ------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with a study, code, and things that must not be sent."""
    shutil.copy(QUICK, tmp_path / "study.yaml")
    (tmp_path / "job.py").write_text("print('hello')\n")
    (tmp_path / ".gitignore").write_text("ignored/\n")
    for name in ("ignored/a.bin", ".git/b", ".venv/c", "results/d", "pkg/__pycache__/e.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 1000)
    return tmp_path


def test_same_request_has_same_id_and_any_change_another() -> None:
    first = s.submission_prefix("quick", b"trials: 4", "/shared")
    assert first == s.submission_prefix("quick", b"trials: 4", "/shared")
    others = [
        s.submission_prefix("other", b"trials: 4", "/shared"),
        s.submission_prefix("quick", b"trials: 5", "/shared"),
        s.submission_prefix("quick", b"trials: 4", "/elsewhere"),
        s.submission_prefix("quick", b"trials: 4", "/shared", ["--trials", "9"]),
    ]
    assert len({first, *others}) == 5
    assert first.startswith("vitpareto-quick-")


@pytest.mark.parametrize(
    ("statuses", "resume", "expected"),
    [
        ({}, None, ("p-r0", True)),
        ({"p-r0": "RUNNING"}, None, ("p-r0", False)),
        ({"p-r0": "SUCCEEDED"}, None, ("p-r0", False)),
        ({"p-r0": "FAILED"}, None, ("p-r1", True)),
        ({"p-r0": "FAILED", "p-r1": "STOPPED", "other-r2": "FAILED"}, None, ("p-r2", True)),
        ({"p-r0": "STOPPED", "p-r1": "PENDING"}, None, ("p-r1", False)),
        ({"p-r0": "SUCCEEDED"}, 1, ("p-r1", True)),
        ({"p-r0": "FAILED"}, 0, ("p-r0", False)),
    ],
)
def test_resume_counter(statuses: dict[str, str], resume: int | None, expected: tuple[str, bool]) -> None:
    assert s.choose("p", statuses, resume) == expected


def test_package_is_what_ray_would_send(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from ray._private.runtime_env.packaging import create_package

    sizes = package.shipped_files(project)
    assert set(sizes) == {"study.yaml", "job.py", ".gitignore"}
    archive = tmp_path_factory.mktemp("package") / "package.zip"
    create_package(str(project), archive, include_gitignore=True, excludes=list(package.EXCLUDES))
    with zipfile.ZipFile(archive) as packed:
        assert set(packed.namelist()) == set(sizes)
    assert package.zip_bytes(sizes) == archive.stat().st_size


def test_large_package_is_refused_with_its_largest_files(project: Path) -> None:
    (project / "weights.bin").write_bytes(b"x" * 300_000)
    with pytest.raises(package.SubmitError, match=r"largest: weights\.bin \(0\.3 MiB\), .*\.rayignore"):
        package.check_package(project, "study.yaml", limit=200_000)
    (project / ".rayignore").write_text("weights.bin\n")
    package.check_package(project, "study.yaml", limit=200_000)


def test_excluded_study_is_refused(project: Path) -> None:
    shutil.copy(QUICK, project / "ignored" / "study.yaml")
    with pytest.raises(package.SubmitError, match=r"ignored/study\.yaml would not be sent"):
        package.check_package(project, "ignored/study.yaml")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8265", "ray://head:10001", "auto", "http://", "http://host:notaport", "http://[::1", ""]
)
def test_address_must_be_http(address: str) -> None:
    with pytest.raises(package.SubmitError, match="write it like http://HEAD:8265"):
        s.check_address(address, {})


def test_environment_may_not_redirect_the_token() -> None:
    assert s.check_address("http://head:8265/", {"RAY_ADDRESS": "http://head:8265"}) == "http://head:8265"
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        with pytest.raises(package.SubmitError, match=f"unset {variable}"):
            s.check_address("http://head:8265", {variable: "http://elsewhere:8265"})


def test_token_file_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "auth_token"
    path.write_text("secret\n")
    path.chmod(0o644)
    environ = {"RAY_AUTH_TOKEN_PATH": str(path)}
    with pytest.raises(package.SubmitError, match=r"must be mode 0600, is 0644; run: chmod 600") as caught:
        s.find_token(environ)
    assert "secret" not in str(caught.value)
    path.chmod(0o600)
    assert s.find_token(environ) == "secret"
    assert s.find_token({**environ, "RAY_AUTH_TOKEN": "other"}) == "other"
    assert s.find_token({**environ, "RAY_AUTH_MODE": "disabled"}) is None


def test_missing_and_malformed_tokens(tmp_path: Path) -> None:
    with pytest.raises(package.SubmitError, match="no token: cannot read"):
        s.find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
    with pytest.raises(package.SubmitError, match="one word") as caught:
        s.find_token({"RAY_AUTH_TOKEN": "two\nlines"})
    assert "two" not in str(caught.value)


def test_study_must_be_inside_and_storage_shared(project: Path) -> None:
    with pytest.raises(package.SubmitError, match="inside the working directory"):
        s.submit(QUICK, address="http://127.0.0.1:1", working_dir=project, storage="/shared", token="t")
    with pytest.raises(package.SubmitError, match="absolute path that every node mounts"):
        s.submit(
            project / "study.yaml", address="http://127.0.0.1:1", working_dir=project, storage="results", token="t"
        )


def test_faults_of_the_study_come_before_the_network(project: Path) -> None:
    (project / "study.yaml").write_text("trials: many\n")
    with pytest.raises(ValueError, match="trials"):
        s.submit(
            project / "study.yaml", address="http://127.0.0.1:1", working_dir=project, storage="/shared", token="t"
        )


def test_data_may_lie_on_the_cluster_alone(project: Path) -> None:
    there = {"data": {"kind": "imagefolder", "path": "/mnt/there"}, "model": {"create": {}, "checkpoint": "/mnt/w.pth"}}
    (project / "study.yaml").write_text(yaml.safe_dump(tiny_study(**there)))
    with pytest.raises(package.SubmitError, match="nothing answers"):
        s.submit(
            project / "study.yaml", address="http://127.0.0.1:1", working_dir=project, storage="/shared", token="t"
        )


def test_nobody_listens() -> None:
    with pytest.raises(package.SubmitError, match=r"nothing answers at http://127\.0\.0\.1:1 "):
        s.list_jobs("http://127.0.0.1:1", token="t")


# --- a real head ------------------------------------------------------------------------------------------------------

ORDINARY = """
import os, pathlib, ray
ray.init(address="auto", log_to_driver=False)
assert os.environ["RAY_AUTH_MODE"] == "token"
print("task says", ray.get(ray.remote(lambda: pathlib.Path("study.yaml").exists()).remote()))
"""

PATIENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("waiting", flush=True)
    time.sleep(3600)
except KeyboardInterrupt:
    time.sleep(4)  # longer than the 3 s that Ray gives by itself
    print("ended cleanly", flush=True)
"""


@dataclass(frozen=True)
class Head:
    """A running head: address of its dashboard and its token."""

    address: str
    token: str


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def end_processes(session: Path, leader: subprocess.Popen[bytes]) -> None:
    """Ends this head only: its leader, then whatever still names its session folder in its command line."""
    leader.send_signal(signal.SIGTERM)
    try:
        leader.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
    for process in psutil.process_iter(["cmdline"]):
        if any(str(session) in argument for argument in process.info["cmdline"] or ()):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def started(token: str) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """A head for the time of the block: its leader, address of its dashboard, log."""
    folder = Path(tempfile.mkdtemp(prefix="vp", dir="/tmp"))  # short: socket paths have 107 characters
    dashboard, client = free_ports(2)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port=0", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--object-store-memory=200000000", f"--temp-dir={folder}", "--disable-usage-stats"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"  # the job's `python`
    file = folder / "head.log"
    with file.open("wb") as log:
        leader = subprocess.Popen(command, env=environ, start_new_session=True, stdout=log, stderr=log)
    try:
        yield leader, f"http://127.0.0.1:{dashboard}", file
    finally:
        end_processes(folder, leader)
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str, token: str, leader: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits until the head takes jobs; False where it ended, or said that a port was taken meanwhile, and goes on without."""
    while leader.poll() is None and "already occupied" not in (said := log.read_text()):
        if "runtime started" in said:  # whoever took the port is not asked
            with suppress(package.SubmitError):
                s.list_jobs(address, token=token)
                return True
        time.sleep(0.5)
    return False


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head with token authentication, 2 CPUs and 200 MB of object store, in its own session and folder."""
    token = secrets.token_hex(32)
    for _ in range(ATTEMPTS):
        with started(token) as (leader, address, log):
            if answers(address, token, leader, log):
                yield Head(address, token)
                return
            output = log.read_text()[-2000:]
    pytest.fail(f"no head came up in {ATTEMPTS} attempts, the last one said: {output}")


def send(head: Head, project: Path, code: str, storage: str) -> s.SubmitResult:
    (project / "job.py").write_text(code)
    return s.submit(
        project / "study.yaml",
        address=head.address,
        working_dir=project,
        storage=storage,
        token=head.token,
        entrypoint="python job.py",
    )


def wait_until(head: Head, job: str, *, log: str = "", ended: bool = False) -> s.JobState:
    """Waits until a job has printed ``log``, or has ended; it must not end before it was waited for."""
    while True:
        state = s.job_status(job, head.address, token=head.token)
        logs = s.job_logs(job, head.address, token=head.token)
        if (log and log in logs) or (ended and state.ended_at):
            return state
        assert not state.ended_at, f"{job} ended without {log!r}: {state}\n{logs}"
        time.sleep(0.3)


@pytest.mark.ray
def test_job_runs_once_to_its_end(head: Head, project: Path) -> None:
    first = send(head, project, ORDINARY, "/shared/ordinary")
    assert first.submitted
    assert first.submission_id.startswith("vitpareto-quick-")
    assert first.submission_id.endswith("-r0")
    again = send(head, project, ORDINARY, "/shared/ordinary")
    assert (again.submitted, again.submission_id) == (False, first.submission_id)
    assert str(again).startswith(f"already submitted as {first.submission_id}, status ")
    state = wait_until(head, first.submission_id, ended=True)
    logs = s.job_logs(first.submission_id, head.address, token=head.token)
    assert (state.status, state.study) == ("SUCCEEDED", "quick"), logs
    assert "task says True" in logs
    assert str(send(head, project, ORDINARY, "/shared/ordinary")).endswith(
        "a larger budget (--trials) extends the study"
    )
    assert [j.submission_id for j in s.list_jobs(head.address, token=head.token)].count(first.submission_id) == 1


@pytest.mark.ray
def test_failed_job_is_followed_by_the_next(head: Head, project: Path) -> None:
    first = send(head, project, "raise SystemExit(3)", "/shared/failing")
    assert wait_until(head, first.submission_id, ended=True).status == "FAILED"
    second = send(head, project, "print('resumed')", "/shared/failing")
    assert second.submitted
    assert second.submission_id == first.submission_id.removesuffix("-r0") + "-r1"
    assert wait_until(head, second.submission_id, ended=True).status == "SUCCEEDED"


@pytest.mark.ray
def test_stop_ends_cleanly(head: Head, project: Path) -> None:
    job = send(head, project, PATIENT, "/shared/patient").submission_id
    wait_until(head, job, log="waiting")
    assert s.job_stop(job, head.address, token=head.token, wait_s=600).status == "STOPPED"
    assert "ended cleanly" in s.job_logs(job, head.address, token=head.token)
    assert s.job_stop(job, head.address, token=head.token, wait_s=600).status == "STOPPED"


@pytest.mark.ray
def test_wrong_or_no_token_is_refused(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(package.SubmitError, match="the cluster refused the token"):
        s.list_jobs(head.address, token="wrong")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(package.SubmitError, match="the cluster asks for a token"):
        s.list_jobs(head.address)


@pytest.mark.ray
def test_unknown_job(head: Head) -> None:
    with pytest.raises(package.SubmitError, match="no job 'nosuch' on this cluster; the newest: "):
        s.job_status("nosuch", head.address, token=head.token)


# --- real studies on it -----------------------------------------------------------------------------------------------


def send_study(head: Head, folder: Path, **changes: object) -> s.SubmitResult:
    (folder / "study.yaml").write_text(yaml.safe_dump(tiny_study(resources=ONE_WORKER, **changes)))
    storage = str(folder / "results")
    return s.submit(folder / "study.yaml", address=head.address, working_dir=folder, storage=storage, token=head.token)


@pytest.mark.ray
def test_a_study_runs_to_its_end_once(head: Head, tmp_path: Path) -> None:
    first = send_study(head, tmp_path, trials=2)
    again = send_study(head, tmp_path, trials=2)
    assert (first.submitted, again.submitted, again.submission_id) == (True, False, first.submission_id)
    state = wait_until(head, first.submission_id, ended=True)
    logs = s.job_logs(first.submission_id, head.address, token=head.token)
    assert state.status == "SUCCEEDED", logs
    assert f"results: {tmp_path}/results/tiny" in logs
    ledger = open_ledger("tiny", tmp_path / "results")
    assert ledger.trials(["status"])["status"].to_pylist() == ["ok"] * 3
    status = study_status(ledger)
    assert (status["state"], status["problems"]) == ("done", [])
    assert send_study(head, tmp_path, trials=2).status == "SUCCEEDED"


@pytest.mark.ray
def test_a_stopped_study_ends_cleanly_and_goes_on_elsewhere(head: Head, tmp_path: Path) -> None:
    job = send_study(head, tmp_path, trials=200).submission_id
    while not (done := finished(tmp_path)):
        state = s.job_status(job, head.address, token=head.token)
        assert not state.ended_at, s.job_logs(job, head.address, token=head.token)
        time.sleep(0.2)
    assert s.job_stop(job, head.address, token=head.token, wait_s=600).status == "STOPPED"
    done = finished(tmp_path)
    assert 0 < len(done) < 200, s.job_logs(job, head.address, token=head.token)
    assert "Traceback" not in s.job_logs(job, head.address, token=head.token)
    assert study_status(open_ledger("tiny", tmp_path / "results"))["state"] == "stopped", "its lease is released"
    command = [sys.executable, "-m", "orchestrator.cli", "run", "study.yaml", "--trials", str(len(done) + 1)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(finished(tmp_path)) == len(done) + 1
    assert done.items() <= finished(tmp_path).items(), "what had ended stays as it was"


def finished(folder: Path) -> dict[int, str]:
    """Returns number to attempt of the recipes that ended."""
    if not (folder / "results" / "tiny" / "study.json").exists():
        return {}
    rows = open_ledger("tiny", folder / "results").trials(["number", "attempt_id", "is_baseline"]).to_pylist()
    return {r["number"]: r["attempt_id"] for r in rows if not r["is_baseline"]}
