"""Images with texts as people have them: parts, pictures, tables, told or refused like images alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import vl_layouts
from tests.vl_layouts import SIZE, entailment, nlvr1, png, rows, vqa
from workers import tasks
from workers.tasks import TaskError

own_cache = vl_layouts.own_cache
pytestmark = pytest.mark.usefixtures("own_cache")


def table(file: Path, first: int, count: int = 20, **more: Any) -> None:
    """Statements about pictures whose red is their number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {**rows("nlvr1", count), "image": [png(first + i, (SIZE, SIZE)) for i in range(count)], **more}
    if "split" not in more:
        del found["split"]
    pq.write_table(pa.table(found), file)


def reds(split: Any) -> set[int]:
    return set(split.images[:, 0, 0, 0].tolist())


def asked(path: Path) -> dict[str, Any]:
    return {"kind": "nlvr1", "path": str(path), "image_size": SIZE}


@pytest.mark.parametrize(
    ("train", "test"),
    [("data/default/train/0", "data/default/test/0"), ("split=train/0", "split=test/0"), ("my-train", "my-test")],
)
def test_no_test_picture_is_trained_on(train: str, test: str, tmp_path: Path) -> None:
    table(tmp_path / "data" / f"{train}.parquet", 0)
    table(tmp_path / "data" / f"{test}.parquet", 100, 8)
    task: Any = tasks.load(asked(tmp_path / "data"))
    assert reds(task.report) == set(range(100, 108))
    assert reds(task.train) | reds(task.search) == set(range(20))
    splits = tasks.describe(asked(tmp_path / "data")).splits
    assert [split.examples for split in splits] == [16, 4, 8]


def test_parts_that_are_not_used_and_parts_that_mean_nothing(tmp_path: Path) -> None:
    split = ["train"] * 10 + ["test"] * 4 + ["val"] * 4 + ["extra"] * 2
    table(tmp_path / "a.parquet", 0, split=split)
    notes = tasks.describe(asked(tmp_path / "a.parquet")).notes
    assert notes == (
        "parts are told by column 'split'",
        "the part 'extra' is not used: 2 examples",
        "the part 'val' is not used: 4 examples",
    )
    table(tmp_path / "a.parquet", 0, split=[*split[:-1], "Test"])
    with pytest.raises(TaskError, match=r"row 19: the part 'Test' must be written 'test'"):
        tasks.info(asked(tmp_path / "a.parquet"))
    table(tmp_path / "b" / "trainA.parquet", 0)
    table(tmp_path / "b" / "testA.parquet", 100)
    with pytest.raises(TaskError, match="do neither; write train, validation and test"):
        tasks.info(asked(tmp_path / "b"))


def test_a_damaged_page_and_a_column_twice_name_their_file(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table(file, 0)
    found = pq.read_table(file)
    pq.write_table(
        pa.Table.from_arrays([*found.columns, found["label"]], [*found.column_names, "label"]), tmp_path / "b.parquet"
    )
    with pytest.raises(TaskError, match=r"b\.parquet: must have each column once, has 'label' 2 times"):
        tasks.info(asked(tmp_path / "b.parquet"))
    place = pq.ParquetFile(file).metadata.row_group(0).column(1)
    content = bytearray(file.read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    file.write_bytes(content)
    with pytest.raises(TaskError, match=r"a\.parquet: rows 0 to 19 must be readable"):
        tasks.info(asked(file))


def test_texts_that_are_no_utf_8_name_their_rows(tmp_path: Path) -> None:
    wrong = pa.array([b"caf\xe9"] * 20, pa.binary()).view(pa.string())
    table(tmp_path / "a.parquet", 0, sentence=wrong)
    with pytest.raises(TaskError, match=r"a\.parquet rows 0 to 19: texts must be UTF-8: .*; write them again"):
        tasks.info(asked(tmp_path / "a.parquet"))


def test_a_line_in_another_encoding_is_named(tmp_path: Path) -> None:
    data = entailment(tmp_path / "data")
    file = tmp_path / "data" / "snli_ve_train.jsonl"
    file.write_bytes(file.read_bytes().replace(b"A man 1 ", "Un café ".encode("latin-1")))
    with pytest.raises(TaskError, match=r"snli_ve_train\.jsonl line 2: must be a JSON object: .* can't decode"):
        tasks.info(data)


def test_pictures_are_upright_and_copies_are_told(tmp_path: Path) -> None:
    data = entailment(tmp_path / "data")
    pictures = tmp_path / "data" / "flickr30k_images"
    before = tasks.data_digest(data)
    shutil.copy(pictures / "test0.jpg", pictures / "train1.jpg")
    shutil.copy(pictures / "test0.jpg", pictures / "train2.jpg")
    found = tasks.describe(data)
    assert any("in the train split too, byte for byte" in warning for warning in found.warnings)
    exif = Image.Exif()
    exif[0x0112] = 6
    white = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    white[:, : SIZE // 2] = 255
    for number in range(4):
        Image.fromarray(white).save(pictures / f"train{number}.jpg", exif=exif)
    task: Any = tasks.load(data)
    assert (task.train.images[0, 0] > 150).all()
    assert (task.train.images[0, -1] < 100).all()
    assert "images are turned upright by their EXIF orientation" in " ".join(tasks.describe(data).notes)
    assert tasks.data_digest(data) != before


def test_hidden_folders_hold_no_pictures(tmp_path: Path) -> None:
    data = vqa(tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "train2014", tmp_path / "data" / "__MACOSX" / "train2014")
    (tmp_path / "data" / "._v2_OpenEnded_mscoco_train2014_questions.json").write_bytes(b"\0")
    assert tasks.info(data).num_classes > 1


def test_what_would_be_found_while_it_runs_is_found_by_the_plan(tmp_path: Path) -> None:
    data = nlvr1(tmp_path / "data")
    file = tmp_path / "data" / "train" / "images" / "0" / "train-2-0-0.png"
    file.write_bytes(b"no picture")
    with pytest.raises(TaskError, match=r"train-2-0-0\.png .*: must be a PNG or JPEG image"):
        tasks.describe(data)
    with pytest.raises(TaskError, match=r"data\.mean must have one value for each of 3 channels"):
        tasks.describe({**nlvr1(tmp_path / "data"), "mean": [0.5]})
    one = tmp_path / "one.parquet"
    table(one, 0, 6, image=[png(1)] * 6, split=["train"] * 3 + ["test"] * 3)
    with pytest.raises(TaskError, match="the training examples all share one picture"):
        tasks.describe(asked(one))
