"""Whether a process lives: judged by boot, namespace and ticks, and not at all where these cannot be compared."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.places import ROOT
from workers.node import lease as lease_module
from workers.node.identity import alive, identity
from workers.node.lease import LeaseHeld, acquire
from workers.node.storage import LocalStorage

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc: judged by psutil")

TELL = """
import json, sys
from workers.node.identity import alive, identity
me = identity()
print(json.dumps([me, alive(me)]), flush=True)
sys.stdin.readline()
"""

HOLD = """
import json, sys
from workers.node import lease
from workers.node.storage import LocalStorage
lease.HEARTBEAT_S = 0.05
with lease.acquire(LocalStorage(sys.argv[1]), "study/lease") as held:
    print(json.dumps(held.owner), flush=True)
    sys.stdin.readline()
"""

TAKE = """
import json, sys
from workers.node.lease import LeaseHeld, acquire
from workers.node.storage import LocalStorage
try:
    acquire(LocalStorage(sys.argv[1]), "study/lease")
    print(json.dumps("taken"), flush=True)
except LeaseHeld:
    print(json.dumps("held"), flush=True)
sys.stdin.readline()
"""


@contextmanager
def running(code: str, *arguments: str, under: tuple[str, ...] = ()) -> Iterator[Any]:
    """Runs Python code under other namespaces, and gives what it prints while it waits."""
    command = [*under, sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.communicate("go on\n")


def container(*options: str) -> tuple[str, ...]:
    """Returns what a command is to be run under to have process numbers of its own, as in a container of the same hostname."""
    command = ("unshare", "--pid", "--fork", *options)
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no process namespace: unshare --pid is absent or not permitted")
    return command


def test_a_living_process_lives_and_an_ended_one_does_not() -> None:
    with running(TELL) as (record, itself):
        assert itself is True
        assert alive(record) is True
    assert alive(record) is False
    assert alive(identity()) is True


@linux
def test_the_wall_clock_counts_for_nothing() -> None:
    for hours in (-5, 5):
        record = identity()
        record["process_started"] += hours * 3600
        assert alive(record) is True
    assert alive({**identity(), "start_ticks": identity()["start_ticks"] + 1}) is False, "a reused number"


@linux
def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", TELL], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    record = json.loads(process.stdout.readline())[0]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert alive(record) is False
    process.communicate()


@linux
@pytest.mark.parametrize("key", ["host", "boot_id", "pid_namespace"])
def test_what_is_elsewhere_cannot_be_known(key: str) -> None:
    assert key in identity()
    assert alive({**identity(), key: "another"}) is None


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"pid": 1},
        {"pid": "x"},
        {"pid": None, "boot_id": 1},
        {"boot_id": "", "pid": 1},
    ],
)
def test_a_record_of_another_shape_cannot_be_judged(record: dict[str, Any]) -> None:
    assert alive({**record, "host": socket.gethostname()}) is None


def test_records_of_earlier_versions_are_judged_as_before() -> None:
    started = psutil.Process().create_time()
    old = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": started}
    assert alive(old) is True
    assert alive({**old, "process_started": started - 7200}) is False
    assert alive({**old, "host": "another"}) is None
    with running(TELL) as (record, _):
        ended = {key: record[key] for key in old}
    assert alive(ended) is False


@linux
def test_containers_of_one_hostname_cannot_judge_each_other() -> None:
    with running(TELL, under=container("--mount-proc")) as (record, itself):
        assert record["host"] == socket.gethostname()
        assert itself is True
        assert alive(record) is None
    assert alive(record) is None


@linux
def test_containers_of_one_hostname_do_not_displace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under = container("--mount-proc")
    storage = LocalStorage(tmp_path)
    with running(HOLD, storage.url, under=under) as owner:
        assert alive(owner) is None
        with pytest.raises(LeaseHeld, match=f"held by process {owner['pid']} on"):
            acquire(storage, "study/lease")
        with running(TAKE, storage.url, under=under) as found:
            assert found == "held"
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    with acquire(storage, "study/lease") as lease:
        assert lease.generation == 2
        with running(TAKE, storage.url, under=under) as found:
            assert found == "held"


@linux
def test_a_process_that_sees_the_proc_of_another_namespace_says_no_more_than_it_knows() -> None:
    with running(TELL, under=container()) as (record, itself):
        assert record.keys() == {"host", "pid"}
        assert itself is None
        assert alive(record) is None


@linux
def test_a_process_that_is_hidden_from_this_user_is_not_dead() -> None:
    if os.getuid() != 0:
        pytest.skip("hiding processes needs a mount namespace and another user")
    hide = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    container()  # or skip
    nobody = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    code = f"import os; from workers.node.identity import alive; {nobody}; print(alive({identity()!r}))"
    command = ["unshare", "--mount", "sh", "-c", hide, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr
