"""Vision-language examples: batches, candidates, pairs, pictures, and the ids of texts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests import vl_layouts
from tests.vl_layouts import SIZE, png, rows
from workers import tasks
from workers.tasks import TaskError, tokenisers
from workers.tasks.example_splits import draw_candidates

own_cache = vl_layouts.own_cache
pytestmark = pytest.mark.usefixtures("own_cache")


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


def test_the_tokeniser_of_an_artefact_is_taken_with_its_vocabulary(tmp_path: Path) -> None:
    pq.write_table(pa.table(rows("nlvr1", 12)), tmp_path / "a.parquet")
    data = {"kind": "nlvr1", "path": str(tmp_path / "a.parquet"), "image_size": SIZE}
    words = tokenisers.WordTokeniser.of(["a statement about two pictures", "1 2 3"])
    folder = tmp_path / "artefact"
    folder.mkdir()
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"extra": {"preprocessing": {"text": {"tokenizer": words.description()}}}}))
    digest = tokenisers.folder_fingerprint(str(folder))
    for given in (str(folder), {"path": str(folder), "digest": digest}):
        task: Any = tasks.load({**data, "tokenizer": given})
        assert task.text["tokenizer"] == words.description()
        assert {tuple(ids) for ids in task.train.texts[:, :2].tolist()} == {
            (tokenisers.CLS, words.encode(["statement"])[0][1])
        }
        assert (task.train.texts == tokenisers.UNK).any()  # numbers that it does not know
    manifest.write_text(json.dumps({"extra": {"preprocessing": {"image_size": 8}}}))
    with pytest.raises(TaskError, match=r"artefact: content must be the study's \(digest [0-9a-f]{16}\)"):
        tasks.load({**data, "max_text_tokens": 20, "tokenizer": {"path": str(folder), "digest": digest}})
    with pytest.raises(TaskError, match=r"must be the artefact of a model of images with texts.*KeyError"):
        tasks.load({**data, "tokenizer": str(folder)})
