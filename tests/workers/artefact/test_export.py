"""Exports: real files of every format, run by their own runtimes and compared."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.export.folder import CARD, RECORD, Exported
from tests import exports
from tests.exports import NAME, REPOSITORY, Study, close, images, logits
from workers import artefact, tasks
from workers.artefact import export
from workers.artefact.export_formats import ExportFailed, ExportFormat

study = exports.study
fp16 = exports.fp16


def test_an_artefact_loads_in_another_process_without_the_study(study: Study, tmp_path: Path) -> None:
    done = study.export("int8", tmp_path / "out", "artefact")
    assert done.record["parity"]["largest_difference"] == 0.0
    alone = tmp_path / "elsewhere" / "model"
    alone.mkdir(parents=True)
    for name in (artefact.TENSORS, artefact.MANIFEST):
        shutil.copy(done.folder / name, alone)
    threads = torch.get_num_threads()
    code = (
        "import sys, numpy, torch; from workers import artefact\n"
        f"torch.set_num_threads({threads})\n"
        "with torch.inference_mode(): found = artefact.load('model')(torch.from_numpy(numpy.load('images.npy')))\n"
        "numpy.save('logits.npy', found.numpy())\n"
        "assert not {'orchestrator', 'ray', 'optuna', 'pyarrow'} & set(sys.modules)"
    )
    np.save(alone.parent / "images.npy", images(5).numpy())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], cwd=alone.parent, env=environment, check=True)
    found = torch.from_numpy(np.load(alone.parent / "logits.npy"))
    assert torch.equal(found, logits(study.model("int8"), images(5)))


@pytest.mark.parametrize("recipe", ["int4", "bf16"])
def test_torch_export(recipe: str, study: Study, tmp_path: Path) -> None:
    done = study.export(recipe, tmp_path / "out", ExportFormat.torch_export)
    file = done.folder / "model.pt2"
    assert sorted(p.name for p in done.folder.iterdir()) == [CARD, RECORD, "model.pt2"]
    assert str(REPOSITORY).encode() not in file.read_bytes()
    program = torch.export.load(file)
    assert program.example_inputs is None
    for size in (1, 5):
        assert torch.equal(logits(program.module(), images(size)), logits(study.model(recipe), images(size)))
    assert done.record["parity"]["tolerance"] == (0.02 if recipe == "bf16" else 0.001)


def test_packed_kernels_are_exported_without_the_layout_of_this_cpu(study: Study, tmp_path: Path) -> None:
    done = study.export("packed", tmp_path / "out", ExportFormat.torch_export)
    code = (
        "import numpy, torch; batch = torch.from_numpy(numpy.load('images.npy'))\n"
        "with torch.inference_mode(): numpy.save('logits.npy', torch.export.load('out/model.pt2').module()(batch).numpy())"
    )
    np.save(tmp_path / "images.npy", images(5).numpy())
    weaker = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=weaker, check=True)
    assert close(torch.from_numpy(np.load(tmp_path / "logits.npy")), logits(study.model("packed"), images(5)), 0.02)
    assert done.record["parity"]["largest_difference"] == 0.0


@pytest.mark.parametrize("format_", ["torch-export", "onnx"])
@pytest.mark.parametrize("recipe", ["qat", "lsq", "static"])
def test_integer_layers_are_exported_as_what_they_compute(
    recipe: str, format_: str, study: Study, tmp_path: Path
) -> None:
    """Their kernel is this CPU's; the file holds the same roundings in floats, and passes the check that every export does."""
    parity = study.export(recipe, tmp_path / "out", format_).record["parity"]
    assert parity["largest_difference"] <= 0.001 * parity["largest_logit"]


def test_onnx_keeps_packed_weights_and_merges_tokens(study: Study, tmp_path: Path) -> None:
    done = study.export("int4", tmp_path / "out", "onnx")
    file = done.folder / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    model = study.model("int4")
    for size in (1, 5):
        found = torch.from_numpy(session.run(["logits"], {"images": images(size).numpy()})[0])
        assert close(found, logits(model, images(size)), 1e-3)
    graph = onnx.load(file).graph
    stored = {tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8}
    assert stored >= {tuple(t.shape) for t in model.state_dict().values() if t.dtype == torch.uint8}
    assert "TopK" in {node.op_type for node in graph.node}
    assert str(REPOSITORY).encode() not in file.read_bytes()


@pytest.mark.parametrize("format_", ["torch-export", "onnx"])
@pytest.mark.parametrize("recipe", ["factors", "sparse"])
def test_thin_and_sparse_layers_are_exported(recipe: str, format_: str, study: Study, tmp_path: Path) -> None:
    done = study.export(recipe, tmp_path / "out", format_)
    parity = done.record["parity"]
    assert parity["largest_difference"] <= 0.001 * parity["largest_logit"]
    if (recipe, format_) == ("sparse", "onnx"):  # the file keeps them packed
        stored = [tuple(t.dims) for t in onnx.load(done.folder / "model.onnx").graph.initializer]
        tensors = study.model(recipe).state_dict()
        packed = [tuple(t.shape) for name, t in tensors.items() if name.endswith((".values", ".positions"))]
        assert set(packed) <= set(stored)


def test_the_record_names_what_was_compared(study: Study, fp16: dict[ExportFormat, Exported]) -> None:
    done = fp16[ExportFormat.onnx]
    record = json.loads((done.folder / RECORD).read_text())
    assert record == done.record
    data = (done.folder / "model.onnx").read_bytes()
    assert record["files"] == {"model.onnx": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    parity = record["parity"]
    assert (parity["inputs"], parity["batches"], parity["tolerance"]) == ("search split of the study", [8, 3, 1], 0.02)
    assert 0 < parity["largest_difference"] <= 0.02 * parity["largest_logit"]
    assert record["input"]["shape"] == ["batch", 1, 8, 8]
    assert record["output"]["shape"] == ["batch", 10]
    assert record["class_names"] == [str(n) for n in range(10)]
    assert record["versions"]["onnxruntime"] == onnxruntime.__version__
    assert (record["study"], record["trial_id"]) == (NAME, study.trials["fp16"])


def test_images_are_those_of_the_search_split(study: Study) -> None:
    data = study.row("baseline")["spec"]["context"]["data"]
    task = tasks.load(data)
    found = export.search_images(data, task.preprocessing())
    (_, split, _) = next(task.search.batches(len(task.search)))
    assert found.values.shape == (sum(export.BATCHES), 1, 8, 8)
    assert all((split == image).flatten(1).all(1).any() for image in found.values)
    assert len(export.search_images({**data, "search_limit": 5}, task.preprocessing()).values) == 5


def test_noise_stands_in_for_data_that_is_elsewhere(tmp_path: Path) -> None:
    preprocessing = {"image_size": 4, "in_chans": 3, "mean": [0.0] * 3, "std": [1.0] * 3}
    found = export.search_images({"kind": "imagefolder", "path": str(tmp_path / "gone")}, preprocessing)
    assert found.values.shape == (12, 3, 4, 4)
    assert found.class_names is None
    assert found.origin == "standard normal noise, seed 0, since the study's data could not be read"
    assert "gone" in str(found.fault)


def test_the_command_says_that_it_compared_on_noise(study: Study, tmp_path: Path) -> None:
    arguments = ["export", NAME, study.trials["moved"], str(tmp_path / "out"), "--storage", study.storage.url]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    first, second = result.stderr.splitlines()
    assert first.startswith("vitpareto: compared on noise: the study's data cannot be read here: /nowhere/photographs")
    assert second.startswith(
        "checked on standard normal noise, seed 0, since the study's data could not be read, batches"
    )
    for file in (CARD, RECORD):
        assert "/nowhere" not in (tmp_path / "out" / file).read_text()


def test_comparison_sees_differences_flips_and_nan() -> None:
    few = export.Images(torch.tensor([[[[3.0, 1.0]]], [[[0.0, 2.0]]]]), "two", None)

    def plain(batch: torch.Tensor) -> torch.Tensor:
        return batch.flatten(1)

    same = export.compare(plain, plain, few, 0.0)
    assert (same.holds, same.largest_difference, same.largest_logit, same.top1_differing) == (True, 0.0, 3.0, 0)
    moved = export.compare(plain, lambda b: plain(b) + torch.tensor([0.0, 2.5]), few, 0.5)
    assert (moved.holds, moved.largest_difference, moved.top1_differing) == (False, 2.5, 6)
    assert export.compare(plain, lambda b: plain(b) + torch.tensor([0.0, 1.5]), few, 0.5).holds
    assert not export.compare(plain, lambda b: plain(b) * torch.nan, few, 0.5).holds
    with pytest.raises(ValueError, match=r"a batch of 8 gives \(1, 2\), must be \(8, 2\)"):
        export.compare(plain, lambda b: plain(b)[:1], few, 0.5)


def test_an_export_that_differs_leaves_nothing_behind(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "FLOAT32", 0.0)  # onnxruntime adds up in another order
    with pytest.raises(
        ExportFailed, match=r"onnx: logits must be within 0 of the largest one.* of 12 predictions differ"
    ):
        study.export("baseline", tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []
