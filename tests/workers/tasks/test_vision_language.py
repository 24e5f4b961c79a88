"""Vision-language data: published layouts, tables, and what a node keeps of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests import vl_layouts
from tests.places import DATA
from tests.vl_layouts import COUNTS, LAYOUTS, SIZE, entailment, jpg, nlvr1, nlvr2, retrieval, rows, save_to_disk, vqa
from workers import tasks
from workers.tasks import TaskError, answers, corpus, vision_language

NLVR1 = DATA / "nlvr1.parquet"

own_cache = vl_layouts.own_cache
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_published_files_become_examples(kind: str, tmp_path: Path) -> None:
    data = LAYOUTS[kind](tmp_path)
    task: Any = tasks.load(data)
    assert (len(task.train) + len(task.search), len(task.report)) == COUNTS[kind]
    assert task.info == tasks.info(data)
    assert task.info.task == kind
    shown = 2 if kind == "nlvr2" else 1
    for split in (task.train, task.search, task.report):
        assert split.images.dtype == np.uint8
        assert split.images.shape[1:] == (SIZE, SIZE, 3)
        assert split.pictures.shape == (len(split), shown)
        assert np.unique(split.pictures).tolist() == list(range(len(split.images)))
        assert split.texts.shape[1] == task.info.text.max_tokens
        indices, inputs, targets = next(iter(split.batches(2)))
        assert indices.tolist() == [0, 1]
        assert inputs["pixel_values"].shape == (2, *([2] if shown == 2 else []), 3, SIZE, SIZE)
        assert targets.shape == ((2, task.info.num_classes) if kind == "vqa" else (2,))
    json.dumps(task.preprocessing())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_no_picture_is_in_training_and_search(kind: str, tmp_path: Path) -> None:
    data = LAYOUTS[kind](tmp_path)
    found = vision_language.open_corpus(data).parts["train"]
    for seed in range(4):
        kept, off = corpus.cut_groups(found.groups, 0.2, seed)
        assert len(kept)
        assert len(off)
        assert not set(found.pictures[kept].reshape(-1)) & set(found.pictures[off].reshape(-1))
    one, other = (tasks.load({**data, "split_seed": seed}) for seed in (0, 0))
    assert np.array_equal(one.search.texts, other.search.texts)  # type: ignore[attr-defined]


def test_nlvr1_keeps_directories_together(tmp_path: Path) -> None:
    groups = vision_language.open_corpus(nlvr1(tmp_path)).parts["train"].groups
    assert Counter(groups.tolist()) == {0: 4, 1: 4, 2: 4}


def test_vqa_has_the_answers_of_its_annotators(tmp_path: Path) -> None:
    task: Any = tasks.load({**vqa(tmp_path), "search_fraction": 0.1})
    assert task.info.class_names == ("yes", "no")  # most questions' consensus; "maybe so" is nobody's
    assert task.preprocessing()["answers"] == ["yes", "no"]
    dense = np.asarray(task.train.answers)
    assert {tuple((10 * row).round().astype(int).tolist()) for row in dense} == {(10, 6), (0, 10)}
    assert task.train.labels.tolist() == dense.argmax(axis=1).tolist()
    small: Any = tasks.load({**vqa(tmp_path), "answers": 1})
    assert small.info.class_names == ("yes",)
    assert set(small.train.labels.tolist()) == {0}  # questions without a known answer teach nothing
    assert -1 in small.report.labels  # but they count in the report
    names = tmp_path / "answers.json"
    names.write_text(json.dumps(["no", "blue", "yes"]))
    own: Any = tasks.load({**vqa(tmp_path), "answers": str(names)})
    assert own.info.class_names == ("no", "blue", "yes")


def test_class_order_and_left_before_right(tmp_path: Path) -> None:
    task: Any = tasks.load(entailment(tmp_path / "a"))
    assert task.info.class_names == ("entailment", "neutral", "contradiction")
    assert sorted([*task.train.labels, *task.search.labels]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    pair: Any = tasks.load(nlvr2(tmp_path / "b"))
    assert pair.info.class_names == ("false", "true")
    _, inputs, labels = next(iter(pair.report.batches(3)))
    assert labels.tolist() == [1, 0, 1]
    left, right = inputs["pixel_values"][0]
    assert float(left[0].mean()) < float(right[0].mean())  # img0 has the smaller red value


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_parquet_and_saved_datasets_hold_the_same(kind: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(rows(kind)), tmp_path / "a.parquet", row_group_size=6)
    save_to_disk(tmp_path / "saved", rows(kind))
    one, other = (
        tasks.load({"kind": kind, "path": str(tmp_path / n), "image_size": SIZE}) for n in ("a.parquet", "saved")
    )
    for name in ("train", "search", "report"):
        a, b = getattr(one, name), getattr(other, name)
        assert np.array_equal(a.images, b.images)
        assert np.array_equal(a.texts[a.text_rows], b.texts[b.text_rows])
        assert np.array_equal(a.labels, b.labels)
    task: Any = one
    assert len(task.report) == (12 if kind == "retrieval" else 6)
    if kind in ("vqa", "entailment", "nlvr1"):
        assert len(task.report.images) == 3  # equal bytes are one picture
        red = task.report.images[task.report.pictures[:, 0], 0, 0, 0].tolist()
        assert red == [12 * 7, 12 * 7, 12 * 8, 12 * 8, 12 * 9, 12 * 9]


def test_a_test_part_without_labels_is_passed_over(tmp_path: Path) -> None:
    found = rows("entailment")
    found["split"][-3:] = ["test"] * 3
    found["label"][-3:] = [-1] * 3
    pq.write_table(pa.table(found), tmp_path / "a.parquet")
    task = tasks.load({"kind": "entailment", "path": str(tmp_path / "a.parquet"), "image_size": SIZE})
    assert len(task.report) == 3


def test_names_of_a_class_label_count(tmp_path: Path) -> None:
    names = ["contradiction", "entailment", "neutral"]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table(rows("entailment"))
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    task: Any = tasks.load({"kind": "entailment", "path": str(tmp_path / "a.parquet"), "image_size": SIZE})
    # rows 14 to 19: numbers 2 0 1 2 0 1, i.e. neutral, contradiction, entailment
    assert task.report.labels.tolist() == [1, 2, 0, 1, 2, 0]


def test_a_table_without_parts_is_cut_by_picture(tmp_path: Path) -> None:
    found = rows("nlvr1", 40)
    del found["split"]
    pq.write_table(pa.table(found), tmp_path / "a.parquet")
    task: Any = tasks.load({"kind": "nlvr1", "path": str(tmp_path / "a.parquet"), "image_size": SIZE})
    assert (len(task.train), len(task.search), len(task.report)) == (26, 6, 8)
    colours = [set(split.images[:, 0, 0, 0].tolist()) for split in (task.train, task.search, task.report)]
    assert len(set.union(*colours)) == sum(map(len, colours))


@pytest.mark.skipif(not NLVR1.is_file(), reason=f"the real NLVR data is not at {NLVR1}")
def test_real_nlvr1(tmp_path: Path) -> None:
    limits = {"train_limit": 60, "search_limit": 30, "report_limit": 30}
    data = {"kind": "nlvr1", "path": str(NLVR1), "image_size": 32, **limits}
    data["digest"] = tasks.data_digest(data)
    task: Any = tasks.load(data)
    assert task.info.class_names == ("false", "true")
    assert (len(task.train), len(task.search), len(task.report)) == (60, 30, 30)
    assert task.info.text.max_tokens == 27
    found = vision_language.open_corpus(data)
    assert {name: len(part) for name, part in found.parts.items()} == {"train": 12408, "test": 990}
    assert len(set(found.parts["train"].groups.tolist())) == 80
    again: Any = tasks.load(data)
    assert isinstance(again.train.images, np.memmap)
    assert np.array_equal(again.train.texts, task.train.texts)


# --- the node's memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vqa", "retrieval"])
def test_a_known_study_is_recalled_without_its_files(kind: str, tmp_path: Path) -> None:
    data = LAYOUTS[kind](tmp_path / "data")
    data["digest"] = tasks.data_digest(data)
    first: Any = tasks.load(data)
    again: Any = tasks.load({**data, "path": str(tmp_path / "nowhere"), "mean": [0.5] * 3, "std": [0.5] * 3})
    assert again.info == first.info == tasks.info({**data, "path": "gone"})
    assert again.train.mean == again.report.std == (0.5, 0.5, 0.5)
    assert again.text == first.text
    for name in ("train", "search", "report"):
        for a, b in zip(getattr(first, name).batches(3), getattr(again, name).batches(3), strict=True):
            assert torch.equal(a[2], b[2])
            assert torch.equal(a[1]["input_ids"], b[1]["input_ids"])
    other: Any = tasks.load({**data, "max_text_tokens": 20})
    assert other.info.text.max_tokens == 20


def test_changed_files_are_refused_and_limits_leave_the_model_alone(tmp_path: Path) -> None:
    data = vqa(tmp_path)
    digest = tasks.data_digest(data)
    small: Any = tasks.load({**data, "train_limit": 1, "search_limit": 1, "report_limit": 1, "digest": digest})
    assert small.info == tasks.info(data)
    assert (len(small.train), len(small.search), len(small.report)) == (1, 1, 1)
    jpg(tmp_path / "train2014" / f"COCO_train2014_{0:012d}.jpg", 77)
    with pytest.raises(TaskError, match=f"content must be the study's .digest {digest}"):
        tasks.load({**data, "digest": digest})


def said(split: Any, task: Any) -> set[str]:
    """The texts of a split, of the word tokeniser."""
    words = task.text["tokenizer"]["vocabulary"]
    return {" ".join(words[i] for i in row if i > 2) for row in split.texts.tolist()}


def test_karpathys_validation_part_is_the_search_split(tmp_path: Path) -> None:
    """Scoring all pairs of a fifth of Flickr30k's 29,000 training pictures would be 168 million of them, of these 5."""
    data = retrieval(tmp_path, val=3)
    task: Any = tasks.load({**data, "search_fraction": 0.5})
    assert [len(split.images) for split in (task.train, task.search, task.report)] == [10, 3, 3]
    # numbers of pictures that are no training text's word are unknown to the tokeniser: 10, 11, 12
    assert all("[UNK]" in text for text in said(task.search, task))
    assert not any("[UNK]" in text for text in said(task.train, task))
    assert np.bincount(task.search.picture_of_text).tolist() == [5, 5, 5]
    few: Any = tasks.load({**data, "search_limit": 2})
    assert (len(few.search.images), len(few.search.texts)) == (2, 10)
    assert len(few.train.images) == 10
    without: Any = tasks.load({**retrieval(tmp_path / "without", val=0), "search_fraction": 0.3})
    assert [len(split.images) for split in (without.train, without.search, without.report)] == [7, 3, 3]


def test_a_tables_validation_part_is_the_search_split_of_retrieval_alone(tmp_path: Path) -> None:
    for kind, wanted in (("retrieval", [14, 4, 2]), ("nlvr1", [12, 2, 2])):
        found = rows(kind)
        found["split"] = ["train"] * 14 + ["val"] * 4 + ["test"] * 2
        pq.write_table(pa.table(found), tmp_path / f"{kind}.parquet")
        task: Any = tasks.load({"kind": kind, "path": str(tmp_path / f"{kind}.parquet"), "image_size": SIZE})
        sizes = [
            len(split.images if kind == "retrieval" else split) for split in (task.train, task.search, task.report)
        ]
        assert sizes == wanted


def test_a_file_of_answers_is_known_by_its_content(tmp_path: Path) -> None:
    data, file = vqa(tmp_path / "data"), tmp_path / "answers.txt"
    file.write_text("No.\nYes\n")
    data["digest"] = tasks.data_digest(data)
    one: Any = tasks.load({**data, "answers": str(file)})
    assert one.info.class_names == ("no", "yes")
    known = {"path": str(tmp_path / "moved.txt"), "digest": answers.vocabulary_digest(file)}
    again: Any = tasks.load({**data, "path": "gone", "answers": known})  # the node remembers it
    assert np.array_equal(np.asarray(again.report.answers), np.asarray(one.report.answers))
    file.write_text("yes\nno\n")
    other: Any = tasks.load({**data, "answers": str(file)})
    assert other.info.class_names == ("yes", "no")
    with pytest.raises(TaskError, match=r"answers\.txt: content must be the study's"):
        tasks.load({**data, "train_limit": 3, "answers": {**known, "path": str(file)}})


def test_limits_of_retrieval_count_pictures(tmp_path: Path) -> None:
    data = retrieval(tmp_path)
    small: Any = tasks.load({**data, "report_limit": 2, "train_limit": 3})
    assert len(small.report.images) == 2
    assert len(small.report.texts) == len(small.report) == 10
    assert np.bincount(small.report.picture_of_text).tolist() == [5, 5]
    assert len(small.train) == 15
