"""Loading data: real digits, real CIFAR images in Parquet, image folders, and what can be wrong with them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.places import DATA
from workers import tasks
from workers.tasks import TaskError, TaskInfo
from workers.tasks.image_sources import digits
from workers.tasks.pictures import cut
from workers.tasks.pixels import resize

CIFAR = DATA / "cifar10_subset.parquet"
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITPARETO_CACHE", str(tmp_path / "cache"))


def png(value: int, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, **columns: Any) -> dict[str, Any]:
    pq.write_table(pa.table(columns), path)
    return {"kind": "parquet", "path": str(path)}


def labelled(count: int = 20) -> dict[str, Any]:
    return {"image": [png(10 * i % 256) for i in range(count)], "label": [i % 2 for i in range(count)]}


def test_digits_are_split_by_class_and_standardised() -> None:
    task = tasks.load({"kind": "digits"})
    assert task.info == TaskInfo(10, 1, 8, tuple("0123456789"))
    assert (len(task.train), len(task.search), len(task.report)) == (1151, 287, 359)
    for split in (task.train, task.search, task.report):
        shares = np.bincount(split.labels, minlength=10) / len(split)
        assert np.abs(shares - 0.1).max() < 0.01
    images = torch.cat([x for _, x, _ in task.train.batches(500)])
    assert images.shape == (1151, 1, 8, 8)
    assert images.dtype == torch.float32
    assert abs(float(images.mean())) < 1e-4
    assert float(images.std()) == pytest.approx(1, abs=1e-3)


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    found, expected = digits(), load_digits()
    content = expected.images.astype(np.float32).tobytes() + expected.target.astype(np.int64).tobytes()
    assert found.digest == hashlib.sha256(content).hexdigest()[:16]
    assert found.class_names == tuple(str(name) for name in expected.target_names)


def test_no_image_is_in_two_splits() -> None:
    task = tasks.load({"kind": "digits"})
    seen = [s.images.reshape(len(s), -1).tobytes() for s in (task.train, task.search, task.report)]
    rows = [{data[i : i + 256] for i in range(0, len(data), 256)} for data in seen]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 1797


def test_the_search_split_depends_on_its_seed_and_the_report_split_does_not() -> None:
    one, other = (tasks.load({"kind": "digits", "split_seed": seed}) for seed in (0, 1))
    assert np.array_equal(one.report.images, other.report.images)
    assert not np.array_equal(one.search.images, other.search.images)
    again = tasks.load({"kind": "digits", "split_seed": 0})
    assert np.array_equal(one.search.images, again.search.images)


def test_limits_are_nested_and_leave_the_digest_alone() -> None:
    small, large = (tasks.load({"kind": "digits", "train_limit": n}) for n in (50, 100))
    assert len(small.train) == 50
    assert {x.tobytes() for x in small.train.images} < {x.tobytes() for x in large.train.images}
    assert tasks.data_digest({"kind": "digits"}) == tasks.data_digest({"kind": "digits", "train_limit": 5})


def test_batches_cover_the_split_in_a_seeded_order() -> None:
    split = tasks.load({"kind": "digits", "train_limit": 100}).train
    plain = torch.cat([i for i, _, _ in split.batches(32)])
    assert plain.tolist() == list(range(100))
    first, again, other = (torch.cat([i for i, _, _ in split.batches(32, shuffle_seed=s)]) for s in (3, 3, 4))
    assert first.tolist() == again.tolist() != other.tolist()
    assert sorted(first.tolist()) == plain.tolist()
    indices, images, labels = next(iter(split.batches(32, shuffle_seed=3)))
    raw = images * split.std[0] + split.mean[0]
    np.testing.assert_allclose(raw.permute(0, 2, 3, 1).numpy(), split.images[indices.numpy()], atol=1e-4)
    assert labels.tolist() == split.labels[indices.numpy()].tolist()


def test_given_means_are_used_and_checked() -> None:
    task = tasks.load({"kind": "digits", "mean": [8.0], "std": [4.0]})
    assert task.preprocessing()["mean"] == [8.0]
    with pytest.raises(TaskError, match=r"data\.mean must have one value for each of 1 channels"):
        tasks.load({"kind": "digits", "mean": [1, 2, 3]})


def test_digits_can_be_resized() -> None:
    task = tasks.load({"kind": "digits", "image_size": 16, "train_limit": 10})
    assert task.info.image_size == 16
    assert task.train.images.shape == (10, 16, 16, 1)
    assert task.train.images.dtype == np.float32


def test_cut_takes_the_share_of_every_class_and_leaves_one_image() -> None:
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    kept, off = cut(labels, 0.2, seed=5)
    assert np.bincount(labels[off], minlength=3).tolist() == [20, 2, 0]
    assert sorted([*kept, *off]) == list(range(111))


def test_resize_keeps_the_aspect_and_crops_the_middle() -> None:
    image = np.zeros((4, 12, 3), dtype=np.uint8)
    image[:, 4:8] = 200
    assert (resize(image, 4) == 200).all()
    assert resize(image, 2).shape == (2, 2, 3)


def like_cifar(folder: Path) -> Path:
    """A Parquet file of the real one's columns: 600 pictures of 32 x 32 pixels, a few grey levels and colours each."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    pictures, labels = [], np.arange(600) % 10
    for pixels in coarse:
        out = io.BytesIO()
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR).save(out, "PNG")
        pictures.append(out.getvalue())
    splits = ["train"] * 450 + ["test"] * 150
    names = [CIFAR_NAMES[i] for i in labels]
    write(folder / "made.parquet", image=pictures, label=labels.astype(np.int32), label_name=names, split=splits)
    return folder / "made.parquet"


@pytest.mark.parametrize(
    "real",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not CIFAR.is_file(), reason=f"the real CIFAR-10 subset is not at {CIFAR}")
        ),
    ],
)
def test_cifar_parquet_is_decoded_once_and_mapped(real: bool, tmp_path: Path) -> None:
    path = str(CIFAR if real else like_cifar(tmp_path))
    data = {"kind": "parquet", "path": path, "train_limit": 200, "search_limit": 50, "report_limit": 100}
    assert tasks.info(data).class_names == CIFAR_NAMES
    task = tasks.load(data)
    assert task.info == TaskInfo(10, 3, 32, tasks.info(data).class_names)
    assert task.train.images.shape == (200, 32, 32, 3)
    assert isinstance(task.train.images, np.memmap)
    assert 0.4 < task.train.mean[0] < 0.6
    written = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").glob("*.npy")}
    assert len(written) == 3
    again = tasks.load({**data, "digest": tasks.data_digest(data)})
    assert np.array_equal(again.train.images, task.train.images)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").glob("*.npy")} == written
    assert not [
        f for f in (tmp_path / "cache").iterdir() if f.suffix in (".partial", ".sums") or f.name.startswith(".")
    ]
    pixels = task.train.images.reshape(-1, 3) / 255
    np.testing.assert_allclose(task.train.mean, pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(task.train.std, pixels.std(axis=0), rtol=1e-9)


def test_parquet_rows_keep_their_labels(tmp_path: Path) -> None:
    data = write(
        tmp_path / "a.parquet", **labelled(), label_name=["even", "odd"] * 10, split=(["train"] * 15 + ["val"] * 5)
    )
    task = tasks.load(data)
    assert task.info.class_names == ("even", "odd")
    assert (len(task.train) + len(task.search), len(task.report)) == (15, 5)
    rows = task.train.images[:, 0, 0, 0] // 10
    assert (rows % 2 == task.train.labels).all()
    assert sorted(task.report.images[:, 0, 0, 0] // 10) == [15, 16, 17, 18, 19]


def test_a_folder_of_parquet_files_in_the_hugging_face_form(tmp_path: Path) -> None:
    for name, offset in (("train-00000-of-00002", 0), ("train-00001-of-00002", 8), ("test-00000-of-00001", 16)):
        images = [{"bytes": png(offset + i, mode="L"), "path": None} for i in range(8)]
        table = pa.table({"image": images, "label": [i % 4 for i in range(8)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=3)
    task = tasks.load({"kind": "parquet", "path": str(tmp_path)})
    assert task.info == TaskInfo(4, 1, 4, ("0", "1", "2", "3"))
    assert task.report.images[:, 0, 0, 0].tolist() == list(range(16, 24))
    both = np.concatenate([task.train.images, task.search.images])[:, 0, 0, 0]
    assert sorted(both.tolist()) == list(range(16))
    assert (task.train.images[:, 0, 0, 0] % 4 == task.train.labels).all()


def test_the_digest_names_the_content_and_not_the_place(tmp_path: Path) -> None:
    one = write(tmp_path / "a.parquet", **labelled())
    other = write(tmp_path / "b.parquet", **labelled())
    third = write(tmp_path / "c.parquet", **labelled(22))
    assert tasks.data_digest(one) == tasks.data_digest(other) != tasks.data_digest(third)
    with pytest.raises(TaskError, match=r"c\.parquet: content must be the study's \(digest"):
        tasks.load({**third, "digest": tasks.data_digest(one)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "must have the column 'image', has label; rename or add it"),
        ({"label": None}, "must have the column 'label'"),
        ({"label": ["cat", "dog"] * 10}, "must hold integers from 0, it holds string"),
        ({"label": [0, 1] * 9 + [0, None]}, "row 19 has no label"),
        ({"label": [0, -1] * 10}, "has label -1; labels must be 0 to 0"),
        ({"label": [0, 2] * 10}, "every label from 0 to 2 must have training images, 1 has none"),
        ({"image": [png(1)] * 4 + [b"no image"] + [png(1)] * 15}, r"a\.parquet row 4: must be a PNG or JPEG image"),
        (
            {"image": [png(1)] * 4 + [None] + [png(1)] * 15},
            "row 4: an image column must hold the bytes .* found NoneType",
        ),
        ({"image": [png(1)] * 7 + [png(1, (5, 5))] + [png(1)] * 12}, r"row 7: images must have one size, this is 5x5"),
        ({"image": [png(1, (5, 4))] * 20}, r"must be square, the first one is 4x5; set data\.image_size"),
        ({"split": ["train"] * 10 + ["holdout"] * 10}, "must hold 'train' and one of test, .* holds holdout, train"),
    ],
)
def test_faults_name_the_place_the_rule_and_the_remedy(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    columns = {k: v for k, v in (labelled() | change).items() if v is not None}
    with pytest.raises(TaskError, match=message):
        tasks.load(write(tmp_path / "a.parquet", **columns))


def test_a_test_label_unknown_in_training_is_a_fault(tmp_path: Path) -> None:
    columns = labelled() | {"label": [0, 1] * 9 + [5, 1], "split": ["train"] * 10 + ["test"] * 10}
    with pytest.raises(TaskError, match="test image 8 has label 5; labels must be 0 to 1"):
        tasks.load(write(tmp_path / "a.parquet", **columns))


def test_files_that_are_no_parquet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="must be a Parquet file or a folder"):
        tasks.load({"kind": "parquet", "path": str(tmp_path)})
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(TaskError, match="must be a Parquet file: "):
        tasks.load({"kind": "parquet", "path": str(tmp_path)})
    with pytest.raises(TaskError, match=r"data\.path must say where"):
        tasks.load({"kind": "parquet"})
    with pytest.raises(TaskError, match="must be one of digits"):
        tasks.load({"kind": "imagenet"})


def folder(root: Path, *parts: str) -> dict[str, Any]:
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(5):
                (root / part / name / f"{i}.png").write_bytes(png(100 * label + i, (6, 4)))
    return {"kind": "imagefolder", "path": str(root), "image_size": 4}


def test_an_image_folder(tmp_path: Path) -> None:
    task = tasks.load(folder(tmp_path / "data", "train", "val"))
    assert task.info == TaskInfo(2, 3, 4, ("cat", "dog"))
    assert (len(task.train), len(task.search), len(task.report)) == (8, 2, 10)
    assert (task.report.images[:, 0, 0, 0] // 100 == task.report.labels).all()


def test_an_image_folder_without_a_test_part(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "train")
    task = tasks.load(data)
    assert (len(task.train), len(task.search), len(task.report)) == (6, 2, 2)
    (tmp_path / "data" / "train" / "cat" / "0.png").write_bytes(b"broken")
    assert tasks.data_digest(data) != ""
    with pytest.raises(TaskError, match=r"cat/0\.png: must be a PNG or JPEG image"):
        tasks.load(data)


def test_a_search_split_of_nothing_is_refused_before_any_training(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "train", "test")
    assert tasks.info(data).num_classes == 2
    for name in ("cat", "dog"):
        for i in range(1, 5):
            (tmp_path / "data" / "train" / name / f"{i}.png").unlink()
    for ask in (tasks.info, tasks.load):
        with pytest.raises(TaskError, match=r"the search split would be empty: .*each has 1; add images"):
            ask(data)


def test_image_folder_faults(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "train", "test")
    (tmp_path / "data" / "test" / "horse").mkdir()
    with pytest.raises(TaskError, match=r"horse: every class must have a folder in train"):
        tasks.load(data)
    with pytest.raises(TaskError, match="must hold a folder train/"):
        tasks.load({"kind": "imagefolder", "path": str(tmp_path)})


def test_cifar_without_network_or_files_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    def no_network(*arguments: object, **more: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", no_network)
    with pytest.raises(TaskError, match=r"no route to host; unpack cifar-10-python\.tar\.gz into this folder"):
        tasks.load({"kind": "cifar10", "path": str(tmp_path)})
