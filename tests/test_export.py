"""Exports: real files of every format, run by their own runtimes and compared; refusals that say why; the model card."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.config import load_study
from orchestrator.export import CARD, RECORD, Exported, export_trial
from orchestrator.ledger import Ledger, attempt_row
from orchestrator.loading_code import usage
from orchestrator.model_card import model_card
from orchestrator.show import find_trial
from tests.studies import tiny_study
from tests.techniques.test_contract import SAMPLES
from tests.test_artefact import compress, save
from workers import artefact, export, export_formats, tasks
from workers.export_formats import ExportFailed, ExportFormat, ExportRefused
from workers.protocol import Recipe, Step, TrialResult, TrialSpec, trial_id
from workers.run import run_report, run_trial
from workers.storage import LocalStorage
from workers.tasks.image_classification import Split
from workers.techniques import registry, versions
from workers.techniques.record import make_config

REPOSITORY = Path(__file__).parents[1]
NAME = "exports"
RECIPES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "baseline": (),
    "int8": (("magnitude_prune", {"mlp_ratio": 0.5, "head_ratio": 0.0}), ("tome", {"r": 1}), ("dynamic_int8", {})),
    "int4": (("tome", {"r": 1}), ("weight_only", {"bits": 4})),
    "packed": (("weight_only", {"bits": 4, "kernel": "packed"}),),
    "qat": (("qat", {}),),
    "lsq": (("lsq", {"weight_bits": 8}),),
    "static": (("static_int8", {}),),
    "bf16": (("precision", {"dtype": "bf16"}),),
    "fp16": (("precision", {"dtype": "fp16"}),),
}


@dataclass
class Study:
    """A study on disk with one trial for each of RECIPES, one that failed, and one whose data lies elsewhere."""

    storage: LocalStorage
    ledger: Ledger
    trials: dict[str, str]

    def row(self, recipe: str) -> dict[str, Any]:
        return find_trial(self.ledger, self.trials[recipe])

    def model(self, recipe: str) -> torch.nn.Module:
        return artefact.load(f"{self.storage.url}/{self.row(recipe)['artefact']}")

    def export(self, recipe: str, out: Path, format_: ExportFormat | str, **more: Any) -> Exported:
        return export_trial(NAME, self.trials[recipe], out, format=format_, storage=self.storage.url, **more)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    config = load_study(tiny_study(NAME))
    context, known = config.context(), registry()
    storage = LocalStorage(tmp_path_factory.mktemp("storage"))
    ledger = Ledger(storage, NAME)
    ledger.write_study({"config": config.model_dump(mode="json"), "context": context.digest})
    trials = {}
    for name, steps in RECIPES.items():
        recipe = Recipe(tuple(Step(n, asdict(known[n].Config(**c))) for n, c in steps))
        trials[name] = trial_id(recipe, 0, context, versions())
        spec = TrialSpec(NAME, trials[name], recipe, 0, context, storage.url)
        result = run_trial(spec)
        assert result.status == "ok", result.failure
        ledger.write_attempt(attempt_row(spec, result, None))
        if name in ("baseline", "int4"):
            ledger.write_report(spec.trial_id, recipe.hash, *map(asdict, run_report(spec)))
    elsewhere = replace(context, data={**context.data, "kind": "imagefolder", "path": "/nowhere/photographs"})
    moved = replace(spec, trial_id=trial_id(recipe, 0, elsewhere, versions()), context=elsewhere)
    trials["moved"] = moved.trial_id
    ledger.write_attempt(attempt_row(moved, replace(result, trial_id=moved.trial_id, attempt_id="m"), None))
    trials["failed"] = trial_id(Recipe(), 1, context, versions())
    spec = TrialSpec(NAME, trials["failed"], Recipe(), 1, context, storage.url)
    ended = TrialResult(spec.trial_id, "a", "infeasible", "it cannot be", {}, time.time(), 0.1)
    ledger.write_attempt(attempt_row(spec, ended, None))
    return Study(storage, ledger, trials)


@pytest.fixture(scope="module")
def fp16(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[ExportFormat, Exported]:
    """One trial in every format; the tests leave the folders as they are."""
    folder = tmp_path_factory.mktemp("fp16") / "new"
    return {format_: study.export("fp16", folder / format_, format_) for format_ in ExportFormat}


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def logits(model: Any, batch: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(batch)


def close(found: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    return bool((found - expected).abs().max() <= share * expected.abs().max())


# --- what is written --------------------------------------------------------------------------------------------------


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
    subprocess.run([sys.executable, "-c", code], cwd=alone.parent, env=environment, check=True, timeout=100)
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
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=weaker, check=True, timeout=100)
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


# --- images -----------------------------------------------------------------------------------------------------------


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


# --- comparing --------------------------------------------------------------------------------------------------------


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


# --- refusals ---------------------------------------------------------------------------------------------------------

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


# --- the folder -------------------------------------------------------------------------------------------------------


def test_an_earlier_export_is_replaced_only_when_asked(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    study.export("baseline", out, "artefact")  # an empty folder is as good as none
    (out / "stale").touch()
    with pytest.raises(ExportRefused, match=r"holds an export already; .*--overwrite"):
        study.export("fp16", out, "artefact")
    before = (out / RECORD).read_bytes()
    with pytest.raises(ExportRefused, match="cannot carry"):
        study.export("int8", out, "onnx", overwrite=True)
    assert (out / RECORD).read_bytes() == before
    study.export("fp16", out, "artefact", overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == [CARD, RECORD, artefact.MANIFEST, artefact.TENSORS]
    assert json.loads((out / RECORD).read_text())["trial_id"] == study.trials["fp16"]
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_no_export_is_never_replaced(study: Study, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(ExportRefused, match=r"holds no export\.json, so it is something else; name another"):
            study.export("baseline", precious, "artefact", overwrite=overwrite)
    with pytest.raises(ExportRefused, match="must be a folder, it is a file"):
        study.export("baseline", precious / "thesis.tex", "artefact", overwrite=True)
    with pytest.raises(ExportRefused, match="must be a folder on this machine"):
        export_trial(NAME, study.trials["baseline"], "s3://bucket/out", storage=study.storage.url)
    assert (precious / "thesis.tex").read_text() == "years"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_only_what_it_has_to_say(study: Study, tmp_path: Path) -> None:
    arguments = ["export", NAME, study.trials["fp16"][:8], "--format", "onnx", "out", "--storage", study.storage.url]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "out" / n) for n in (CARD, RECORD, "model.onnx")]
    (line,) = done.stderr.splitlines()
    assert line.startswith("checked on search split of the study, batches of 8, 3, 1: logits differ by ")
    assert line.endswith("0 of 12 predictions differ")


@pytest.mark.parametrize(
    ("recipe", "more", "status", "words"),
    [
        ("bf16", ["--format", "onnx"], 2, "cannot carry precision(dtype=bf16)"),
        ("failed", [], 2, "has no model"),
        (None, [], 2, "no trial has an id that starts so"),
    ],
)
def test_exit_status_of_what_does_not_work(
    recipe: str | None, more: list[str], status: int, words: str, study: Study, tmp_path: Path
) -> None:
    trial = study.trials[recipe] if recipe else "nonsense"
    arguments = ["export", NAME, trial, str(tmp_path / "out"), *more, "--storage", study.storage.url]
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_failed_export_exits_with_1(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_formats, "REFUSALS", ())
    arguments = ["export", NAME, study.trials["int8"], str(tmp_path / "out"), "--format", "torch-export"]
    result = CliRunner().invoke(cli.app, [*arguments, "--storage", study.storage.url])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert "did not work for magnitude_prune + tome + dynamic_int8" in result.stderr


# --- the model card ---------------------------------------------------------------------------------------------------


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
