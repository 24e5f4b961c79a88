"""What can be wrong with vision-language data, each fault named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import vl_layouts
from tests.vl_layouts import LAYOUTS, SIZE, entailment, jpg, lines, nlvr1, retrieval, rows, vqa
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


def change(file: Path, key: str, number: int, value: Any) -> None:
    """Puts ``value`` into a list of a JSON file; a mapping changes the entry's keys, None removing one."""
    found = json.loads(file.read_text())
    if isinstance(value, dict):
        merged = {**found[key][number], **value}
        value = {name: one for name, one in merged.items() if one is not None}
    found[key][number] = value
    file.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("questions", "Is it?", r"questions\.json questions\[2\]: must be a JSON object, is str"),
        (
            "questions",
            {"question_id": None},
            r"questions\[2\]: must have the key 'question_id', has image_id, question",
        ),
        ("questions", {"question_id": [2]}, r"questions\[2\]: question_id must be a whole number, got \[2\]"),
        (
            "questions",
            {"question_id": 1},
            r"questions\[2\]: question_id must occur once, 1 is that of .*questions\[1\] too",
        ),
        (
            "annotations",
            {"question_id": 1},
            r"annotations\[18\]: question_id must occur once, 1 is that of .*annotations\[2\] too",
        ),
        ("questions", {"image_id": "abc"}, r"questions\.json question 2: image_id must be a whole number, got 'abc'"),
        ("questions", {"image_id": 1.5}, "question 2: image_id must be a whole number, got 1.5"),
        ("annotations", 7, r"annotations\.json annotations\[2\]: must be a JSON object, is int"),
        ("annotations", {"answers": "yes"}, r"questions\.json question \d+: must have a list of answers, has str"),
        (
            "annotations",
            {"answers": [{"answer": "yes"}] + [{}] * 9},
            r"question \d+: must have the answers of 10 .* has 1",
        ),
    ],
)
def test_a_broken_entry_of_vqa_is_named(what: str, value: Any, message: str, tmp_path: Path) -> None:
    data = vqa(tmp_path)
    stem = "v2_OpenEnded_mscoco" if what == "questions" else "v2_mscoco"
    change(tmp_path / f"{stem}_train2014_{what}.json", what, 2, value)
    with pytest.raises(TaskError, match=message):
        tasks.load(data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", r"dataset_flickr30k\.json images\[2\]: must be a JSON object, is str"),
        ({"filename": None}, r"images\[2\]: must have the key 'filename'"),
        ({"split": "Train"}, r"image 2\.jpg: split must be one of train, restval, val, test, got 'Train'"),
        ({"split": None}, r"image 2\.jpg: split must be one of train, restval, val, test, got None"),
        ({"sentences": ["text"]}, r"image 2\.jpg sentence 0: must be a JSON object, is str"),
        (
            {"sentences": [{"raw": "A dog."}, {}]},
            r"image 2\.jpg sentence 1: must have a text with its picture, has none",
        ),
        ({"sentences": "text"}, r"image 2\.jpg: must have a list of sentences with its picture, has none"),
    ],
)
def test_a_broken_image_of_retrieval_is_named(value: Any, message: str, tmp_path: Path) -> None:
    data = retrieval(tmp_path)
    change(tmp_path / "dataset_flickr30k.json", "images", 2, value)
    with pytest.raises(TaskError, match=message):
        tasks.load(data)


def test_lists_that_are_none(tmp_path: Path) -> None:
    data = retrieval(tmp_path)
    (tmp_path / "dataset_flickr30k.json").write_text('{"images": {"0": {}}}')
    with pytest.raises(TaskError, match=r"must be a JSON object with a list 'images': it is dict"):
        tasks.load(data)


def test_two_pictures_of_one_name_are_a_fault_where_it_is_shown(tmp_path: Path) -> None:
    data = entailment(tmp_path)
    jpg(tmp_path / "old" / "unused.jpg")
    jpg(tmp_path / "older" / "unused.jpg", 9)
    tasks.load(data)
    jpg(tmp_path / "another" / "train1.jpg", 200)
    places = r"another/train1\.jpg, flickr30k_images/train1\.jpg"
    with pytest.raises(
        TaskError, match=rf"train\.jsonl line 5: its picture train1\.jpg must lie once .* as {places}; keep"
    ):
        tasks.load(data)


def test_an_unknown_answer_vocabulary_is_refused(tmp_path: Path) -> None:
    data, names = vqa(tmp_path / "data"), tmp_path / "answers.txt"
    names.write_text("dog\ncat\n")
    unknown = {**data, "answers": str(names)}
    message = (
        r"question 0: no answer of it \('no', 'maybe so'\) is in the answer vocabulary of .*answers\.txt \(2: dog, cat"
    )
    with pytest.raises(TaskError, match=message):
        tasks.load(unknown)
    names.write_text("Yes\nNo.\nyes\n")
    with pytest.raises(TaskError, match="must name each answer once, line 1 'Yes' and line 3 'yes' are the same"):
        tasks.load(unknown)
    names.unlink()
    with pytest.raises(
        TaskError, match=r"data\.answers .*answers\.txt: must be a readable file of answers: No such file"
    ):
        tasks.load(unknown)


def test_a_vocabulary_that_shares_an_answer_with_the_data_is_still_foreign(tmp_path: Path) -> None:
    """Fifty other answers and "maybe so", which some questions have: 7 of 20 in the training part."""
    data, names = vqa(tmp_path / "data"), tmp_path / "answers.txt"
    names.write_text("\n".join([*(f"animal {number}" for number in range(50)), "maybe so"]))
    with pytest.raises(TaskError, match=r"has answers to 35\.0 % of the train part's 20 questions; at least 50 % must"):
        tasks.load({**data, "answers": str(names)})
    names.write_text("no\nmaybe so\nanimal\n")
    assert len(tasks.load({**data, "answers": str(names)}).train) > 0
    annotations = tmp_path / "data" / "v2_mscoco_val2014_annotations.json"
    annotations.write_text(annotations.read_text().replace('"no"', '"dog"').replace('"yes"', '"cat"'))
    with pytest.raises(
        TaskError, match=r"val2014_questions\.json question 1: no answer .* 33\.3 % of the test part's 3"
    ):
        tasks.load({**data, "answers": str(names)})


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
        ("nlvr1", {"split": (3, "Train")}, r"a\.parquet row 3: the part 'Train' must be written 'train'"),
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
