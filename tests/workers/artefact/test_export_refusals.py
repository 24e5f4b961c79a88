"""What cannot be exported: refusals that say why and what to do instead."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from orchestrator.export.folder import export_trial
from tests import exports
from tests.exports import NAME, Study, images
from tests.workers.artefact.test_artefact import compress, save
from tests.workers.techniques.test_contract import SAMPLES
from workers import artefact
from workers.artefact import export, export_formats
from workers.artefact.export_formats import ExportFailed, ExportFormat, ExportRefused
from workers.techniques import registry
from workers.techniques.record import make_config

study = exports.study

REFUSED = [
    ("int8", "torch-export"),
    ("int8", "onnx"),
    ("packed", "onnx"),
    ("bf16", "onnx"),
]


def test_every_refusal_is_tried() -> None:
    assert len(export_formats.REFUSALS) == len(REFUSED)


@pytest.mark.parametrize(("recipe", "format_"), REFUSED)
def test_what_a_format_cannot_carry_is_refused_and_could_not_be_done(
    recipe: str, format_: str, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportRefused, match=rf"^--format {format_} cannot carry \w+.*: .*; use --format [^\n]*$"):
        study.export(recipe, tmp_path / "out", format_)
    monkeypatch.setattr(export_formats, "REFUSALS", ())
    with pytest.raises(
        ExportFailed, match=rf"^--format {format_} did not work for .*; use --format artefact$"
    ) as caught:
        study.export(recipe, tmp_path / "out", format_)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("format_", [ExportFormat.torch_export, ExportFormat.onnx])
@pytest.mark.parametrize("technique", SAMPLES)
def test_every_technique_is_carried_or_refused(technique: str, format_: ExportFormat, tmp_path: Path) -> None:
    model, steps = compress((technique, SAMPLES[technique]))
    if (finalise := registry()[technique].finalise) is not None:  # only a finished training is exported
        steps[0]["resolved"] |= finalise(model, make_config(registry()[technique].Config, SAMPLES[technique]))
    save(model, tmp_path / "made", steps)
    noise = export.Images(images(sum(export.BATCHES)), "noise")
    reason = export_formats.refusal(format_, steps)
    if reason is None:
        assert export.write(tmp_path / "made", format_, tmp_path, noise).holds


def test_several_refusals_are_said_at_once() -> None:
    steps = [
        {"technique": "precision", "resolved": {"dtype": "bf16"}},
        {"technique": "weight_only", "resolved": {"bits": 8, "kernel": "packed"}},
        {"technique": "tome", "resolved": {}},
    ]
    found = export_formats.refusal(ExportFormat.onnx, steps) or ""
    assert "carry precision(dtype=bf16): " in found
    assert "\nand weight_only(kernel=packed): " in found
    assert "tome" not in found
    steps[0]["resolved"], steps[1]["resolved"] = {"dtype": "fp16"}, {"bits": 8, "kernel": "dequantise"}
    assert export_formats.refusal(ExportFormat.onnx, steps) is None


def test_a_missing_package_is_named_with_the_remedy(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    with pytest.raises(ExportRefused, match=r"onnxruntime.*; install them with: pip install 'vitpareto\[export\]'"):
        study.export("baseline", tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_trials_without_a_model(study: Study, tmp_path: Path) -> None:
    with pytest.raises(
        ExportRefused, match=rf"{study.trials['failed']} of exports has no model: its status is infeasible"
    ):
        study.export("failed", tmp_path / "out", "artefact")
    with pytest.raises(LookupError, match="'zz': no trial has an id that starts so"):
        export_trial(NAME, "zz", tmp_path / "out", storage=study.storage.url)


def test_a_damaged_artefact(study: Study, tmp_path: Path) -> None:
    copied = tmp_path / "storage"
    shutil.copytree(study.storage.url, copied)
    file = copied / study.row("bf16")["artefact"] / artefact.TENSORS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ExportFailed, match=r"of exports: artefact .*model\.safetensors has .*truncated"):
        export_trial(NAME, study.trials["bf16"], tmp_path / "out", storage=copied)
    assert list(tmp_path.iterdir()) == [copied]
