"""Data as people have it: what is trained on, what pixels become, what is no data; and one line for what cannot be used."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from workers import tasks
from workers.tasks import TaskError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITPARETO_CACHE", str(tmp_path / "cache"))


def encoded(pixels: Any, form: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(out, form, **more)
    return out.getvalue()


def colour(value: int, size: int = 4) -> bytes:
    return encoded(np.full((size, size, 3), (value, 0, 255 - value), dtype=np.uint8))


def grey(value: int, size: int = 4) -> bytes:
    return encoded(np.full((size, size), value, dtype=np.uint8))


def table(file: Path, first: int, count: int, **more: Any) -> None:
    """Writes images whose red is their number, of two classes in turn."""
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    pq.write_table(pa.table({"image": [colour(i) for i in numbers], "label": [i % 2 for i in numbers], **more}), file)


def reds(images: Any) -> set[int]:
    return set(images[:, 0, 0, 0].tolist())


def folder(root: Path, images: dict[str, bytes]) -> dict[str, Any]:
    for name, content in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return {"kind": "imagefolder", "path": str(root)}


def two_classes(make: Any = colour, parts: Sequence[str] = ("train", "test"), each: int = 5) -> dict[str, bytes]:
    return {
        f"{part}/{name}/{i}.png": make(50 * label + 10 * number + i)
        for number, part in enumerate(parts)
        for label, name in enumerate(("cat", "dog"))
        for i in range(each)
    }


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/default/train/0000", "data/default/test/0000"),
        ("split=train/0", "split=test/0"),
        ("cifar10-train", "cifar10-test"),
        ("training/0", "evaluation/0"),
        ("train-00000-of-00001", "test-00000-of-00001"),
    ],
)
def test_no_test_image_is_trained_on(train: str, test: str, tmp_path: Path) -> None:
    table(tmp_path / f"{train}.parquet", 0, 40)
    table(tmp_path / f"{test}.parquet", 100, 15)
    task = tasks.load({"kind": "parquet", "path": str(tmp_path)})
    assert reds(task.report.images) == set(range(100, 115))
    assert reds(task.train.images) | reds(task.search.images) == set(range(40))


def test_parts_are_part_of_the_digest_unless_files_begin_with_them(tmp_path: Path) -> None:
    digests = set()
    for names in (("a/train/0", "a/test/0"), ("a/test/0", "a/train/0"), ("x", "y"), ("train-0", "test-0")):
        root = tmp_path / names[0].replace("/", "-")
        for name, first in zip(names, (0, 100), strict=True):
            table(root / f"{name}.parquet", first, 20)
        digests.add(tasks.data_digest({"kind": "parquet", "path": str(root)}))
    assert len(digests) == 4  # the last two have their files in another order


def test_one_file_is_all_there_is_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("dev.parquet", "test.parquet", "train_val.parquet"):
        table(tmp_path / name / name, 0, 20)
        for path in (tmp_path / name, tmp_path / name / name):
            task = tasks.load({"kind": "parquet", "path": str(path)})
            assert [len(one) for one in (task.train, task.search, task.report)] == [12, 4, 4]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"trainA": 20, "testA": 20}, "do neither; write train, validation and test as words of their own"),
        ({"train": 20, "other": 20}, "other.parquet must be of a part"),
        ({"test/0": 20, "test/1": 20}, "names of folders must hold 'train' and one of test"),
        ({"train/a": 20, "test/train/a": 20}, "test/train/a.parquet must be of one part"),
    ],
)
def test_files_of_no_part_or_of_two_are_refused(files: dict[str, int], message: str, tmp_path: Path) -> None:
    for number, (name, count) in enumerate(files.items()):
        table(tmp_path / f"{name}.parquet", 30 * number, count)
    for ask in (tasks.info, tasks.load, tasks.data_digest):
        with pytest.raises(TaskError, match=message):
            ask({"kind": "parquet", "path": str(tmp_path)})


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (["train"] * 10 + ["Test"] * 10, r"row 10: the part 'Test' must be written 'test'"),
        (["train"] * 10 + ["test"] * 8 + [None] * 2, r"row 18: column 'split' must say of every image"),
        (["train"] * 10 + ["holdout"] * 10, "it holds holdout, train"),
        (["train"] * 10 + ["test"] * 8 + ["tests"] * 2, r"row 18: the part 'tests' must be written 'test'"),
    ],
)
def test_values_of_split_that_mean_nothing_are_refused(split: list[str], message: str, tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", 0, 20, split=split)
    with pytest.raises(TaskError, match=message):
        tasks.info({"kind": "parquet", "path": str(tmp_path)})


def test_a_part_that_is_not_used_is_said(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", 0, 20, split=["train"] * 10 + ["test"] * 4 + ["val"] * 4 + ["extra"] * 2)
    notes = tasks.describe({"kind": "parquet", "path": str(tmp_path)}).notes
    assert "the part 'extra' is not used: 2 images" in notes
    assert "the part 'val' is not used beside a test part: 4 images" in notes


@pytest.mark.parametrize("missing", [-1, None])
def test_a_test_part_without_labels_is_passed_over_and_it_is_said(missing: int | None, tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", 0, 20)
    table(tmp_path / "validation.parquet", 100, 8)
    columns = {"image": [colour(200 + i) for i in range(4)], "label": pa.array([missing] * 4, pa.int64())}
    pq.write_table(pa.table(columns), tmp_path / "test.parquet")
    data = {"kind": "parquet", "path": str(tmp_path)}
    assert reds(tasks.load(data).report.images) == set(range(100, 108))
    assert "the part 'test' has no labels and is not used" in tasks.describe(data).notes


# --- pixels -----------------------------------------------------------------------------------------------------------


def deep(value: int) -> bytes:
    return encoded(np.full((4, 4), 257 * value, dtype=np.uint16))


def bright(value: int) -> bytes:
    return encoded(np.full((4, 4), value / 255, dtype=np.float32), "TIFF")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (deep, "all images are of 16 bits a grey pixel: divided by 257 to 8 bits"),
        (bright, "all images are of floating-point pixels: multiplied by 255, 1 is white"),
        (grey, None),
    ],
)
def test_pixels_are_scaled_by_their_depth_and_it_is_said(make: Any, said: str | None, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", two_classes(make))
    task = tasks.load(data)
    assert task.info.in_chans == 1
    assert reds(task.report.images) == {*range(10, 15), *range(60, 65)}
    assert tasks.describe(data).notes == ((said,) if said else ())


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            np.full((4, 4), 200, dtype=np.float32),
            "0.tif: floating-point pixels must be from 0 .black. to 1 .white., .* 200 to 200",
        ),
        (
            np.full((4, 4), -1, dtype=np.int32),
            "0.tif: pixels must have 8 or 16 bits, these are 32-bit integers from -1 to -1",
        ),
    ],
)
def test_pixels_of_no_known_range_are_refused_by_plan(pixels: Any, message: str, tmp_path: Path) -> None:
    images = two_classes(grey)
    images["train/cat/0.tif"] = encoded(pixels, "TIFF")
    data = folder(tmp_path / "data", images)
    for ask in (tasks.describe, tasks.load):
        with pytest.raises(TaskError, match=message):
            ask(data)


def test_sixteen_bits_that_are_nearly_black_are_a_warning(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", two_classes(lambda value: encoded(np.full((4, 4), 10 * value, dtype=np.uint16))))
    (warning,) = tasks.describe(data).warnings
    assert "16-bit pixels of the 20 decoded images reach 514 of 65,535" in warning


def test_channels_are_those_of_all_training_images_not_of_the_first(tmp_path: Path) -> None:
    images = two_classes()
    images["train/cat/0.png"] = grey(7)
    data = folder(tmp_path / "data", images)
    task = tasks.load(data)
    assert task.info.in_chans == tasks.info(data).in_chans == 3
    assert task.train.images.shape[-1] == 3
    assert "1 image is grey: the one channel is repeated" in tasks.describe(data).notes


@pytest.mark.parametrize("kind", ["files", "digits"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_study_may_say_how_many_channels(kind: str, channels: int, tmp_path: Path) -> None:
    data = {"kind": "digits"} if kind == "digits" else folder(tmp_path / "data", two_classes())
    task = tasks.load({**data, "channels": channels})
    assert task.info.in_chans == channels == len(task.train.mean)
    assert task.train.images.shape[-1] == channels
    assert task.preprocessing()["in_chans"] == channels
    if kind == "files" and channels == 1:  # 0.299 red, 0.587 green, 0.114 blue
        assert reds(task.report.images) == {
            round(0.299 * v + 0.114 * (255 - v)) for v in (*range(10, 15), *range(60, 65))
        }


@pytest.mark.parametrize(("form", "ending"), [("JPEG", "jpg"), ("PNG", "png"), ("TIFF", "tif"), ("WEBP", "webp")])
def test_images_are_upright(form: str, ending: str, tmp_path: Path) -> None:
    """The camera was turned: stored 4 high and 8 wide, the left half white; shown 8 high, its upper half white."""
    stored = np.zeros((4, 8, 3), dtype=np.uint8)
    stored[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {f"{name.rpartition('.')[0]}.{ending}": encoded(stored, form, exif=exif) for name in two_classes()}
    data = {**folder(tmp_path / "data", images), "image_size": 4}
    task = tasks.load(data)
    assert (task.train.images[0, 0] > 150).all()
    assert (task.train.images[0, -1] < 100).all()
    found = tasks.describe(data)
    assert found.sizes == {(8, 4): 20}
    assert found.notes == (
        () if form == "TIFF" else ("all images are turned upright by their EXIF orientation",)
    )  # Pillow's
    with pytest.raises(TaskError, match=r"must be square, the first one is 8x4"):
        tasks.info({**data, "image_size": None})


def test_data_whose_pixels_are_read_as_ever_keeps_its_digest(tmp_path: Path) -> None:
    """And no other: a trial on wrong pixels is not one on right ones."""
    plain, mixed = (folder(tmp_path / name, two_classes()) for name in ("plain", "mixed"))
    assert tasks.data_digest(plain) == tasks.data_digest(mixed) == "2c014289f47f6dd7"
    content = tmp_path / "mixed" / "train" / "cat" / "0.png"
    content.write_bytes(grey(0))
    from workers.tasks.node_cache import folder_digest

    files = sorted((tmp_path / "mixed").rglob("*.png"))
    assert tasks.data_digest(mixed) != folder_digest(tmp_path / "mixed", [*files[10:], *files[:10]])


# --- folders ----------------------------------------------------------------------------------------------------------


def test_hidden_folders_are_no_classes_and_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    images = two_classes()
    for hidden in (".ipynb_checkpoints/0-checkpoint", "__MACOSX/x", "cat/.ipynb_checkpoints/0", "cat/._0", "@eaDir/0"):
        images[f"train/{hidden}.png"] = colour(1)
    images |= {
        "train/cat/a.heic": b"",
        "train/cat/b.heic": b"",
        "test/dog/notes.txt": b"",
        "train/loose.png": colour(2),
    }
    images |= {"train/cat/__5.png": images.pop("train/cat/4.png")}  # of files only the dot hides
    images |= {"train/cat/Thumbs.db": b"", "extra/cat/0.png": colour(3)}
    data = folder(tmp_path / "data", images)
    task = tasks.load(data)
    assert task.info.class_names == ("cat", "dog")
    assert len(task.train) + len(task.search) == 10
    notes = "\n".join(tasks.describe(data).notes)
    assert "not read, their endings are not those of images: 2 .heic, 1 .db, 1 .txt" in notes
    assert "not read: 1 images in train/ that are in no class's folder" in notes
    assert "ignored as hidden: 5, train/.ipynb_checkpoints, train/@eaDir, train/__MACOSX ..." in notes
    assert "folder extra/ is not used" in notes


def test_every_ending_of_a_known_format_is_read(tmp_path: Path) -> None:
    images = two_classes()
    pixels = np.full((4, 4, 3), 77, dtype=np.uint8)
    for ending, form in (("jfif", "JPEG"), ("JPE", "JPEG"), ("gif", "GIF"), ("pnm", "PPM")):
        images[f"train/cat/x.{ending}"] = encoded(pixels, form)
    task = tasks.load(folder(tmp_path / "data", images))
    assert len(task.train) + len(task.search) == 14


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"train/owl/": b""},
            r"train/owl: a class must have training images, it has none; add some, or remove the folder",
        ),
        ({"train/owl/a.heic": b""}, r"owl: a class must have .*; not read are 1 \.heic; convert them to PNG or JPEG"),
        ({"training/cat/0.png": colour(1)}, "must hold one folder of the part train, holds train and training"),
    ],
)
def test_faults_of_folders_name_the_folder(more: dict[str, bytes], message: str, tmp_path: Path) -> None:
    (tmp_path / "data/train/owl").mkdir(parents=True) if "train/owl/" in more else None
    data = folder(tmp_path / "data", two_classes() | {name: one for name, one in more.items() if name[-1] != "/"})
    with pytest.raises(TaskError, match=message):
        tasks.info(data)


def test_folders_that_are_written_otherwise_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"must hold a folder train/ .*, holds Test/, Train/; move or rename it"):
        tasks.info(folder(tmp_path / "data", two_classes(parts=("Train", "Test"))))
    with pytest.raises(TaskError, match="the folder Test/ must be written test/"):
        tasks.info(folder(tmp_path / "more", two_classes(parts=("train", "Test"))))
    assert len(tasks.load(folder(tmp_path / "right", two_classes(parts=("training", "evaluation")))).report) == 10


def test_one_class_is_none(tmp_path: Path) -> None:
    images = {f"train/all/{name}": content for name, content in two_classes(parts=("x",)).items()}
    with pytest.raises(TaskError, match="must have images of two classes or more, has 'all' alone"):
        tasks.info(folder(tmp_path / "data", images))


@pytest.mark.parametrize("test", [(), ("test",)])
def test_one_image_a_class_is_refused_at_once(test: tuple[str, ...], tmp_path: Path) -> None:
    data = folder(tmp_path / "data", two_classes(parts=("train", *test), each=1))
    for ask in (tasks.info, tasks.describe, tasks.load):
        with pytest.raises(TaskError, match="some class must have 2"):
            ask(data)


def test_names_in_latin_1_are_names(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "data")
    for part in (b"train", b"test"):
        for label, name in enumerate((b"caf\xe9", b"dog")):
            os.makedirs(os.path.join(root, part, name))
            for i in range(5):
                Path(os.fsdecode(os.path.join(root, part, name, b"\xe4%d.png" % i))).write_bytes(colour(50 * label + i))
    data = {"kind": "imagefolder", "path": str(tmp_path / "data")}
    assert tasks.load({**data, "digest": tasks.data_digest(data)}).info.class_names == ("café", "dog")
    assert r"\xe40.png is " in tasks.describe(data).warnings[0]
    copy = Path(os.fsdecode(os.path.join(root, b"test", b"dog", b"\xff.png")))
    copy.write_bytes(b"no image")
    with pytest.raises(TaskError, match=r"dog/\\xff\.png: must be a PNG or JPEG image") as refused:
        tasks.describe(data)
    str(refused.value).encode()
    copy.unlink()
    os.makedirs(os.path.join(root, b"train", "café".encode()))
    Path(os.fsdecode(os.path.join(root, b"train", "café".encode(), b"0.png"))).write_bytes(colour(9))
    with pytest.raises(TaskError, match="two folders must not have one name, 'café' is there in two encodings"):
        tasks.info(data)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            pa.array([0, 1] * 9 + [0, 2**31], pa.int64()),
            r"test image \d+ has label 2147483648|label 2147483648, the largest",
        ),
        (pa.array([0, 1] * 9 + [0, 2**64 - 1], pa.uint64()), r"a\.parquet: row 19 has label 18446744073709551615"),
        (pa.array([0, 1] * 9 + [0, 25], pa.uint8()), r"has label 25"),
    ],
)
def test_a_stray_label_is_one_line(labels: Any, message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [colour(i) for i in range(20)], "label": labels}), tmp_path / "a.parquet")
    with pytest.raises(TaskError, match=message):
        tasks.info({"kind": "parquet", "path": str(tmp_path)})


def test_unsigned_and_true_or_false_labels_are_labels(tmp_path: Path) -> None:
    for kind in (pa.uint64(), pa.int8(), pa.bool_()):
        labels = pa.array([0, 1] * 10, pa.int8()).cast(kind)
        pq.write_table(pa.table({"image": [colour(i) for i in range(20)], "label": labels}), tmp_path / "a.parquet")
        task = tasks.load({"kind": "parquet", "path": str(tmp_path / "a.parquet")})
        assert (task.train.images[:, 0, 0, 0] % 2 == task.train.labels).all()


def test_texts_that_are_no_utf_8_are_latin_1(tmp_path: Path) -> None:
    """Names of classes, and of files beside the bytes, as other programs write them."""
    wrong = pa.array([b"caf\xe9", b"dog"] * 10, pa.binary()).view(pa.string())
    images = pa.StructArray.from_arrays([pa.array([colour(i) for i in range(20)]), wrong], ["bytes", "path"])
    columns = {"image": images, "label": pa.array([0, 1] * 10), "label_name": wrong}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = {"kind": "parquet", "path": str(tmp_path / "a.parquet")}
    assert tasks.load(data).info.class_names == ("café", "dog")
    assert len(tasks.describe(data).splits) == 3


@pytest.mark.parametrize("twice", ["image", "label", "x"])
def test_a_column_twice_is_one_line(twice: str, tmp_path: Path) -> None:
    columns = [("image", [colour(i) for i in range(20)]), ("label", [0, 1] * 10), ("x", [1] * 20)]
    names, values = zip(*columns, *(one for one in columns if one[0] == twice), strict=True)
    pq.write_table(pa.Table.from_arrays([pa.array(one) for one in values], list(names)), tmp_path / "a.parquet")
    with pytest.raises(TaskError, match=rf"a\.parquet: must have each column once, has '{twice}' 2 times; rename one"):
        tasks.info({"kind": "parquet", "path": str(tmp_path)})


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_damaged_page_names_its_file(column: str, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table(file, 0, 20)
    place = pq.ParquetFile(file).metadata.row_group(0).column(["image", "label"].index(column))
    content = bytearray(file.read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    file.write_bytes(content)
    with pytest.raises(TaskError, match=r"a\.parquet: rows 0 to 19 must be readable: .*; write it again, or remove it"):
        tasks.describe({"kind": "parquet", "path": str(file)})


def test_a_folder_that_is_called_like_a_file_is_a_folder(tmp_path: Path) -> None:
    table(tmp_path / "data.parquet" / "part-0.parquet", 0, 20)
    assert len(tasks.load({"kind": "parquet", "path": str(tmp_path / "data.parquet")}).report) == 4


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("imagefolder", "must hold a folder train/"), ("parquet", "must be"), ("huggingface", "must hold")],
)
def test_nothing_where_data_should_be_is_one_line(kind: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=f"nowhere: {rule}"):
        tasks.info({"kind": kind, "path": str(tmp_path / "nowhere")})
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(TaskError, match=f"nowhere: {rule}"):
        tasks.info({"kind": kind, "path": str(tmp_path / "nowhere")})
