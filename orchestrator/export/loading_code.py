"""The section of a model card that says how to use the model: code that runs as it stands in the folder of the export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_WITH_TEXTS = (
    "With vitpareto's `workers` package, PyTorch and transformers; `images` as above, one text for each; in this folder:",
    "",
    "```python",
    "import json",
    "from pathlib import Path",
    "",
    "import torch",
    "",
    "from workers import artefact",
    "from workers.tasks import tokenisers",
    "",
    'text = json.loads(Path("export.json").read_text())["input"]["preprocessing"]["text"]',
    'tokeniser, length = tokenisers.read(text["tokenizer"]), text["max_text_tokens"]',
    'ids, mask = tokenisers.padded(tokeniser.encode(texts, length), length, text["pad_id"])',
    'batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}',
    'batch["pixel_values"] = torch.from_numpy(prepare(images))  # NLVR2: both of a pair, (B, 2, C, H, W)',
    'model = artefact.load(".")  # no study, no training, no code from the file',
    "with torch.inference_mode():",
    "    logits = model(batch)  # (B, classes); of retrieval (B, 1), the score of a pair",
    "```",
)
"""How an artefact of a vision-language model is used; it has no other format."""

_LOADING: Mapping[str, Sequence[str]] = {
    "artefact": (
        "With vitpareto's `workers` package, PyTorch and timm; in this folder:",
        "",
        "```python",
        "import torch",
        "",
        "from workers import artefact",
        "",
        'model = artefact.load(".")  # no study, no training, no code from the file',
        "with torch.inference_mode():",
        "    logits = model(torch.from_numpy(prepare(images)))  # (B, classes)",
        "```",
    ),
    "torch-export": (
        "With PyTorch alone (tried with the version below); in this folder:",
        "",
        "```python",
        "import torch",
        "",
        'model = torch.export.load("model.pt2").module()',
        "with torch.inference_mode():",
        "    logits = model(torch.from_numpy(prepare(images)))  # (B, classes)",
        "```",
    ),
    "onnx": (
        "With onnxruntime alone (tried with the version below); in this folder:",
        "",
        "```python",
        "import onnxruntime",
        "",
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        'logits = session.run(["logits"], {"images": prepare(images)})[0]  # (B, classes)',
        "```",
    ),
}


def usage(export: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the section.

    Args:
        export: what ``export.json`` holds.
    """
    yield "## Use"
    yield ""
    preparing = export["input"]["preprocessing"]
    given = "values from 0 to 255" if preparing["input"].startswith("uint8") else "values in the data's own range"
    yield f"Images are resized first: {preparing['resize']}, to {preparing['image_size']} x {preparing['image_size']} pixels."
    yield ""
    yield "```python"
    yield "import numpy as np"
    yield ""
    yield f"MEAN, STD = {preparing['mean']}, {preparing['std']}"
    yield ""
    yield ""
    yield "def prepare(images):"
    yield f'    """(B, {preparing["image_size"]}, {preparing["image_size"]}, {preparing["in_chans"]}) {given}."""'
    scaled = "images / 255" if preparing["input"].startswith("uint8") else "images"
    yield f"    normalised = ({scaled} - np.array(MEAN)) / np.array(STD)"
    yield '    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), dtype="float32")'
    yield "```"
    yield ""
    yield from _WITH_TEXTS if "text" in preparing else _LOADING[export["format"]]
    if export.get("class_names"):
        yield ""
        yield "Names of the classes, in the order of the logits: `class_names` in `export.json`."
