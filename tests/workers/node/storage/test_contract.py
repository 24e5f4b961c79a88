"""The storage contract, over a folder, an object store in memory, an S3 server, and that server behind a bad connection."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import object_store
from tests.mounts import mounted
from tests.object_store import Proxy
from workers.node.storage import LocalStorage, Storage, StorageFault, open_storage, probe
from workers.node.storage import objects as objects_module

RACE = """
import sys, time
from workers.node.storage import open_storage
storage = open_storage(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(sum(storage.put_if_absent(f"race/{n}", sys.argv[2].encode()) for n in range(100)))
"""


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with object_store.s3_server() as url:
        yield url


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    made = Proxy(server)
    yield made
    made.close()


@pytest.fixture(params=["local", "memory", "s3", "s3 badly connected"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "root")
    if request.param == "memory":
        return open_storage(f"memory://{uuid.uuid4().hex}")
    if request.param == "s3":
        return open_storage(object_store.use(monkeypatch, request.getfixturevalue("server")))
    proxy: Proxy = request.getfixturevalue("proxy")
    proxy.faults = badly(0.1)
    return open_storage(object_store.use(monkeypatch, proxy.url))


PASSING = ("refuse", "lose", "lose and fail", "duplicate", "delay", "500", "503")
"""Faults that a client outlives: it asks again."""


def badly(share: float, faults: tuple[str, ...] = PASSING, seed: int = 0) -> object_store.Choose:
    """Chooses a fault for a share of the requests, by a seed."""
    chance = random.Random(seed)
    return lambda method, path: chance.choice(faults) if chance.random() < share else None


def test_what_is_put_is_read(storage: Storage) -> None:
    assert not storage.exists("a/x")
    assert storage.files("a") == storage.folders("a") == []
    with pytest.raises(FileNotFoundError):
        storage.read("a/x")
    storage.put_atomic("a/x", b"one")
    storage.put_atomic("a/x", b"two")
    storage.put_atomic("a/b/y", b"")
    assert storage.read("a/x") == b"two"
    assert storage.read("a/b/y") == b""
    assert storage.files("a") == ["x"]
    assert storage.folders("a") == ["b"]
    assert storage.folders("") == ["a"]
    assert storage.exists("a/x")
    assert not storage.exists("a/b"), "a folder is no file"
    storage.delete("a/x")
    storage.delete("a/x")
    assert storage.files("a") == []
    probe(storage)
    assert storage.files("") == []


def test_large_files(storage: Storage) -> None:
    data = random.Random(0).randbytes(12_000_000)
    storage.put_atomic("a/x", data)
    assert storage.read("a/x") == data


@pytest.mark.slow
def test_more_files_than_fit_in_one_answer_are_listed(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(object_store.use(monkeypatch, server))
    names = [f"{n:04d}" for n in range(1_001)]  # S3 lists 1,000 at a time
    for name in names:
        storage.put_atomic(f"a/{name}", b"")
    assert storage.files("a") == names


def test_put_if_absent_never_replaces(storage: Storage) -> None:
    assert storage.put_if_absent("a/x", b"first")
    assert not storage.put_if_absent("a/x", b"second")
    assert storage.read("a/x") == b"first"
    storage.delete("a/x")
    assert storage.put_if_absent("a/x", b"third")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a/..", "/etc/x"])
def test_no_name_leaves_the_storage(storage: Storage, name: str) -> None:
    calls = [
        lambda: storage.put_atomic(name, b""),
        lambda: storage.put_if_absent(name, b""),
        lambda: storage.read(name),
        lambda: storage.files(name),
        lambda: storage.folders(name),
        lambda: storage.exists(name),
        lambda: storage.delete(name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="leaves the storage"):
            call()


def test_of_eight_processes_one_creates_each_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen([*command, str(n)], stdin=pipe, stdout=pipe, text=True) for n in range(8)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = [int(racer.communicate()[0]) for racer in racers]
    storage = LocalStorage(tmp_path)
    contents = [storage.read(f"race/{n}").decode() for n in range(100)]
    assert wins == [contents.count(str(n)) for n in range(8)]


def race(storages: list[Storage], races: int) -> list[list[int]]:
    """Lets every storage's thread write each file; returns who was told that it had won, race by race."""
    won: list[list[int]] = [[] for _ in range(races)]
    start = threading.Barrier(len(storages))

    def put(racer: int) -> None:
        try:
            for n in range(races):
                start.wait()
                if storages[racer].put_if_absent(f"race/{n}", str(racer).encode()):
                    won[n].append(racer)
        except BaseException:
            start.abort()  # or the others would wait for ever
            raise

    with ThreadPoolExecutor(len(storages)) as pool:
        list(pool.map(put, range(len(storages))))
    return won


@pytest.mark.parametrize("storage", ["local", "memory"], indirect=True)
def test_each_of_a_thousand_races_has_one_winner(storage: Storage) -> None:
    won = race([storage] * 4, 1_000)
    assert won == [[int(storage.read(f"race/{n}"))] for n in range(1_000)]


@pytest.mark.parametrize("races", [30, pytest.param(1_000, marks=pytest.mark.slow)])
def test_each_race_over_a_bad_connection_has_one_winner(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, races: int
) -> None:
    """Every second write is told badly: before, the winner of such a race could be told that it had lost."""
    monkeypatch.setattr(object_store.time, "sleep", lambda seconds: None)
    bad = badly(0.5, ("lose", "lose and fail", "duplicate", "409", "412", "503"), seed=races)
    proxy.faults = lambda method, path: bad(method, path) if method == "PUT" else None
    url = object_store.use(monkeypatch, proxy.url)
    storages = [open_storage(url) for _ in range(3)]
    won = race(storages, races)
    proxy.faults = lambda method, path: None
    assert won == [[int(storages[0].read(f"race/{n}"))] for n in range(races)]
    assert len(proxy.met) == 6


def test_a_reader_never_sees_part_of_a_file(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    versions = [bytes([n]) * 300_000 for n in range(2)]
    storage.put_atomic("x", versions[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for version in versions:
                storage.put_atomic("x", version)

    writer = threading.Thread(target=write)
    writer.start()
    seen = {storage.read("x") for _ in range(200)}
    stop.set()
    writer.join()
    assert seen <= set(versions)
    assert storage.files("") == ["x"], "temporary files are not listed"


# --- what answers badly -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", object_store.FAULTS)
def test_who_wrote_a_file_is_told_so_whatever_became_of_the_answer(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    storage = open_storage(object_store.use(monkeypatch, proxy.url))
    left = [fault]
    proxy.faults = lambda method, path: left.pop() if method == "PUT" and left else None
    assert storage.put_if_absent("a/x", b"first")
    assert proxy.met == {fault: 1}
    left.append(fault)
    assert not storage.put_if_absent("a/x", b"second")
    assert storage.read("a/x") == b"first"


@pytest.mark.parametrize("fault", ["403", "500", "503"])
def test_absent_is_another_answer_than_refused(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(objects_module, "RETRY_S", 0.3)
    storage = open_storage(object_store.use(monkeypatch, proxy.url))
    storage.put_atomic("a/x", b"")
    proxy.faults = lambda method, path: fault
    calls = [
        lambda: storage.exists("a/x"),
        lambda: storage.exists("a/absent"),
        lambda: storage.files("a"),
        lambda: storage.folders(""),
        lambda: storage.read("a/x"),
        lambda: storage.put_atomic("a/x", b"other"),
    ]
    for call in calls:
        with pytest.raises(StorageFault, match=fault):
            call()


def test_a_server_that_is_gone_is_no_empty_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects_module, "RETRY_S", 0.3)
    storage = open_storage(object_store.use(monkeypatch, "http://127.0.0.1:9"))
    with pytest.raises(StorageFault):
        storage.exists("a/x")


@pytest.mark.slow
def test_a_server_that_asks_to_slow_down_for_a_minute_is_waited_for(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(object_store.use(monkeypatch, proxy.url))
    until = time.monotonic() + 65
    proxy.faults = lambda method, path: "503" if time.monotonic() < until else None
    assert storage.put_if_absent("a/x", b"first")
    assert proxy.met["503"] > 5


def test_a_server_without_conditional_writes_is_refused_with_the_reason(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(object_store.use(monkeypatch, proxy.url))
    proxy.hidden = "if-none-match"
    with pytest.raises(StorageFault, match="needs conditional writes"):
        probe(storage)
    assert storage.files("") == []


def test_a_storage_that_may_not_be_written_is_refused(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(object_store.use(monkeypatch, proxy.url))
    proxy.faults = lambda method, path: "403" if method == "PUT" else None
    with pytest.raises(StorageFault, match="403"):
        probe(storage)


def test_a_link_whose_answer_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NFS does, which this machine has not: it sends the request again, and is told that the name exists."""
    real = os.link

    def twice(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", twice)
    storage = LocalStorage(tmp_path)
    assert storage.put_if_absent("a/x", b"first")
    assert not storage.put_if_absent("a/x", b"second")
    assert storage.read("a/x") == b"first"


def test_a_lost_mount_is_no_empty_storage(tmp_path: Path) -> None:
    with mounted(tmp_path / "root") as mount:
        storage = LocalStorage(mount.folder)
        storage.put_atomic("a/x", b"")
        mount.unmount()
        calls = [
            lambda: storage.exists("a/x"),
            lambda: storage.files("a"),
            lambda: storage.folders("a"),
            lambda: storage.read("a/x"),
            lambda: storage.put_atomic("a/x", b"other"),
            lambda: storage.put_if_absent("a/y", b"other"),
        ]
        for call in calls:
            with pytest.raises(StorageFault, match="unmounted"):
                call()
        assert list(mount.folder.iterdir()) == []


def test_a_full_disk_keeps_what_was_there_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with mounted(tmp_path / "root", "64k") as mount:
        storage = LocalStorage(mount.folder)
        storage.put_atomic("x", b"first")
        filler = mount.fill()
        for call in (storage.put_atomic, storage.put_if_absent):
            with pytest.raises(StorageFault, match="No space left"):
                call("x", bytes(50_000))
        assert storage.read("x") == b"first"
        assert sorted(os.listdir(mount.folder)) == ["filler", "x"]
        filler.unlink()
        storage.put_atomic("x", b"second")


def test_a_disk_that_became_read_only_can_be_read(tmp_path: Path) -> None:
    with mounted(tmp_path / "root") as mount:
        storage = LocalStorage(mount.folder)
        storage.put_atomic("x", b"first")
        mount.remount("ro")
        with pytest.raises(StorageFault, match="Read-only"):
            storage.put_atomic("x", b"second")
        assert storage.read("x") == b"first"
        assert storage.files("") == ["x"]


def test_urls(tmp_path: Path) -> None:
    assert isinstance(open_storage(f"file://{tmp_path}"), LocalStorage)
    assert open_storage(f"file://{tmp_path}").url == str(tmp_path)
    assert open_storage("memory://bucket/").url == "memory://bucket"
    assert open_storage("memory://bucket").local("x") is None
    open_storage("memory://bucket").put_atomic("a/x", b"there")
    assert open_storage("memory://bucket/a").read("x") == b"there"
    assert open_storage("memory://bucket/a").files("") == ["x"]
    with pytest.raises(ValueError, match="no storage is known for ftp://; use a folder, or one of s3://"):
        open_storage("ftp://host/path")
    assert open_storage(tmp_path).local("a/x") == tmp_path / "a" / "x"
