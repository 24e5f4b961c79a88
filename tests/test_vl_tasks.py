"""Vision-language data: published layouts, tables, tokenisers, batches, and what can be wrong with them."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from workers import tasks
from workers.tasks import TaskError, corpus, published_layouts, tokenisers, vision_language
from workers.tasks.example_splits import draw_candidates
from workers.tasks.examples import Examples

NLVR1 = Path(__file__).parent.parent.parent / "shared" / "data" / "nlvr1.parquet"
SIZE = 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITPARETO_CACHE", str(tmp_path / "cache"))


def png(value: int, size: tuple[int, int] = (8, 4)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value % 256, 0, 255 - value % 256)).save(out, "PNG")
    return out.getvalue()


def jpg(file: Path, value: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 4), (value % 256, 0, 0)).save(file)


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


# --- the published layouts --------------------------------------------------------------------------------------------


def vqa(root: Path) -> dict[str, Any]:
    """Ten training pictures with two questions each, three validation questions."""
    for year, count in (("train2014", 10), ("val2014", 3)):
        questions, annotations = [], []
        for number in range(2 * count if year == "train2014" else count):
            image = number % count
            jpg(root / year / f"COCO_{year}_{image:012d}.jpg", 20 * image)
            questions.append({"image_id": image, "question": f"Is it {number}?", "question_id": number})
            truth, other = ("yes", "no") if number % 3 else ("no", "maybe so")
            given = [{"answer": truth, "answer_id": i} for i in range(8)] + [{"answer": other, "answer_id": 9}] * 2
            annotations.append({"image_id": image, "question_id": number, "answers": given})
        (root / f"v2_OpenEnded_mscoco_{year}_questions.json").write_text(json.dumps({"questions": questions}))
        (root / f"v2_mscoco_{year}_annotations.json").write_text(json.dumps({"annotations": annotations[::-1]}))
    return {"kind": "vqa", "path": str(root), "image_size": SIZE}


def entailment(root: Path) -> dict[str, Any]:
    for part, count in (("train", 12), ("test", 4)):
        rows = []
        for number in range(count):
            picture = f"{part}{number // 3}"
            jpg(root / "flickr30k_images" / f"{picture}.jpg", number)
            label = ("entailment", "neutral", "contradiction", "-")[number % 4]
            rows.append({"Flickr30K_ID": picture, "gold_label": label, "sentence2": f"A man {number} runs."})
        lines(root / f"snli_ve_{part}.jsonl", rows)
    return {"kind": "entailment", "path": str(root), "image_size": SIZE}


def nlvr2(root: Path) -> dict[str, Any]:
    for part, count in (("train", 8), ("dev", 3)):
        rows = []
        for number in range(count):
            stem = f"{part}-{number // 2}-0"
            for image in (0, 1):
                jpg(root / "images" / part / f"{stem}-img{image}.png", 100 * image + number)
            rows.append({"identifier": f"{stem}-{number % 2}", "sentence": "Two dogs.", "label": str(number % 2 == 0)})
        lines(root / "data" / f"{part}.json", rows)
    return {"kind": "nlvr2", "path": str(root), "image_size": SIZE}


def nlvr1(root: Path) -> dict[str, Any]:
    for part, count in (("train", 12), ("dev", 3)):
        rows = []
        for number in range(count):
            folder = str(number // 4)
            jpg(root / part / "images" / folder / f"{part}-{number}-0-0.png", number)
            row = {"identifier": f"{number}-0", "sentence": "There is a box.", "directory": folder}
            rows.append({**row, "label": "true" if number % 2 else "false"})
        lines(root / part / f"{part}.json", rows)
    return {"kind": "nlvr1", "path": str(root), "image_size": SIZE}


def retrieval(root: Path) -> dict[str, Any]:
    images = []
    for number, split in enumerate(["train"] * 10 + ["val"] + ["test"] * 3):
        jpg(root / "flickr30k-images" / f"{number}.jpg", 15 * number)
        said = [{"raw": f"Picture {number} said way {way}."} for way in range(5)]
        images.append({"filename": f"{number}.jpg", "split": split, "sentences": said})
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return {"kind": "retrieval", "path": str(root), "image_size": SIZE}


LAYOUTS = {"vqa": vqa, "entailment": entailment, "nlvr2": nlvr2, "nlvr1": nlvr1, "retrieval": retrieval}
COUNTS = {"vqa": (20, 3), "entailment": (9, 3), "nlvr2": (8, 3), "nlvr1": (12, 3), "retrieval": (50, 15)}


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
    found = published_layouts.read_published(kind, tmp_path).parts["train"]
    for seed in range(4):
        kept, off = corpus.cut_groups(found.groups, 0.2, seed)
        assert len(kept)
        assert len(off)
        assert not set(found.pictures[kept].reshape(-1)) & set(found.pictures[off].reshape(-1))
    one, other = (tasks.load({**data, "split_seed": seed}) for seed in (0, 0))
    assert np.array_equal(one.search.texts, other.search.texts)  # type: ignore[attr-defined]


def test_nlvr1_keeps_directories_together(tmp_path: Path) -> None:
    nlvr1(tmp_path)
    assert Counter(published_layouts.read_published("nlvr1", tmp_path).parts["train"].groups.tolist()) == {
        0: 4,
        1: 4,
        2: 4,
    }


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


def rows(kind: str, count: int = 20) -> dict[str, list[Any]]:
    pictures = [{"bytes": png(12 * (i // 2)), "path": None} for i in range(count)]
    split = {"split": ["train"] * (count - 6) + ["validation"] * 6}
    said = [f"statement {i}" for i in range(count)]
    if kind == "vqa":
        answers = [[{"answer": "yes" if i % 2 else "no", "answer_id": n} for n in range(10)] for i in range(count)]
        return {"image": pictures, "question": said, "answers": answers, **split}
    if kind == "entailment":
        return {"image": pictures, "hypothesis": said, "label": [i % 3 for i in range(count)], **split}
    if kind == "retrieval":
        single = [{"bytes": png(12 * i), "path": None} for i in range(count)]
        return {"image": single, "caption": [[one, f"{one} again"] for one in said], **split}
    found = {"sentence": said, "label": [i % 2 == 0 for i in range(count)], **split}
    if kind == "nlvr2":
        return {
            "left_image": pictures,
            "right_image": [{"bytes": png(7 * i), "path": None} for i in range(count)],
            **found,
        }
    return {"image": [one["bytes"] for one in pictures], **found}


def save_to_disk(folder: Path, columns: dict[str, list[Any]]) -> None:
    """As Hugging Face datasets write a DatasetDict: one folder a part, Arrow's streaming format."""
    split = columns.pop("split")
    for part in ("train", "validation"):
        table = pa.table(
            {name: [v for v, s in zip(found, split, strict=True) if s == part] for name, found in columns.items()}
        )
        (folder / part).mkdir(parents=True)
        file = str(folder / part / "data-00000-of-00001.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
        (folder / part / "state.json").write_text("{}")


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


def test_limits_of_retrieval_count_pictures(tmp_path: Path) -> None:
    data = retrieval(tmp_path)
    small: Any = tasks.load({**data, "report_limit": 2, "train_limit": 3})
    assert len(small.report.images) == 2
    assert len(small.report.texts) == len(small.report) == 10
    assert np.bincount(small.report.picture_of_text).tolist() == [5, 5]
    assert len(small.train) == 15


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_cover_the_split_in_a_seeded_order() -> None:
    split: Any = tasks.load({"kind": "digit_nlvr", "train_limit": 50}).train
    plain = torch.cat([i for i, _, _ in split.batches(16)])
    assert plain.tolist() == list(range(50))
    first, again = (torch.cat([i for i, _, _ in split.batches(16, shuffle_seed=3)]) for _ in range(2))
    assert first.tolist() == again.tolist() != plain.tolist()
    indices, inputs, labels = next(iter(split.batches(16, shuffle_seed=3)))
    raw = inputs["pixel_values"] * torch.tensor(split.std).view(3, 1, 1) + torch.tensor(split.mean).view(3, 1, 1)
    wanted = split.images[split.pictures[indices.numpy()]].transpose(0, 1, 4, 2, 3) / 255
    np.testing.assert_allclose(raw.numpy(), wanted, atol=1e-5)
    assert labels.tolist() == split.labels[indices.numpy()].tolist()
    ids = split.texts[split.text_rows[indices.numpy(), 0]]
    assert np.array_equal(inputs["input_ids"].numpy(), ids)
    loader = split.loader(16)
    epoch, resumed = list(loader.epoch(shuffle_seed=3)), list(loader.epoch(shuffle_seed=3, start=2))
    loader.close()
    assert [i.tolist() for i, _, _ in epoch[2:]] == [i.tolist() for i, _, _ in resumed]


def test_a_mask_is_there_only_where_something_is_padded() -> None:
    task: Any = tasks.load({"kind": "digit_retrieval", "train_limit": 5, "report_limit": 5})
    whole = task.report
    assert not whole.padded
    assert "attention_mask" not in next(iter(whole.batches(2)))[1]
    longer: Any = tasks.load({"kind": "digit_retrieval", "report_limit": 5, "max_text_tokens": 15}).report
    assert next(iter(longer.batches(2)))[1]["attention_mask"].sum(dim=1).tolist() == [whole.texts.shape[1]] * 2


def test_candidates_of_a_training_picture() -> None:
    split: Any = tasks.load({"kind": "digit_retrieval", "candidates": 5}).train
    assert split.text_rows.shape == (len(split), 5)
    assert split.text_rows[:, 0].tolist() == list(range(len(split)))
    assert (split.picture_of_text[split.text_rows[:, 0]] == split.pictures[:, 0]).all()
    assert (split.picture_of_text[split.text_rows[:, 1:]] != split.pictures).all()
    assert all(len(set(row)) == 5 for row in split.text_rows.tolist())
    _, inputs, targets = next(iter(split.batches(3)))
    assert inputs["input_ids"].shape == (3, 5, split.texts.shape[1])
    assert targets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", [30, 900])
def test_candidates_read_differently_from_each_other(count: int) -> None:
    texts = np.arange(count) % (count // 3)
    drawn = draw_candidates(texts, np.arange(count) // 2, 4, seed=1)
    assert drawn.shape == (count, 4)
    assert np.array_equal(drawn, draw_candidates(texts, np.arange(count) // 2, 4, seed=1))
    assert all(len(set(texts[row])) == 4 for row in drawn)
    assert (drawn[:, 1:] // 2 != drawn[:, :1] // 2).all()


def test_few_candidates_where_there_are_few_texts() -> None:
    assert draw_candidates(np.arange(2), np.arange(2), 4, seed=0).tolist() == [[0, 1], [1, 0]]
    assert draw_candidates(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), 4, seed=0).tolist() == [[0]]


@pytest.mark.parametrize("count", [1, 7, 40, 10_000])
def test_pairs_cover_every_picture_and_text_once(count: int) -> None:
    split: Any = tasks.load({"kind": "digit_retrieval", "report_limit": 6}).report
    seen = np.zeros((6, 18), dtype=int)
    for images, texts, inputs in split.pairs(count):
        seen[np.ix_(images, texts)] += 1
        assert inputs["pixel_values"].shape == (len(images), 3, 32, 32)
        assert inputs["input_ids"].shape == (len(images), len(texts), split.texts.shape[1])
        assert len(images) * len(texts) <= max(count, 18)
        assert np.array_equal(inputs["input_ids"][0].numpy(), split.texts[texts])
    assert (seen == 1).all()


def test_pictures_are_squashed_not_cropped(tmp_path: Path) -> None:
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, :4] = 200
    out = io.BytesIO()
    Image.fromarray(wide).save(out, "PNG")
    found = rows("nlvr1", 10)
    found["image"] = [out.getvalue()] * 4 + [png(i) for i in range(6)]
    found["split"] = ["validation"] * 4 + ["train"] * 6
    pq.write_table(pa.table(found), tmp_path / "a.parquet")
    task: Any = tasks.load({"kind": "nlvr1", "path": str(tmp_path / "a.parquet"), "image_size": 4})
    assert task.report.images.shape == (1, 4, 4, 3)
    assert task.report.images[0, 0, :, 0].tolist()[0] > 180
    assert task.report.images[0, 0, :, 0].tolist()[-1] < 20


# --- tokenisers -------------------------------------------------------------------------------------------------------


def test_word_tokeniser() -> None:
    found = tokenisers.WordTokeniser.of(["A red seven.", "a blue, red one"])
    assert found.vocabulary == ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", ",", ".", "blue", "one", "seven")
    assert found.encode(["Red a?"]) == [[1, 5, 4, 3, 2]]
    assert found.encode(["a a a a a"], max_tokens=4) == [[1, 4, 4, 2]]
    ids, mask = tokenisers.padded(found.encode(["red", "a red one"]), 6, 0)
    assert ids.tolist() == [[1, 5, 2, 0, 0, 0], [1, 4, 5, 9, 2, 0]]
    assert mask.sum(axis=1).tolist() == [3, 5]
    again = tokenisers.read(json.loads(json.dumps(found.description())))
    assert again.encode(["a blue one"]) == found.encode(["a blue one"])


def test_published_tokeniser_from_a_folder(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    folder = tmp_path / "bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "statement", "1", "##0", "##1", "2", "3"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=12).save_pretrained(folder)
    pq.write_table(pa.table(rows("nlvr1", 12)), tmp_path / "a.parquet")
    data = {"kind": "nlvr1", "path": str(tmp_path / "a.parquet"), "image_size": SIZE, "tokenizer": str(folder)}
    task: Any = tasks.load(data)
    assert task.info.text == tasks.TextInfo(len(words), 5, 0)  # [CLS] statement 1 ##0 [SEP]
    text = task.preprocessing()["text"]
    assert text["tokenizer"]["name"] == "bert"
    assert str(tmp_path) not in json.dumps(text)
    read = tokenisers.read(text["tokenizer"], folder=str(folder))
    assert read.encode(["statement 11"]) == [[2, 5, 6, 8, 3]]
    assert read.encode(["statement 11"], max_tokens=4) == [[2, 5, 6, 3]]
    with pytest.raises(TaskError, match=r"statement 10.*set data\.truncation: true"):
        tasks.load({**data, "max_text_tokens": 4})
    (folder / "vocab.txt").write_text("\n".join([*words, "4"]))
    with pytest.raises(TaskError, match="must be the tokeniser that the model was trained with"):
        tokenisers.read(text["tokenizer"], folder=str(folder))
    with pytest.raises(TaskError, match=r"data\.tokenizer '\./nowhere': must be a tokeniser's folder or a name"):
        tasks.load({**data, "tokenizer": "./nowhere"})


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
