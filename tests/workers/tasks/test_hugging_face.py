"""Data as Hugging Face ``datasets`` lays it out: saved folders, Parquet with its features, images in folders, names of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.workers.tasks.test_strange_data import colour, folder, reds
from tests.workers.tasks.test_strange_data import own_cache as own_cache
from workers import tasks
from workers.tasks import TaskError
from workers.tasks.kinds import KINDS

NAMES = ["cat", "dog"]


def rows(first: int, count: int, image: str = "img", label: str = "fine") -> pa.Table:
    """A table as ``Dataset`` holds it: images as {bytes, path}, and what they are in the schema's metadata."""
    features = {image: {"_type": "Image"}, label: {"names": NAMES, "_type": "ClassLabel"}}
    numbers = range(first, first + count)
    found = pa.table(
        {
            image: [{"bytes": colour(i), "path": None} for i in numbers],
            label: pa.array([i % 2 for i in numbers], pa.int64()),
        }
    )
    return found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def saved(root: Path, first: int, count: int, shards: int = 1) -> None:
    """Writes what ``save_to_disk`` writes of one ``Dataset``."""
    root.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    each = count // shards
    for number, name in enumerate(names):
        found = rows(first + number * each, each)
        with pa.OSFile(str(root / name), "wb") as file, pa.ipc.new_stream(file, found.schema) as writer:
            writer.write_table(found, max_chunksize=3)
    (root / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None})
    )
    (root / "dataset_info.json").write_text("{}")
    (root / "cache-0123.arrow").write_bytes(b"of a map()")


def asked(root: Path) -> dict[str, Any]:
    return {"kind": "huggingface", "path": str(root)}


def test_a_saved_dict_of_parts(tmp_path: Path) -> None:
    for part, first, count, shards in (("train", 0, 20, 2), ("test", 100, 8, 1), ("extra", 200, 4, 1)):
        saved(tmp_path / "saved" / part, first, count, shards)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test", "extra"]}')
    for kind in ("huggingface", "parquet"):
        task = tasks.load({**asked(tmp_path / "saved"), "kind": kind})
        assert task.info.class_names == ("cat", "dog")
        assert reds(task.report.images) == set(range(100, 108))
        assert reds(task.train.images) | reds(task.search.images) == set(range(20))
        assert (task.train.images[:, 0, 0, 0] % 2 == task.train.labels).all()
    assert "the part 'extra' is not used: 4 images" in tasks.describe(asked(tmp_path / "saved")).notes
    (tmp_path / "saved" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(TaskError, match=r"train/data-00001-of-00002\.arrow must be there, state\.json names it"):
        tasks.info(asked(tmp_path / "saved"))
    (tmp_path / "saved" / "test" / "state.json").write_text("[]")
    with pytest.raises(TaskError, match="must be what save_to_disk wrote"):
        tasks.info(asked(tmp_path / "saved"))


def test_one_saved_part_is_cut(tmp_path: Path) -> None:
    saved(tmp_path / "saved", 0, 20, 2)
    task = tasks.load(asked(tmp_path / "saved"))
    assert [len(one) for one in (task.train, task.search, task.report)] == [12, 4, 4]


def test_parquet_with_features_names_columns_and_classes(tmp_path: Path) -> None:
    (tmp_path / "plain_text").mkdir()
    pq.write_table(rows(0, 20), tmp_path / "plain_text" / "train-00000-of-00001.parquet")
    pq.write_table(rows(100, 8), tmp_path / "plain_text" / "test-00000-of-00001.parquet")
    task = tasks.load(asked(tmp_path))
    assert task.info.class_names == ("cat", "dog")
    assert reds(task.report.images) == set(range(100, 108))
    pq.write_table(pa.table({"left": [b""], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(TaskError, match=r"must have the column 'image', has left, label; rename or add it"):
        tasks.info(asked(tmp_path / "x.parquet"))


def test_two_columns_of_classes_are_named(tmp_path: Path) -> None:
    found = rows(0, 20)
    features = {
        "img": {"_type": "Image"},
        **{name: {"names": NAMES, "_type": "ClassLabel"} for name in ("fine", "coarse")},
    }
    found = found.append_column("coarse", found["fine"])
    found = found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(found, tmp_path / "a.parquet")
    with pytest.raises(
        TaskError, match="column 'label', has img, fine, coarse; fine and coarse could be it; rename or add it"
    ):
        tasks.info(asked(tmp_path))


def images(*parts: str) -> dict[str, bytes]:
    return {
        f"{part}/{name}/{i}.png": colour(100 * number + 2 * i + label)
        for number, part in enumerate(parts)
        for label, name in enumerate(NAMES)
        for i in range(5)
    }


@pytest.mark.parametrize(("parts", "report"), [(("train", "test"), 10), (("x/training", "x/val"), 10), (("a",), 2)])
def test_images_in_folders_of_their_classes(parts: tuple[str, ...], report: int, tmp_path: Path) -> None:
    found = images(*parts) | {f"{parts[0]}/.ipynb_checkpoints/0.png": b"", "README.md": b"# cats", "notes.txt": b""}
    task = tasks.load(asked(Path(folder(tmp_path / "data", found)["path"])))
    assert task.info.class_names == ("cat", "dog")
    assert len(task.report) == report
    assert (task.report.images[:, 0, 0, 0] % 2 == task.report.labels).all()
    if len(parts) == 2:
        assert reds(task.report.images) == set(range(100, 110))
    first, last = tasks.describe(asked(tmp_path / "data")).notes
    assert last == "not read, most files are images: 1 .txt"
    assert first == (
        "parts are told by names of folders"
        if len(parts) == 2
        else "nothing tells a test part: 20% of each class are the report split"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train/metadata.csv": b"file_name,label"}, r"metadata\.csv: what images are must be said by their folders"),
        ({"train/0.png": colour(1)}, r"train/0\.png: every image must lie in the folder of its class, all as deep"),
        ({"other/cat/0.png": colour(1)}, "other/cat/0.png must be of a part"),
        ({"test/train/0.png": colour(1)}, "test/train/0.png must be of one part"),
        ({"test/owl/0.png": colour(1)}, "test/owl: every class must have training images too"),
    ],
)
def test_images_that_no_rule_tells_are_refused(more: dict[str, bytes], message: str, tmp_path: Path) -> None:
    folder(tmp_path / "data", images("train", "test") | more)
    with pytest.raises(TaskError, match=message):
        tasks.info(asked(tmp_path / "data"))


def test_other_formats_are_named(tmp_path: Path) -> None:
    folder(tmp_path / "data", {"train-0.tar": b"", "train-1.tar": b"", "x.json": b"{}"})
    with pytest.raises(TaskError, match=r"must hold Parquet, Arrow or image files, holds 2 \.tar; convert them"):
        tasks.info(asked(tmp_path / "data"))


def test_a_data_set_of_the_hub_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        TaskError, match=r"data\.path owner/flowers: must be a folder, or a data set of the hub that can be"
    ):
        tasks.info({"kind": "huggingface", "path": "owner/flowers"})


def test_a_data_set_of_the_hub_is_fetched_and_read_as_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the download itself does cannot be tried here: it is asked for the right files, and its folder is read."""
    asked_for: dict[str, Any] = {}

    def fetch(name: str, **more: Any) -> str:
        asked_for.update(more, name=name)
        return str(tmp_path / "snapshot")

    (tmp_path / "snapshot").mkdir()
    pq.write_table(rows(0, 20), tmp_path / "snapshot" / "train.parquet")
    pq.write_table(rows(100, 8), tmp_path / "snapshot" / "test.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert reds(tasks.load({"kind": "huggingface", "path": "owner/flowers@refs/pr/1"}).report.images) == set(
        range(100, 108)
    )
    assert (asked_for["name"], asked_for["revision"], asked_for["repo_type"]) == (
        "owner/flowers",
        "refs/pr/1",
        "dataset",
    )
    assert {"*.parquet", "*.arrow", "*.png", "README.md"} <= set(asked_for["allow_patterns"])
    kind = KINDS["huggingface"]
    names = ("owner/flowers", "owner/flowers@main", "a-b/c_d.e")
    assert all(map(kind.is_name, names))
    assert not any(map(kind.is_name, ("flowers", "/data/flowers", "../flowers", "a/b/c", "a/b@", 3)))
    assert not KINDS["parquet"].is_name("owner/flowers")
