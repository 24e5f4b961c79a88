"""The storage contract, over a local folder and over an object store in memory."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.node.storage import LocalStorage, Storage, open_storage

RACE = """
import sys, time
from workers.node.storage import open_storage
storage = open_storage(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(sum(storage.put_if_absent(f"race/{n}", sys.argv[2].encode()) for n in range(100)))
"""


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    opened = open_storage(tmp_path / "root" if request.param == "local" else f"memory://{uuid.uuid4().hex}")
    yield opened
    for name in opened.files("a"):
        opened.delete(f"a/{name}")


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


def test_of_eight_threads_one_creates_the_file(tmp_path: Path) -> None:
    storage, won = LocalStorage(tmp_path), []
    barrier = threading.Barrier(8)

    def put(n: int) -> None:
        barrier.wait()
        if storage.put_if_absent("x", str(n).encode()):
            won.append(n)

    threads = [threading.Thread(target=put, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [storage.read("x").decode()] == [str(n) for n in won]


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


def test_urls(tmp_path: Path) -> None:
    assert isinstance(open_storage(f"file://{tmp_path}"), LocalStorage)
    assert open_storage(f"file://{tmp_path}").url == str(tmp_path)
    assert open_storage("memory://bucket/").url == "memory://bucket"
    assert open_storage("memory://bucket").local("x") is None
    assert open_storage(tmp_path).local("a/x") == tmp_path / "a" / "x"
