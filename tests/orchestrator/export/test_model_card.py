"""The model card of an export: code that runs, and nothing that is not known."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from orchestrator.export.folder import CARD, Exported
from orchestrator.export.loading_code import usage
from orchestrator.export.model_card import model_card
from tests import exports
from tests.exports import Study, close, logits
from workers import artefact, models, tasks
from workers.artefact.export_formats import ExportFormat
from workers.tasks import KINDS
from workers.tasks.image_classification import Split
from workers.tasks.vision_language import VisionLanguageTask

study = exports.study
fp16 = exports.fp16


def blocks(card: str) -> list[str]:
    return [part.split("```")[0] for part in card.split("```python\n")[1:]]


@pytest.mark.parametrize("format_", list(ExportFormat))
def test_the_card_loads_the_model_as_it_says(
    format_: ExportFormat, study: Study, fp16: dict[ExportFormat, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fp16[format_].folder
    prepare, load = blocks((folder / CARD).read_text())
    monkeypatch.chdir(folder)
    split = tasks.load(study.row("fp16")["spec"]["context"]["data"]).search
    names: dict[str, Any] = {"images": split.images[:5]}
    exec(prepare, names)
    exec(load, names)
    (_, expected, _) = next(split.batches(5))
    assert close(torch.from_numpy(np.asarray(names["logits"])), logits(study.model("fp16"), expected), 0.02)


def test_the_card_prepares_photographs_as_the_study_does() -> None:
    rng = np.random.default_rng(0)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    photographs = rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    preparing = {
        "image_size": 4,
        "in_chans": 3,
        "resize": "",
        "input": "uint8 / 255",
        "mean": list(mean),
        "std": list(std),
    }
    text = "\n".join(usage({"format": "onnx", "input": {"preprocessing": preparing}}))
    names: dict[str, Any] = {}
    exec(blocks(text)[0], names)
    (_, expected, _) = next(Split(photographs, np.zeros(2, np.int64), mean, std).batches(2))
    found = names["prepare"](photographs)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_the_header_holds_only_what_is_known(study: Study, tmp_path: Path) -> None:
    card = (study.export("int4", tmp_path / "out", "artefact").folder / CARD).read_text()
    header, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(header) == {
        "library_name": "vitpareto",
        "pipeline_tag": "image-classification",
        "tags": ["vitpareto", "vision-transformer", "tome", "weight_only", "artefact"],
        "metrics": ["accuracy"],
    }
    row = study.row("int4")
    assert "1. `tome`: " in body
    assert "2. `weight_only`: " in body
    report = next(m for m in study.ledger.measurements().to_pylist() if m["kind"] == "accuracy_report")
    assert f"| Top-1 accuracy, report split (100 examples) | {report['value']:.2f} % | " in body
    for fact in (row["attempt_id"], row["provenance"]["data_digest"], row["provenance"]["versions"]["torch"]):
        assert fact in body
    assert "No speed and no memory was measured" in body
    assert "Simulated" not in body
    assert "Slower" not in body


def test_the_card_states_conditions_and_what_speaks_against_the_model(study: Study, tmp_path: Path) -> None:
    record = study.export("int4", tmp_path / "out", "artefact").record
    row = copy.deepcopy(study.row("int4"))
    row["metrics"] |= {"latency_ms_p50": 2.0, "latency_ms_p50_low": 1.5, "latency_ms_p50_high": 2.5}
    row |= {"latency_ms_p50_ratio": 2.0, "slower_than_baseline": True}
    row["conditions"]["simulated"] = True
    measured = {
        "kind": "latency",
        "attempt_id": row["attempt_id"],
        "device": "cpu",
        "batch": 1,
        "resolution": 8,
        "protocol": "quick",
        "samples": [2.0] * 30,
        "ratio": 2.0,
        "ratio_low": 1.9,
        "ratio_high": 2.1,
        "conditions": {"device_name": "A | B", "dtype": "uint8+float32", "threads": 2, "compiled": True},
    }
    again = {**measured, "attempt_id": None, "ratio": 1.8}
    memory = {"method": "resident growth", "resolution_bytes": 2e6, "device_name": "A | B"}
    peak = {**measured, "kind": "peak_memory", "ratio_low": None, "samples": [], "conditions": memory}
    strong = {"device_name": "A | B", "latency": {"way": "bf16", "value": 1.0, "unit": "ms", "batch": 1}}
    card = model_card(row, record, [measured, again, peak], strong)
    assert "| Latency, median | 2 ms | 1.5 ms to 2.5 ms | 2.000 times |" in card
    assert (
        "| latency | A \\| B | uint8+float32, compiled | 2 | 1 | 8 px | quick | 30 | 2.000 (1.900 to 2.100) |" in card
    )
    assert "| latency (again, later) | A \\| B | " in card
    assert "fastest uncompressed way to run the model on A | B: latency 1 ms as bf16 at batch 1." in card
    assert "| peak memory | A \\| B | - | - | 1 | 8 px | quick | - | 2.000 |" in card
    assert "Peak memory: resident growth; differences below 2 MB are not told apart." in card
    assert "**Simulated.**" in card
    assert "**Slower than the baseline.**" in card


def test_the_card_of_the_baseline(study: Study, tmp_path: Path) -> None:
    card = (study.export("baseline", tmp_path / "out", "artefact").folder / CARD).read_text()
    assert "# Vision transformer, uncompressed\n" in card
    assert "None: this is the uncompressed baseline." in card
    assert "times |" not in card


def test_the_cards_code_answers_questions_as_the_study_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of the card, run as they stand, on pictures and texts of the report split."""
    task, section = tasks.load({"kind": "digit_vqa"}), {"family": "vilt", "name": "vilt_tiny"}
    assert isinstance(task, VisionLanguageTask)
    torch.manual_seed(0)
    model, preparing = models.build(section, task.info).eval(), task.preprocessing()
    description = models.describe(section, task.info)
    artefact.save(model, tmp_path, model_description=description, steps=[], extra={"preprocessing": preparing})
    export = {"format": "artefact", "input": {"preprocessing": preparing}}
    (tmp_path / "export.json").write_text(json.dumps(export))
    rows, inputs, _ = next(task.report.batches(3))
    names: dict[str, Any] = {
        "images": task.report.images[task.report.pictures[rows.numpy(), 0]],
        "texts": KINDS["digit_vqa"].open({"kind": "digit_vqa"}).parts["test"].texts[:3],
    }
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", "\n".join(usage(export)), re.DOTALL):
        exec(block, names)
    with torch.inference_mode():
        expected = model(inputs)
    torch.testing.assert_close(names["logits"], expected)
    assert len(names["logits"]) == 3
