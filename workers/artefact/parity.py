"""Whether a reloaded artefact computes what was saved: its logits on a few images, kept with the conditions they were taken under.

Under the same conditions they must be equal bit for bit; under others they may differ by what rounding in another order makes
of them. Measured over every technique and every allowed pair of them (103 recipes; ViTs of width 16 and 64 on 8 px and of 192
on 224 px, batches of 1 to 16):

- The same process, another process, one to four threads: the reloaded model equals the packed one in every bit, always.
- Another number of threads than at saving moves the last bits of float32 products of small batches (up to 6e-7 of the largest
  logit); half precision, packed and int8 kernels give the same bits with any number.
- Another instruction set (oneDNN, MKL or ATen held to AVX2 on an AVX-512 machine) moves nearly all: see :data:`TOLERANCES`.
- Another batch moves dynamic int8, whose activation ranges are those of the batch, by up to 5 %; a probe is therefore always
  compared at its own batch sizes, and holds two of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from workers.node.conditions import cpu_flags, device_name, first_cpu
from workers.trial import canonical_json, digest

BATCHES = (16, 5)
"""Images a call: the first of the search split. Two sizes, since what depends on the batch shows at one only."""

TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 3e-2, "int8": 1e-1}
"""What a model calculates in, finest first, to the largest difference of a logit under other conditions, as a share of the largest logit.

The worst seen from AVX-512 to AVX2 (depth 3 and 12, merging and Nystrom attention included): float32 7e-7, float16 4e-3,
bfloat16 and packed kernels, whose factors are bfloat16, 1.1e-2, int8 activations 3.8e-2: a last bit of float32 moves an
activation to the next of 128 steps. The limits are about three times that; float32 has more, because a last bit may also
decide which tokens are merged. ``tf32`` is float32 with factors of 10 bits, cuDNN's default for the patch embedding."""

REPEATS = 3
"""Further runs that tell a model which does not repeat itself from a wrong one."""

ATOMIC = frozenset({"scatter_add", "scatter_reduce", "index_add", "index_reduce", "index_put", "_unsafe_index_put"})
"""Operations that are atomic additions on CUDA."""

_CPU_FIELDS = ("vendor_id", "cpu family", "model", "stepping", "cache size", "CPU implementer", "CPU part")
"""Lines of /proc/cpuinfo by which oneDNN and MKL choose kernels and block sizes, besides the vector instructions."""

_ENVIRONMENT = ("ATEN_", "CUBLAS", "CUDNN_", "DNNL_", "MKL_", "NVIDIA_TF32", "ONEDNN_", "TORCH_BLAS")
"""Starts of environment variables that hold libraries to other kernels."""


class ArtefactMismatch(Exception):
    """A reloaded artefact does not compute what was saved."""


@dataclass(frozen=True)
class Parity:
    """How a reloaded artefact compares with what was saved.

    Attributes:
        max_abs: largest difference of a logit.
        exact: equality of every bit was demanded and met.
        tolerance: largest difference that was allowed, in logits; 0 where equality was demanded.
        argmax_changed: predictions that differ, of :data:`BATCHES` summed up.
        because: why equality was not demanded: conditions that differ, or ``repeats`` for a model that does not repeat itself.
    """

    max_abs: float
    exact: bool
    tolerance: float
    argmax_changed: int
    because: tuple[str, ...]

    def for_row(self) -> dict[str, Any]:
        """Returns what a trial's row says of it."""
        row: dict[str, Any] = {
            "parity_max_abs": self.max_abs,
            "parity_exact": self.exact,
            "parity_tolerance": self.tolerance,
        }
        if self.because:
            row |= {"parity_because": list(self.because), "parity_argmax_changed": self.argmax_changed}
        return row


def probe(logits: Sequence[Tensor], device: torch.device, manifest: bytes) -> bytes:
    """Returns the file that keeps logits, (B, classes) float32 for each batch size, and the conditions of now.

    Args:
        manifest: of the artefact, as it is written; with the digests that the file also keeps, :func:`verify` tells damage.
    """
    named = {f"logits_{len(found)}": found for found in logits}
    conditions = {"conditions": canonical_json(kernel_conditions(device))}
    digests = {"sha256": _sha256(save_tensors(named, metadata=conditions)), "manifest_sha256": _sha256(manifest)}
    return save_tensors(named, metadata=conditions | digests)


def verify(data: bytes, manifest: bytes) -> str | None:
    """Says what is wrong with the file of :func:`probe`, or with the manifest that lies beside it; None where nothing is.

    Of a file without digests, which older versions wrote, only the form is checked.
    """
    try:
        tensors, notes = load_tensors(data), _notes(data)
    except (SafetensorError, ValueError) as error:
        return f"the file of its logits is damaged: {error}"
    if "sha256" not in notes:
        return None
    own = save_tensors(tensors, metadata={"conditions": notes.get("conditions", "")})
    if _sha256(own) != notes["sha256"]:
        return "the file of its logits is not what was saved: its SHA-256 differs from its own note"
    if _sha256(manifest) != notes["manifest_sha256"]:
        return "the manifest is not what was saved: its SHA-256 differs from the one noted beside its logits"
    return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def compare(data: bytes, model: nn.Module, logits_of: Callable[[int], Tensor], device: torch.device) -> Parity:
    """Compares a reloaded model with what :func:`probe` kept.

    Args:
        data: the kept file.
        logits_of: batch size -> logits (B, classes) float32 on the CPU, of the reloaded ``model``; finite.

    Raises:
        ArtefactMismatch: they differ by more than the conditions allow.
    """
    kept = load_tensors(data)
    saved = [kept[name] for name in sorted(kept)]
    found = [logits_of(len(tensor)) for tensor in saved]
    before, now = _kept_conditions(data), kernel_conditions(device)
    because = tuple(sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k)))
    max_abs = _difference(saved, found)
    if not because and max_abs and not _repeats(found, logits_of, device):
        because = ("repeats",)
    widest = max(float(tensor.abs().max()) for tensor in saved)
    share = TOLERANCES[arithmetic(model, (before, now))] if because else 0.0
    if not max_abs <= share * widest:  # so that NaN is a mismatch
        where = f"under other conditions ({', '.join(because)})" if because else "under the same conditions"
        allowed = f"at most {share * widest:.3g} is allowed" if because else "they must be equal"
        raise ArtefactMismatch(f"reloaded logits differ by {max_abs:.3g} from the saved ones {where}; {allowed}")
    pairs = zip(saved, found, strict=True)
    changed = sum(int((a.argmax(dim=1) != b.argmax(dim=1)).sum()) for a, b in pairs)
    return Parity(max_abs, not because, share * widest, changed, because)


def _difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def _repeats(found: Sequence[Tensor], logits_of: Callable[[int], Tensor], device: torch.device) -> bool:
    """Says whether a second run of one model gives the same bits here."""
    if device.type == "cuda" and adds_unordered(lambda: logits_of(len(found[0]))):
        return torch.are_deterministic_algorithms_enabled()
    return all(_difference(found, [logits_of(len(f)) for f in found]) == 0 for _ in range(REPEATS))


def adds_unordered(run: Callable[[], object]) -> bool:
    """Says whether ``run`` calls an operation that on CUDA adds in no fixed order, so that two runs of one model may differ.

    Those are single atomic additions (PyTorch's notes on reproducibility); token merging sums up with one of them.
    """
    with _Operations() as seen:
        run()
    return bool(seen.names & ATOMIC)


class _Operations(TorchDispatchMode):
    """Notes the names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def arithmetic(model: nn.Module, conditions: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns the coarsest arithmetic in a model, a name of :data:`TOLERANCES`.

    That is the type of a parameter, or what a module says of its own kernel by an attribute ``arithmetic``.

    Args:
        conditions: of the runs to be compared; with tf32 in one of them float32 counts as that.
    """
    found = {"tf32" if any(c.get("tf32") for c in conditions) else "float32"}
    found |= {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    found |= {str(getattr(module, "arithmetic", None)) for module in model.modules()}
    return [name for name in TOLERANCES if name in found][-1]


# --- conditions -------------------------------------------------------------------------------------------------------


def kernel_conditions(device: torch.device) -> dict[str, Any]:
    """Returns what decides which kernels run and in which order they add, as plain values."""
    found: dict[str, Any] = {
        "device": device.type,
        "device_name": device_name(device),
        "torch": str(torch.__version__),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": torch.get_float32_matmul_precision() != "highest",
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)},
    }
    if device.type == "cuda":
        backends: Any = torch.backends.cuda
        return found | {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "tf32": found["tf32"] or torch.backends.cudnn.allow_tf32,
            "attention": [
                name
                for name, allowed in (
                    ("flash", backends.flash_sdp_enabled()),
                    ("memory_efficient", backends.mem_efficient_sdp_enabled()),
                    ("cudnn", backends.cudnn_sdp_enabled()),
                    ("math", backends.math_sdp_enabled()),
                )
                if allowed
            ],
        }
    return found | {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": digest(_cpu()),
        "onednn": torch.backends.mkldnn.enabled,
        "quantised_engine": torch.backends.quantized.engine,
    }


def _cpu() -> dict[str, Any]:
    lines = first_cpu()
    return {k: lines[k] for k in _CPU_FIELDS if k in lines} | {"machine": platform.machine(), "flags": cpu_flags()}


def _notes(data: bytes) -> dict[str, str]:
    """Returns the metadata in the header of a safetensors file: 8 bytes of length, then JSON."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header.get("__metadata__", {}))


def _kept_conditions(data: bytes) -> dict[str, Any]:
    return dict(json.loads(_notes(data).get("conditions", "{}")))
