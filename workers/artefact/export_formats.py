"""Export formats, and which techniques each of them cannot carry: data that imports no torch."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


class ExportFormat(enum.StrEnum):
    """What an artefact can be exported as."""

    artefact = "artefact"
    torch_export = "torch-export"
    onnx = "onnx"


class ExportRefused(Exception):
    """This cannot be exported so; the message says why and what to do instead."""


class ExportFailed(Exception):
    """The export did not work, or its file does not compute what the artefact does."""


@dataclass(frozen=True)
class Refusal:
    """A format does not carry a technique, or some settings of it.

    Attributes:
        settings: values of the step's resolved structure that are meant; empty for all.
        reason: what stands against it, as seen with torch 2.15, onnxscript 0.7 and onnxruntime 1.31.
        remedy: what to do instead.
    """

    format: ExportFormat
    technique: str
    reason: str
    remedy: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, format_: ExportFormat, technique: str, resolved: Mapping[str, Any]) -> bool:
        """Whether it speaks of this step."""
        same = format_ is self.format and technique == self.technique
        return same and all(resolved.get(k) == v for k, v in self.settings.items())


REFUSALS = (
    Refusal(
        ExportFormat.torch_export,
        "dynamic_int8",
        "torch.export takes no packed quantised weights, and PyTorch's dynamic int8 kernel takes no others",
        "use --format artefact, or a recipe with weight_only",
    ),
    Refusal(
        ExportFormat.onnx,
        "dynamic_int8",
        "the exporter has no translation of PyTorch's dynamic int8 kernel, which rounds activations to 7 bits where "
        "ONNX's own operator takes 8, so the file would compute something else",
        "use --format artefact, or a recipe with weight_only, whose int8 weights ONNX carries",
    ),
    Refusal(
        ExportFormat.onnx,
        "weight_only",
        "ONNX has no operator for PyTorch's packed kernels",
        "use --format torch-export or artefact; or a recipe with kernel dequantise, which stores the same weights",
        {"kernel": "packed"},
    ),
    Refusal(
        ExportFormat.onnx,
        "precision",
        "onnxruntime has no bfloat16 convolution on the CPU, so the file could be neither run nor checked here",
        "use --format torch-export or artefact, or a recipe with precision(dtype=fp16)",
        {"dtype": "bf16"},
    ),
)


def refusal(format_: ExportFormat, steps: Iterable[Mapping[str, Any]], family: str = "timm") -> str | None:
    """Returns why ``format_`` cannot carry an artefact with these steps, and what to do, or None.

    Args:
        steps: of the manifest: ``technique`` and ``resolved``; family: of its model.
    """
    if family != "timm" and format_ is not ExportFormat.artefact:
        return (
            f"--format {format_} is for models of images alone so far: {family} takes texts with them, and its artefact is "
            "what can be loaded; use --format artefact"
        )
    faults = [
        f"{step['technique']}{_values(known.settings)}: {known.reason}; {known.remedy}"
        for step in steps
        for known in REFUSALS
        if known.matches(format_, step["technique"], step["resolved"])
    ]
    return f"--format {format_} cannot carry " + "\nand ".join(faults) if faults else None


def _values(settings: Mapping[str, Any]) -> str:
    return "(" + ", ".join(f"{k}={v}" for k, v in settings.items()) + ")" if settings else ""
