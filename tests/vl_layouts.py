"""Small data sets in the published layouts and as tables, which the tests of vision-language data share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

SIZE = 16


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's cache of decoded pictures that nobody else uses."""
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


def retrieval(root: Path, val: int = 1) -> dict[str, Any]:
    images = []
    for number, split in enumerate(["train"] * 10 + ["val"] * val + ["test"] * 3):
        jpg(root / "flickr30k-images" / f"{number}.jpg", 15 * number)
        said = [{"raw": f"Picture {number} said way {way}."} for way in range(5)]
        images.append({"filename": f"{number}.jpg", "split": split, "sentences": said})
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return {"kind": "retrieval", "path": str(root), "image_size": SIZE}


LAYOUTS = {"vqa": vqa, "entailment": entailment, "nlvr2": nlvr2, "nlvr1": nlvr1, "retrieval": retrieval}
COUNTS = {"vqa": (20, 3), "entailment": (9, 3), "nlvr2": (8, 3), "nlvr1": (12, 3), "retrieval": (55, 15)}


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
