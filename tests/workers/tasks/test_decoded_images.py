"""Decoded images on a node: decoded once whoever asks, gone on with, told apart, and a disk that is too small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workers.tasks import test_tasks
from tests.workers.tasks.test_tasks import folder, labelled, write
from workers import tasks
from workers.tasks import TaskError, decoded, image_sources
from workers.tasks.image_sources import ArraySource
from workers.tasks.pixels import resize

own_cache = test_tasks.own_cache


LOAD = """
import json, os, sys, PIL.Image
from workers import tasks
opened, notes = PIL.Image.open, os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def counted(file, *more):
    os.write(notes, f"{file}\\n".encode())
    return opened(file, *more)
PIL.Image.open = counted
task = tasks.load(json.loads(sys.argv[1]))
print(int(task.train.images.sum()), task.train.mean, len(task.search), len(task.report))
"""


def test_images_are_decoded_once_whoever_asks(tmp_path: Path) -> None:
    """Two processes at the same time, and a third that has no folder any more, only the digest of what was in it."""
    data = folder(tmp_path / "data", "train", "val")
    known = {**data, "digest": tasks.data_digest(data)}

    def start(what: dict[str, Any], notes: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LOAD, json.dumps(what), str(notes)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    racers = [start(what, tmp_path / "opened") for what in (data, known)]
    shown = {racer.communicate()[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert len(shown) == 1
    opened = (tmp_path / "opened").read_text().split()
    counts = {name: opened.count(name) for name in set(opened)}
    assert set(counts.values()) == {1}
    assert len(counts) == 20
    (tmp_path / "data").rename(tmp_path / "gone")
    again = start(known, tmp_path / "again")
    assert again.communicate()[0] in shown
    assert (tmp_path / "again").read_text() == ""


def test_decoding_that_was_ended_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "a.parquet", **labelled(40))
    decode, calls = decoded.decode, []

    def counted(content: Any, name: str, channels: int | None) -> Any:
        calls.append(name)
        if limit is not None and len(calls) > limit:
            raise KeyboardInterrupt
        return decode(content, name, channels)

    monkeypatch.setattr(decoded, "decode", counted)
    limit: int | None = 12
    with pytest.raises(KeyboardInterrupt):
        tasks.load(data)
    done = set(calls[:12])
    limit = None
    calls.clear()
    task = tasks.load(data)
    assert len(calls) == 40 - 12
    assert not done & set(calls)
    rows = [s.images[:, 0, 0, 0].tolist() for s in (task.train, task.search, task.report)]
    assert sorted(value for part in rows for value in part) == sorted(10 * i % 256 for i in range(40))
    monkeypatch.setenv("VITPARETO_CACHE", str(tmp_path / "another"))
    fresh = tasks.load(data)
    for one, other in zip(
        (task.train, task.search, task.report), (fresh.train, fresh.search, fresh.report), strict=True
    ):
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.labels, other.labels)
        assert one.mean == other.mean


def test_other_sizes_and_selections_are_other_entries(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "train", "val")
    known = {**data, "digest": tasks.data_digest(data)}
    tasks.load(known)
    assert tasks.load({**known, "image_size": 2}).train.images.shape == (8, 2, 2, 3)
    assert len(tasks.load({**known, "train_limit": 3}).train) == 3
    assert not np.array_equal(tasks.load({**known, "split_seed": 1}).train.images, tasks.load(known).train.images)
    given = tasks.load({**known, "mean": [0.1, 0.2, 0.3]})
    assert given.train.mean == (0.1, 0.2, 0.3)
    assert given.train.std == tasks.load(known).train.std
    with pytest.raises(TaskError, match=r"data\.std must have one value for each of 3 channels"):
        tasks.load({**known, "std": [1.0]})


def test_a_file_that_changes_and_keeps_its_size_is_seen(tmp_path: Path) -> None:
    for i in range(4):
        file = tmp_path / "train" / "ab"[i % 2] / f"{i}.ppm"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"P6 1 1 255\n" + bytes([i, 0, 0]))
    data = {"kind": "imagefolder", "path": str(tmp_path)}
    first = tasks.data_digest(data)
    assert tasks.data_digest(data) == first
    file = tmp_path / "train" / "a" / "0.ppm"
    later = file.stat().st_mtime_ns + 10**9  # a coarse clock may give both writes the same time
    file.write_bytes(b"P6 1 1 255\n" + bytes([200, 0, 0]))
    os.utime(file, ns=(later, later))
    assert tasks.data_digest(data) != first
    with pytest.raises(TaskError, match="content must be the study's"):
        tasks.load({**data, "digest": first})


def test_images_in_memory_that_are_resized_are_kept_by_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CIFAR at 224 pixels is: resized once, mapped by all; at its own size it stays in memory."""
    generator = np.random.default_rng(0)
    arrays = {part: generator.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8) for part in ("train", "test")}
    source = ArraySource(arrays, {part: np.arange(20) % 2 for part in arrays}, ["a", "b"], "0" * 16)
    monkeypatch.setattr(image_sources, "open_cifar10", lambda data: source)
    data = {"kind": "cifar10", "path": str(tmp_path), "search_fraction": 0.5}
    plain = tasks.load(data)
    assert not isinstance(plain.train.images, np.memmap)
    large = tasks.load({**data, "image_size": 16})
    assert isinstance(large.train.images, np.memmap)
    assert np.array_equal(large.train.images[3], resize(plain.train.images[3], 16))
    assert large.train.labels.tolist() == plain.train.labels.tolist()


def test_a_disk_that_is_too_small_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded.os, "posix_fallocate", full)
    with pytest.raises(TaskError, match="No space left on device; set VITPARETO_CACHE to a larger folder"):
        tasks.load(write(tmp_path / "a.parquet", **labelled()))
    assert not list((tmp_path / "cache").glob("*.partial"))
