"""Parity: equal in every bit under the same conditions, within a stated tolerance under others, a mismatch beyond it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.places import ROOT
from tests.workers.artefact.test_artefact import compress, images, save
from workers import artefact
from workers.artefact import parity

CPU = torch.device("cpu")
KINDS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "float32": (("tome", {"r": 3}), ("weight_only", {"bits": 4})),
    "float16": (("nystrom", {"landmarks": 8}), ("precision", {"dtype": "fp16"})),
    "bfloat16": (("tome", {"r": 3}), ("precision", {"dtype": "bf16"})),
    "packed": (("weight_only", {"bits": 8, "kernel": "packed"}),),
    "int8": (("tome", {"r": 3}), ("dynamic_int8", {})),
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(model: nn.Module) -> Callable[[int], Tensor]:
    def logits(batch: int) -> Tensor:
        with torch.inference_mode():
            return model(images(batch))

    return logits


def kept(model: nn.Module) -> bytes:
    return parity.probe([logits_of(model)(batch) for batch in parity.BATCHES], CPU, b"")


def compare(data: bytes, model: nn.Module) -> parity.Parity:
    return parity.compare(data, model, logits_of(model), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_artefact_is_exact_here(kind: str, tmp_path: Path) -> None:
    model, steps = compress(*KINDS[kind])
    save(model, tmp_path, steps)
    found = compare(kept(model), artefact.load(tmp_path))
    assert found == parity.Parity(0.0, True, 0.0, 0, ())
    assert found.for_row() == {"parity_max_abs": 0.0, "parity_exact": True, "parity_tolerance": 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_the_arithmetic_is_read_from_the_model(kind: str, tmp_path: Path) -> None:
    model, steps = compress(*KINDS[kind])
    save(model, tmp_path, steps)
    expected = "bfloat16" if kind == "packed" else kind
    assert parity.arithmetic(model) == parity.arithmetic(artefact.load(tmp_path)) == expected
    assert parity.arithmetic(model, [{"tf32": True}, {}]) == ("tf32" if expected == "float32" else expected)


def test_the_last_bit_of_one_weight_is_a_mismatch() -> None:
    model, _ = compress()
    data = kept(model)
    with torch.no_grad():
        head: Any = model.get_submodule("head")
        head.bias[3] = torch.nextafter(head.bias[3], torch.tensor(9.0)) + 1e-7
    with pytest.raises(parity.ArtefactMismatch, match=r"under the same conditions; they must be equal"):
        compare(data, model)


def test_another_number_of_threads_is_another_condition() -> None:
    model, _ = compress()
    data = kept(model)
    torch.set_num_threads(2)
    found = compare(data, model)
    assert not found.exact
    assert found.because == ("threads",)
    assert found.max_abs <= found.tolerance < 1e-2
    assert found.for_row()["parity_because"] == ["threads"]
    assert found.for_row()["parity_argmax_changed"] == 0


def test_under_other_conditions_a_wrong_model_is_still_refused() -> None:
    model, _ = compress(("precision", {"dtype": "bf16"}))
    data = kept(model)
    torch.set_num_threads(2)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_parameter("head.bias")[0] += 0.5
    with pytest.raises(parity.ArtefactMismatch, match=r"other conditions \(threads\); at most"):
        compare(data, wrong)


OTHER = """
import json, sys, torch
from pathlib import Path
from tests.workers.artefact.test_parity import compare
from workers import artefact
torch.set_num_threads(1)
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    result = compare((folder / "probe").read_bytes(), artefact.load(folder))
    found[folder.name] = [result.max_abs, result.tolerance, result.exact, result.because]
print(json.dumps(found))
"""


def test_other_instructions_stay_within_the_tolerance(tmp_path: Path) -> None:
    """Libraries held to AVX2 stand for another machine; where there is nothing wider the kernels are the same ones."""
    for kind, chain in KINDS.items():
        model, steps = compress(*chain)
        save(model, tmp_path / kind, steps)
        (tmp_path / kind / "probe").write_bytes(kept(model))
    root = ROOT
    held = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
    environment = {**os.environ, **held, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == KINDS.keys()
    wider = torch.backends.cpu.get_cpu_capability() == "AVX512"
    for kind, (max_abs, tolerance, exact, because) in found.items():
        assert max_abs <= tolerance
        assert not exact
        assert "environment" in because
        assert ("cpu_capability" in because) == wider
        assert tolerance > 0, kind
    if wider:
        assert any(max_abs > 0 for max_abs, *_ in found.values())


class Noisy(nn.Module):
    """Stands for kernels that add in no fixed order."""

    def __init__(self, model: nn.Module, spread: float) -> None:
        super().__init__()
        self.model, self.spread = model, spread

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.spread * torch.randn(())


def test_a_model_that_does_not_repeat_itself_has_the_tolerance() -> None:
    model, _ = compress()
    torch.manual_seed(0)
    found = compare(kept(model), Noisy(model, 1e-6))
    assert found.because == ("repeats",)
    assert not found.exact
    assert 0 < found.max_abs <= found.tolerance
    with pytest.raises(parity.ArtefactMismatch, match="repeats"):
        compare(kept(model), Noisy(model, 1.0))


def test_what_adds_in_no_order_on_cuda_is_seen() -> None:
    merging, _ = compress(("tome", {"r": 3}))
    plain, _ = compress(("nystrom", {"landmarks": 8}), ("weight_only", {"bits": 4}))
    assert parity.adds_unordered(lambda: logits_of(merging)(2))
    assert not parity.adds_unordered(lambda: logits_of(plain)(2))


def test_a_probe_of_nan_never_matches() -> None:
    model, _ = compress()
    data = parity.probe([torch.full((batch, 10), torch.nan) for batch in parity.BATCHES], CPU, b"")
    with pytest.raises(parity.ArtefactMismatch):
        compare(data, model)


def test_a_probe_without_conditions_is_one_of_other_conditions() -> None:
    from safetensors.torch import save as save_tensors

    model, _ = compress()
    found = compare(save_tensors({"logits": logits_of(model)(4)}), model)
    assert found.max_abs == 0
    assert not found.exact
    assert {"device", "torch", "threads"} <= set(found.because)


def test_conditions_are_plain_and_name_the_kernels() -> None:
    found = parity.kernel_conditions(CPU)
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == 1
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found == parity.kernel_conditions(CPU)
