"""Sends a study to a Ray cluster as a job and asks after it: Ray's Job Submission API with token authentication.

The id of a job follows from the study, its storage and a resume counter, so that a repeated submit is answered and not
run twice. What is sent is the working directory; its size is checked first, because the head refuses one that is too
large only after the whole upload.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from orchestrator.cluster.package import EXCLUDES, SubmitError, SubmitRefused, check_package
from workers.trial import digest

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOP_WAIT_S = 60
"""Seconds that a stopped driver has to end its trials and compact its ledger before it is killed; Ray gives 3."""

CONNECT_TIMEOUT_S = 5.0
"""For reaching the head at all: Ray's client has no timeout of its own."""

_ENDED = ("SUCCEEDED", "STOPPED", "FAILED")
_AGAIN = ("STOPPED", "FAILED")


@dataclass(frozen=True)
class SubmitResult:
    """What a submit came to: ``submitted`` is False where the job was already there."""

    submission_id: str
    status: str
    submitted: bool

    def __str__(self) -> str:
        if self.submitted:
            return f"submitted {self.submission_id}"
        more = "; a larger budget (--trials) extends the study" if self.status == "SUCCEEDED" else ""
        return f"already submitted as {self.submission_id}, status {self.status}{more}"


@dataclass(frozen=True)
class JobState:
    """A job as the cluster knows it. Times are seconds since the epoch, UTC; ``message`` is Ray's."""

    submission_id: str
    study: str
    status: str
    message: str
    entrypoint: str
    started_at: float | None
    ended_at: float | None


# --- reaching the cluster ---------------------------------------------------------------------------------------------


def check_address(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the address of the head's dashboard without a trailing slash.

    Raises:
        SubmitRefused: it is no http(s) address, or an environment variable would silently send job and token elsewhere.
    """
    address = address.rstrip("/")
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise SubmitRefused(
            f"address {address!r}: must be the http(s) address of the head's dashboard; write it like http://HEAD:8265"
        )
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray's client prefers them to its argument
        if (environ.get(variable) or address).rstrip("/") != address:
            raise SubmitRefused(
                f"address {address}: {variable}={environ[variable]} would override it; unset {variable}"
            )
    return address


def find_token(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the token: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token, in Ray's order.

    None where RAY_AUTH_MODE=disabled says that the cluster has none.

    Raises:
        SubmitError: there is no token, or others can read its file.
    """
    if environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    token = environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                raise SubmitError(
                    f"token file {path}: must be mode 0600, is {mode:04o}; run: chmod 600 {shlex.quote(str(path))}"
                )
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SubmitError(
                f"no token: cannot read {path} ({type(error).__name__}); copy the head's ~/.ray/auth_token there, mode "
                "0600, or set RAY_AUTH_TOKEN (RAY_AUTH_MODE=disabled where the cluster has none)"
            ) from error
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise SubmitError("the token must be one word of ASCII characters; copy the head's ~/.ray/auth_token again")
    return token


def _reach(address: str) -> None:
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((str(parts.hostname), port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise SubmitError(
            f"nothing answers at {address} ({error}); is the head up and its port forwarded (ray dashboard)?"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


@contextmanager
def _client(address: str, token: str | None) -> Iterator[JobSubmissionClient]:
    """Connects, and makes one line of what goes wrong. The token goes into a header, not into the environment."""
    address = check_address(address)
    token = find_token({"RAY_AUTH_TOKEN": token} if token else os.environ)
    _reach(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {token}"} if token else None
    try:
        try:
            client = JobSubmissionClient(address, headers=headers)
        except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise SubmitError(f"{address}: no Ray dashboard there ({_first_line(error)})") from error
        yield client
    except AuthenticationError as error:
        which = "refused the token" if token else "asks for a token"
        raise SubmitError(f"{address}: the cluster {which}; copy the head's ~/.ray/auth_token") from error
    except (RuntimeError, OSError) as error:
        raise SubmitError(f"{address}: {_first_line(error)}") from error


# --- submitting -------------------------------------------------------------------------------------------------------


def submission_prefix(name: str, study: bytes, storage: str, arguments: Sequence[str] = ()) -> str:
    """Returns ``vitpareto-<name>-<digest>``; ``-r<k>`` completes it."""
    return f"vitpareto-{name}-{digest([hashlib.sha256(study).hexdigest(), storage, list(arguments)])}"


def choose(prefix: str, statuses: Mapping[str, str], resume: int | None = None) -> tuple[str, bool]:
    """Returns (submission id, whether to send it), from the status of every job of the cluster.

    A failed or stopped job is followed by the next resume counter; any other is the answer.
    """
    if resume is None:
        resume = 0
        while statuses.get(f"{prefix}-r{resume}") in _AGAIN:
            resume += 1
    submission_id = f"{prefix}-r{resume}"
    return submission_id, submission_id not in statuses


def submit(
    study_path: str | Path,
    *,
    address: str,
    storage: str,
    working_dir: str | Path = ".",
    name: str | None = None,
    resume: int | None = None,
    arguments: Sequence[str] = (),
    token: str | None = None,
    entrypoint: str | None = None,
) -> SubmitResult:
    """Sends a study to the cluster, once.

    The job runs ``vitpareto run``, which continues a study that the storage already holds.

    Args:
        study_path: study file, inside ``working_dir``.
        address: of the head's dashboard, ``http://HEAD:8265``.
        storage: absolute path that every node mounts, or the URL of an object store.
        working_dir: sent to the cluster; holds the code and the study.
        name: of the study; None takes the file's.
        resume: the resume counter to use; None takes the first one that is free or still stands.
        arguments: more arguments of ``vitpareto run`` (``--trials 40``); others make another job.
        token: of the cluster; None finds it, see :func:`find_token`.
        entrypoint: shell command to run in place of ``vitpareto run``.

    Raises:
        SubmitRefused: study, storage, working directory or address are not usable.
        SubmitError: the package is too large, there is no token, or the cluster refused the job.
        StudyError: the study has faults. Its data and checkpoint are not looked for: they lie where it will run.
    """
    from orchestrator.study.load import (  # pydantic, which asking after a job need not wait for
        check_study_name,
        load_study,
    )

    address = check_address(address)
    root = Path(working_dir).resolve()
    path = Path(study_path).resolve()
    if not path.is_file() or not path.is_relative_to(root):
        raise SubmitRefused(
            f"study {study_path}: must be a file inside the working directory {root}; see --working-dir"
        )
    if "://" not in storage and not Path(storage).is_absolute():
        raise SubmitRefused(
            f"storage {storage!r}: must be an absolute path that every node mounts, or a URL such as s3://BUCKET/PATH"
        )
    study = path.relative_to(root).as_posix()
    config = load_study(path, check_files=False)
    name = config.name if name is None else check_study_name(name)
    check_package(root, study)
    prefix = submission_prefix(name, path.read_bytes(), storage, arguments)
    command = [
        "python",
        "-m",
        "orchestrator.cli",
        "run",
        study,
        "--address",
        "auto",
        "--storage",
        storage,
        "--name",
        name,
    ]
    job = {
        "entrypoint": entrypoint or shlex.join([*command, *arguments]),
        "runtime_env": {"working_dir": str(root), "excludes": list(EXCLUDES), "env_vars": stop_settings()},
        "metadata": {"study": name, "storage": storage},
    }
    with _client(address, token) as client:
        return _send(client, prefix, resume, job)


def stop_settings(wait_s: int = STOP_WAIT_S) -> dict[str, str]:
    """Returns the environment that makes ``ray job stop`` end a job cleanly.

    Ray's job supervisor reads it from its own environment, which is the job's runtime environment on top of the head's.
    """
    return {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(wait_s)}


def _send(client: JobSubmissionClient, prefix: str, resume: int | None, job: Mapping[str, Any]) -> SubmitResult:
    submission_id, wanted = choose(prefix, _statuses(client), resume)
    if wanted:
        try:
            client.submit_job(submission_id=submission_id, **job)
        except RuntimeError as error:
            if "already exists" not in str(
                error
            ):  # another submit of the same study came first: that one is the answer
                raise
            wanted = False
    return SubmitResult(submission_id, str(client.get_job_status(submission_id).value), wanted)


def _statuses(client: JobSubmissionClient) -> dict[str, str]:
    return {j.submission_id: str(j.status.value) for j in client.list_jobs() if j.submission_id}


# --- asking after jobs ------------------------------------------------------------------------------------------------


def list_jobs(address: str, *, token: str | None = None) -> list[JobState]:
    """Returns the studies that were submitted to the cluster, oldest first."""
    with _client(address, token) as client:
        return _jobs(client)


def job_status(job: str, address: str, *, token: str | None = None) -> JobState:
    """Returns the state of a job, named by its submission id or, for its newest job, by its study.

    Raises:
        SubmitError: the cluster has no such job or cannot be asked.
    """
    with _client(address, token) as client:
        return _find(client, job)


def job_logs(job: str, address: str, *, token: str | None = None) -> str:
    """Returns everything that the job has printed so far; ``job`` as in :func:`job_status`."""
    with _client(address, token) as client:
        return str(client.get_job_logs(_find(client, job).submission_id))


def job_stop(job: str, address: str, *, token: str | None = None, wait_s: float = STOP_WAIT_S + 15) -> JobState:
    """Asks a job to end, waits for it and returns its last state; one that has ended already is left alone.

    Raises:
        SubmitError: it has not ended after ``wait_s`` seconds; the cluster goes on ending it.
    """
    with _client(address, token) as client:
        state = _find(client, job)
        if state.status not in _ENDED:
            client.stop_job(state.submission_id)
        deadline = time.monotonic() + wait_s
        while state.status not in _ENDED:
            if time.monotonic() > deadline:
                raise SubmitError(f"{state.submission_id}: still {state.status} {wait_s:.0f} s after the stop")
            time.sleep(0.3)
            state = _find(client, state.submission_id)
        return state


def _jobs(client: JobSubmissionClient) -> list[JobState]:
    jobs = [_state(job) for job in client.list_jobs() if job.submission_id]
    return sorted(jobs, key=lambda job: job.started_at or 0.0)


def _state(job: JobDetails) -> JobState:
    seconds = [ms / 1000 if ms else None for ms in (job.start_time, job.end_time)]
    study = str((job.metadata or {}).get("study", ""))
    return JobState(str(job.submission_id), study, str(job.status.value), job.message or "", job.entrypoint, *seconds)


def _find(client: JobSubmissionClient, job: str) -> JobState:
    jobs = _jobs(client)
    found = [state for state in jobs if job in (state.submission_id, state.study)]
    if not found:
        known = ", ".join(state.submission_id for state in jobs[-5:]) or "none"
        raise SubmitError(f"no job {job!r} on this cluster; the newest: {known}")
    return found[-1]
