"""Exports an artefact: its own files, a program of ``torch.export``, or ONNX; each is loaded back and compared.

The batch size of an exported program is free, its image size is not. Images and logits are float32 whatever the weights are.
Both programs are freed of the traces that the exporters leave (source lines with the paths of this machine, sample images):
they are no part of the model and up to half of a small file.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers import artefact, tasks
from workers.artefact.export_formats import ExportFailed, ExportFormat, ExportRefused, refusal
from workers.artefact.parity import arithmetic
from workers.inputs import Inputs
from workers.node.storage import LocalStorage

BATCHES = (8, 3, 1)
"""Images a call when an export is compared: several sizes, so that a batch size that was fixed by mistake shows."""

EXACT, FLOAT32, HALF = 0.0, 1e-3, 0.02
"""Largest difference of a logit that is allowed, as a share of the largest logit: an artefact is the same computation; another
runtime adds float32 up in another order (1.4e-6 seen in 12 blocks, 7e-5 where that decided which tokens are merged); 16-bit
types have 8 or 11 significant bits (2.7e-3 seen for fp16)."""

PROGRAM, ONNX = "model.pt2", "model.onnx"

INPUT, OUTPUT = "images", "logits"
"""Names of the ONNX file's input and output."""

INPUT_SEED = 0

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Run = Callable[[Any], Tensor]


# --- images to compare on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What an export is compared on.

    Attributes:
        values: (N, C, H, W) float32, normalised; Inputs of a vision-language model.
        origin: what they are, for a person.
        class_names: of the data, in the order of the logits; None where the data could not be read.
        fault: why it could not be read.
    """

    values: Tensor | Inputs
    origin: str
    class_names: tuple[str, ...] | None = None
    fault: str | None = None


def search_images(data: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> Images:
    """Returns images of a study's search split, or noise in their shape where the data cannot be read here.

    Only these few are decoded: mean and deviation are the artefact's own.

    Args:
        data: the context's data section.
        preprocessing: of the artefact's manifest: ``image_size, in_chans, mean, std``.
    """
    wanted = sum(BATCHES)
    limits = {"train_limit": 1, "search_limit": min(wanted, data.get("search_limit") or wanted), "report_limit": 1}
    try:
        task = tasks.load({**data, **limits, "mean": preprocessing["mean"], "std": preprocessing["std"]})
    except (tasks.TaskError, OSError) as error:
        side = preprocessing["image_size"]
        generator = torch.Generator().manual_seed(INPUT_SEED)
        values = torch.randn(wanted, preprocessing["in_chans"], side, side, generator=generator)
        # Without the reason, which names folders: this text is published with the model.
        noise = f"standard normal noise, seed {INPUT_SEED}, since the study's data could not be read"
        return Images(values, noise, fault=str(error))
    _, images, _ = next(task.search.batches(wanted))
    return Images(images, "search split of the study", task.info.class_names)


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """How an export compares with its artefact over several batches.

    Attributes:
        inputs: what the images are; batches: images of each call.
        largest_difference: of two logits; largest_logit: the artefact's largest by magnitude.
        tolerance: share of the largest logit that the difference may be; 0 asks for equal bits.
        top1_differing: images whose predictions differ.
    """

    inputs: str
    batches: tuple[int, ...]
    largest_difference: float
    largest_logit: float
    tolerance: float
    top1_differing: int

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; false for a NaN."""
        return self.largest_difference <= self.tolerance * self.largest_logit

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {**asdict(self), "batches": list(self.batches)}


def compare(reference: Run, exported: Run, images: Images, tolerance: float) -> Parity:
    """Runs both on the same batches of sizes :data:`BATCHES`; too few images are used again."""
    difference = largest = 0.0
    differing = start = 0
    with torch.inference_mode():
        for size in BATCHES:
            batch = images.values[torch.arange(start, start + size) % len(images.values)]
            start += size
            expected, found = reference(batch), exported(batch)
            if found.shape != expected.shape:
                raise ValueError(f"a batch of {size} gives {tuple(found.shape)}, must be {tuple(expected.shape)}")
            gaps = (found.double() - expected.double()).abs()
            difference = max(difference, float(gaps.max())) if gaps.isfinite().all() else float("nan")
            largest = max(largest, float(expected.abs().max()))
            differing += int((found.argmax(1) != expected.argmax(1)).sum())
    return Parity(images.origin, BATCHES, difference, largest, tolerance, differing)


# --- writing ----------------------------------------------------------------------------------------------------------


def write(source: str | Path, format_: ExportFormat, folder: Path, images: Images) -> Parity:
    """Exports the artefact at ``source`` into an existing folder and compares what was written, loaded back, with it.

    Args:
        source: folder or URL of an object store of the artefact.

    Raises:
        ExportRefused: the format cannot carry this artefact, or a package is missing.
        ExportFailed: the exporter or the runtime gave up, or the comparison exceeds the tolerance.
        ArtefactError: the artefact is damaged.
    """
    found = artefact.manifest(source)
    steps = found["steps"]
    reason = refusal(format_, steps, found["model"]["family"])
    if reason:
        raise ExportRefused(reason)
    if format_ is ExportFormat.onnx:
        _require_packages()
    reference = artefact.load(source)
    tolerance = EXACT if format_ is ExportFormat.artefact else _tolerance(reference)
    try:
        with _quiet():
            exported = _WRITERS[format_](str(source), folder, images.values[: BATCHES[0]])
            parity = compare(reference, exported, images, tolerance)
    except artefact.ArtefactError:
        raise
    except Exception as error:  # exporters and runtimes raise anything
        names = " + ".join(step["technique"] for step in steps) or "the uncompressed model"
        raise ExportFailed(
            f"--format {format_} did not work for {names}: {_root_cause(error)}; use --format artefact"
        ) from error
    if not parity.holds:
        raise ExportFailed(
            f"--format {format_}: logits must be within {tolerance:g} of the largest one of the artefact, "
            f"{parity.largest_logit:.4g}; they differ by {parity.largest_difference:.3g} ({parity.top1_differing} of "
            f"{sum(BATCHES)} predictions differ); use --format artefact"
        )
    return parity


def _write_artefact(source: str, folder: Path, example: Tensor | Inputs) -> Run:
    artefact.save_to(LocalStorage(folder), "", artefact.files(source))
    return artefact.load(folder)


def _write_program(source: str, folder: Path, example: Tensor) -> Run:
    # A model of its own: tracing leaves stand-ins in kernels' packings. Packed for this CPU beforehand, the weights would
    # be stored in the layout of its instruction set (int4 made with AVX-512 and run with AVX2 was off by 100 %).
    traced = artefact.load(source)
    program = torch.export.export(traced, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    program.example_inputs = None
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
    torch.export.save(program, folder / PROGRAM)
    module: nn.Module = torch.export.load(folder / PROGRAM).module()
    return module


def _write_onnx(source: str, folder: Path, example: Tensor) -> Run:
    import onnxruntime
    from onnxscript.optimizer import optimize_ir

    traced = artefact.load(source)
    program: Any = torch.onnx.export(
        traced,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        custom_translation_table=_translations(),
        optimize=False,
    )
    optimize_ir(program.model, should_fold=_keeps_weights_packed)
    for part in (*program.model.graph, *program.model.graph.initializers.values()):
        part.metadata_props.clear()
    program.save(folder / ONNX, external_data=False)  # above 2 GB, the limit of a protocol buffer, it writes two files
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; they come as exceptions too
    session = onnxruntime.InferenceSession(folder / ONNX, options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: batch.numpy()})[0])

    return run


def _translations() -> dict[Any, Callable[..., Any]]:
    """Returns ONNX forms of two operators that the exporter lacks or gets wrong (torch 2.15, onnxscript 0.7)."""
    import onnxscript

    op: Any = onnxscript.opset18

    def stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # TopK of all; it is stable: "the element with the lower index will appear first".
        length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)

    def right_shift(x: Any, bits: Any) -> Any:
        # Of unsigned numbers only, which packed weights are; the exporter's own form makes them signed.
        return op.BitShift(x, op.CastLike(bits, x), direction="RIGHT")

    return {torch.ops.aten.sort.stable: stable_sort, torch.ops.aten.__rshift__.Scalar: right_shift}


def _keeps_weights_packed(node: Any) -> bool | None:
    """Returns False for what would be calculated from packed weights beforehand, and so stored unpacked."""
    from onnxscript.ir import DataType

    packed = any(value is not None and value.dtype in (DataType.INT8, DataType.UINT8) for value in node.inputs)
    return False if packed else None


_WRITERS: Mapping[ExportFormat, Callable[[str, Path, Any], Run]] = {
    ExportFormat.artefact: _write_artefact,
    ExportFormat.torch_export: _write_program,
    ExportFormat.onnx: _write_onnx,
}


def _tolerance(model: nn.Module) -> float:
    return FLOAT32 if arithmetic(model) == "float32" else HALF


def _require_packages() -> None:
    for name in _ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportRefused(
                f"--format onnx needs the packages {', '.join(_ONNX_PACKAGES)}: {error}; "
                "install them with: pip install 'vitpareto[export]'"
            ) from error


def _root_cause(error: BaseException) -> str:
    """Returns the first line of the exception that started it, without terminal colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:400] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what exporters print, log, and warn about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            yield
    finally:
        logging.disable(before)
