"""What can be wrong with vision-language data, each fault named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import vl_layouts
from tests.vl_layouts import LAYOUTS, SIZE, entailment, lines, nlvr1, rows, vqa
from workers import tasks
from workers.tasks import TaskError, tokenisers
from workers.tasks.examples import Examples

own_cache = vl_layouts.own_cache
pytestmark = pytest.mark.usefixtures("own_cache")


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_texts_that_are_too_long_name_their_example_unless_truncation_is_asked_for(tmp_path: Path) -> None:
    data = entailment(tmp_path)
    assert tasks.info(data).text == tasks.TextInfo(17, 7, 0)  # [CLS] a man 0 runs . [SEP]
    with pytest.raises(TaskError, match=r"snli_ve_train\.jsonl line 1: a text must have at most 6 tokens .*this has 7"):
        tasks.load({**data, "max_text_tokens": 6})
    task: Any = tasks.load({**data, "max_text_tokens": 6, "truncation": True})
    assert task.info.text.max_tokens == 6
    assert (task.train.texts[:, -1] == tokenisers.SEP).all()
    assert task.preprocessing()["text"]["truncation"] is True


def break_line(kind: str, root: Path, number: int, **values: Any) -> None:
    """Changes a line of the training file; a value of None removes the key."""
    file = {"entailment": root / "snli_ve_train.jsonl", "nlvr2": root / "data" / "train.json"}[kind]
    found = [json.loads(line) for line in file.read_text().splitlines()]
    found[number] = {key: value for key, value in {**found[number], **values}.items() if value is not None}
    lines(file, found)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            "entailment",
            {"sentence2": None},
            r"snli_ve_train\.jsonl line 3: must have a text with its picture, has none",
        ),
        ("entailment", {"sentence2": "  "}, r"line 3: must have a text with its picture, has an empty one"),
        ("entailment", {"gold_label": "maybe"}, r"line 3: label must be one of 0 entailment, .*, got 'maybe'"),
        ("entailment", {"Flickr30K_ID": None}, r"line 3: must have the key 'Flickr30K_ID'"),
        ("entailment", {"Flickr30K_ID": "9"}, r"line 3: its picture 9\.jpg must lie below .*; unpack"),
        ("nlvr2", {"identifier": "train-77-0-0"}, r"train\.json line 3: its picture train-77-0-img0\.png must lie"),
    ],
)
def test_a_broken_line_is_named(kind: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = LAYOUTS[kind](tmp_path)
    break_line(kind, tmp_path, 2, **values)
    with pytest.raises(TaskError, match=message):
        tasks.load(data)


def test_a_picture_that_cannot_be_decoded_names_file_and_example(tmp_path: Path) -> None:
    data = entailment(tmp_path)
    (tmp_path / "flickr30k_images" / "train1.jpg").write_bytes(b"no picture")
    with pytest.raises(
        TaskError, match=r"train1\.jpg \(picture of .*snli_ve_train\.jsonl line 5\): must be a PNG or JPEG"
    ):
        tasks.load(data)


def test_broken_vqa_files(tmp_path: Path) -> None:
    data = vqa(tmp_path)
    file = tmp_path / "v2_mscoco_train2014_annotations.json"
    whole = json.loads(file.read_text())["annotations"]
    nine = [{**one, "answers": one["answers"][:9]} if one["question_id"] == 4 else one for one in whole]
    file.write_text(json.dumps({"annotations": nine}))
    with pytest.raises(
        TaskError, match=r"train2014_questions\.json question 4: must have the answers of 10 annotators"
    ):
        tasks.load(data)
    file.write_text(json.dumps({"annotations": [one for one in whole if one["question_id"] != 7]}))
    with pytest.raises(TaskError, match="question 7: must have its answers in v2_mscoco_train2014_annotations"):
        tasks.load(data)
    file.write_text("{}")
    with pytest.raises(TaskError, match=r"annotations\.json: must be a JSON object with a list 'annotations'"):
        tasks.load(data)
    file.unlink()
    with pytest.raises(TaskError, match=r"must hold \*train2014_annotations\.json in some folder"):
        tasks.load(data)


def test_an_unknown_answer_vocabulary_is_refused(tmp_path: Path) -> None:
    data, names = vqa(tmp_path / "data"), tmp_path / "answers.txt"
    names.write_text("dog\ncat\n")
    unknown = {**data, "answers": str(names)}
    with pytest.raises(TaskError, match=r"question 0: 'no', 'maybe so' and all other answers of the train part"):
        tasks.load(unknown)
    names.write_text("yes\nyes\n")
    with pytest.raises(TaskError, match="must name each answer once, 'yes' is there twice"):
        tasks.load(unknown)
    names.unlink()
    with pytest.raises(TaskError, match=r"data\.answers .*answers\.txt: must be a JSON list of answers"):
        tasks.load(unknown)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nlvr1", {"sentence": None}, r"must have a column sentence or question or .*, has image, label, split"),
        ("nlvr1", {"image": None}, r"must have image for nlvr1, has sentence"),
        ("nlvr2", {"right_image": None}, "must have left_image and right_image or image_0 and image_1 for nlvr2"),
        ("vqa", {"answers": None}, "must have a column answers or answer"),
        ("nlvr1", {"sentence": (3, None)}, r"a\.parquet row 3: must have a text with its picture, has none"),
        ("nlvr1", {"label": (3, None)}, r"a\.parquet row 3: must have a label, has none; fill or remove it"),
        ("entailment", {"label": (3, 7)}, r"a\.parquet row 3: label must be one of 0 entailment"),
        ("vqa", {"answers": (3, [{"answer": "x", "answer_id": 0}] * 4)}, r"row 3: must have the answers of 10"),
        ("nlvr1", {"image": (3, b"no picture")}, r"a\.parquet row 3: must be a PNG or JPEG image"),
        ("nlvr1", {"image": (3, None)}, r"a\.parquet row 3: an image column must hold the bytes"),
        ("nlvr1", {"split": (0, "extra")}, None),
    ],
)
def test_a_broken_table_is_named(kind: str, change: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    found = rows(kind)
    for name, value in change.items():
        if value is None:
            del found[name]
        else:
            found[name][value[0]] = value[1]
    pq.write_table(pa.table(found), tmp_path / "a.parquet")
    data = {"kind": kind, "path": str(tmp_path / "a.parquet"), "image_size": SIZE}
    if message is None:
        assert len(tasks.load(data).train) > 0
        return
    with pytest.raises(TaskError, match=message):
        tasks.load(data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_text_tokens": 2}, r"data\.max_text_tokens must be at least 3"),
        ({"candidates": 1, "answers": 0}, r"data\.answers must be at least 1.*data\.candidates must be at least 2"),
        ({"search_fraction": 1.0}, r"data\.search_fraction must lie between 0 and 1"),
        ({"mean": [0.5]}, r"data\.mean must have one value for each of 3 channels"),
        ({"kind": "captions"}, r"data\.kind must be one of .*digit_vqa.*retrieval"),
        ({"kind": "vqa"}, r"data\.path must say where the vqa data lies"),
        ({"kind": "vqa", "path": "nowhere"}, "nowhere: must be a folder with the published files, or a Parquet file"),
    ],
)
def test_broken_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tasks.load({"kind": "digit_vqa", **settings})


def test_sizes_must_be_square_or_given(tmp_path: Path) -> None:
    data = {**nlvr1(tmp_path), "image_size": None}
    with pytest.raises(TaskError, match=r"pictures must be square, this is 4x8; set data\.image_size"):
        tasks.info(data)
    task: Any = tasks.load({"kind": "digit_vqa", "image_size": 16, "train_limit": 5})
    assert isinstance(task.train, Examples)
    assert task.train.images.shape[1:] == (16, 16, 3)
