"""Who a process is, said so that another one can judge later whether it still lives.

A number and a hostname do not say it. Numbers are reused, two containers may have one hostname, and the wall clock, by which
``psutil`` tells when a process started, is set. So the record holds the boot of the kernel, the namespace in which the number
counts, and the start in ticks since that boot. Whoever cannot compare these does not know, which is another answer than "dead".
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_PROC = Path("/proc")

_SAME_START_S = 1.0
"""Two readings of one process's start by the wall clock differ by less, as long as nobody sets it."""


def identity() -> dict[str, Any]:
    """Returns what names this process among all machines' past and present ones; :func:`alive` reads it.

    Where this process does not see its own namespace's ``/proc``, host and number are all that can be told, and nobody can
    judge by them.
    """
    record: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    namespace = _namespace()
    if namespace is not None:
        record |= {**namespace, "start_ticks": _state_and_ticks(os.getpid())[1]}
    if namespace is not None or not _PROC.is_dir():  # psutil reads another process in another namespace's /proc
        record["process_started"] = psutil.Process().create_time()
    return record


def alive(record: Mapping[str, Any]) -> bool | None:
    """Says whether the process with the :func:`identity` in ``record`` lives; None where it cannot be known from here.

    It can on the same host, in the same boot and the same process namespace. The hostname counts beside the boot, since
    virtual machines that were copied while they ran share the latter.
    """
    if record.get("host") != socket.gethostname():
        return None
    try:
        pid = int(record["pid"])
        if "boot_id" not in record:
            return _alive_by_clock(pid, float(record["process_started"]))
        here = _namespace()
        if here is None or any(record.get(key) != value for key, value in here.items()):
            return None
        return _alive_by_ticks(pid, int(record["start_ticks"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _namespace() -> dict[str, str] | None:
    """Returns in which boot and namespace process numbers count; None where the platform does not tell.

    None as well for a process whose ``/proc`` belongs to another namespace than itself: the numbers there are not its own.
    """
    try:
        if os.readlink(_PROC / "self") != str(os.getpid()):
            return None
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return {"boot_id": boot, "pid_namespace": os.readlink(_PROC / "self/ns/pid")}
    except OSError:
        return None


def _state_and_ticks(pid: int) -> tuple[str, int]:
    """Returns a process's state letter and its start in clock ticks since boot: fields 3 and 22 of proc_pid_stat(5)."""
    fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _alive_by_ticks(pid: int, started: int) -> bool | None:
    try:
        state, ticks = _state_and_ticks(pid)
    except OSError:
        return _hidden(pid)
    return ticks == started and state not in "ZX"


def _hidden(pid: int) -> bool | None:
    """Tells a process that is gone (False) from one that this user may not see (None): ``/proc`` with hidepid shows neither."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return None


def _alive_by_clock(pid: int, started: float) -> bool:
    """For platforms without ``/proc``, and for records of versions that knew nothing else."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > _SAME_START_S:
            return False
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
