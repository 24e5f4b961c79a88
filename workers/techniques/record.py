"""What a technique is: one record of functions, and configs whose fields carry their ranges.

A technique is one file that ends in ``TECHNIQUE = Technique(...)``. Wide enough for techniques that change structure, add
losses, learn gates, calibrate, or pack; a technique leaves out what it does not need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workers.model_info import ModelInfo as ModelInfo  # handed on: what a technique judges by
from workers.techniques.families import Family as Family
from workers.techniques.families import Rule as Rule

if TYPE_CHECKING:
    import torch
    from torch import nn

    Batches = Callable[[], Iterator[tuple[Any, torch.Tensor]]]

# --- parameters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """A number from ``low`` to ``high`` inclusive on a grid of ``step``; ``search_*`` is the part a study searches by default."""

    low: float
    high: float
    step: float
    search_low: float
    search_high: float
    search_step: float

    def fault(self, value: object) -> str | None:
        """Returns why ``value`` is not allowed, or None."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"must be a number from {self.low:g} to {self.high:g}"
        if not self.low <= value <= self.high:
            return f"must be from {self.low:g} to {self.high:g}"
        steps = (value - self.low) / self.step
        if abs(steps - round(steps)) > 1e-6:
            return f"must be {self.low:g} plus a multiple of {self.step:g}"
        return None


@dataclass(frozen=True)
class Options:
    """One of ``values``, or what ``others`` has nothing against; ``search`` is the part a study searches by default."""

    values: tuple[Any, ...]
    search: tuple[Any, ...]
    others: Callable[[object], str | None] | None = None

    def fault(self, value: object) -> str | None:
        """Returns why ``value`` is not allowed, or None."""
        if any(value == v and type(value) is type(v) for v in self.values):
            return None
        return self.others(value) if self.others else "must be one of " + ", ".join(map(repr, self.values))


def number(
    default: float, low: float, high: float, step: float, *, search: tuple[float, float, float] | None = None, doc: str
) -> Any:
    """A numeric field of a Config: its default, its allowed range and grid, and the part searched by default.

    Args:
        search: (low, high, step) searched where the study names no range; None searches the whole range. A range whose
            low equals its high is not searched: the default stands.
        doc: one line with the unit.
    """
    s = search or (low, high, step)
    return field(default=default, metadata={"domain": Range(low, high, step, *s), "doc": doc})


def choice(
    default: object,
    values: tuple[Any, ...],
    *,
    search: tuple[Any, ...] | None = None,
    others: Callable[[object], str | None] | None = None,
    doc: str,
) -> Any:
    """A field of a Config that takes one of ``values``.

    Args:
        search: the part searched by default; None for all.
        others: says why a value that is not listed is not allowed, or None where it is; without it none is.
        doc: one line.
    """
    options = Options(values, values if search is None else search, others)
    return field(default=default, metadata={"domain": options, "doc": doc})


def domains(config: type) -> dict[str, Range | Options]:
    """Returns the domain of every field of a Config class."""
    return {f.name: f.metadata["domain"] for f in dataclasses.fields(config)}


def defaults(config: type) -> dict[str, Any]:
    """Returns the default of every field of a Config class."""
    return {f.name: f.default for f in dataclasses.fields(config)}


def config_faults(config: type, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (field, rule that it breaks) for every fault of ``values``; unknown fields are faults."""
    known = domains(config)
    faults = [(k, f"unknown parameter; known: {', '.join(known)}") for k in values if k not in known]
    for name, value in values.items():
        if name in known and (fault := known[name].fault(value)):
            faults.append((name, fault))
    return faults


def make_config(config: type, values: Mapping[str, Any]) -> Any:
    """Builds a Config; raises ValueError that lists every fault."""
    faults = config_faults(config, values)
    if faults:
        raise ValueError("; ".join(f"{name}: {rule} (got {values[name]!r})" for name, rule in faults))
    return config(**values)


# --- what a technique sees --------------------------------------------------------------------------------------------


@dataclass
class Surroundings:
    """What a technique may use while it changes a model. Training images only: no search or report image is in reach.

    Attributes:
        device: where the model lies.
        seed: of the trial; a technique draws from ``generator`` and from nothing else.
        batches: yields (images (B, C, H, W) float32 normalised, labels (B,) int64) on ``device``; call it for a fresh
            pass, in a fixed order that depends on the seed only. Of a vision-language task (Inputs, targets).
        teacher: builds the fine-tuned baseline in eval mode on ``device``.
        tick: call between chunks of work: honours the trial's deadline and lets a waiting measurement go first.
        once_a_study: (file name, make) -> what ``make`` returned the first time in this study, kept beside the baseline.
            ``make`` gets training images in an order that is the same for every trial. None outside a study.
    """

    device: torch.device
    seed: int
    generator: torch.Generator
    batches: Batches
    teacher: Callable[[], nn.Module]
    tick: Callable[[], None] = lambda: None
    once_a_study: Callable[[str, Callable[[Batches], bytes]], bytes] | None = None


@dataclass
class Applied:
    """What applying a technique did.

    Attributes:
        model: the changed model: the same object where it was changed in place, a new one for a student.
        resolved: plain JSON values from which ``rebuild`` makes the same structure without data: dimensions after
            pruning, layers replaced, schedules. Tensors belong in the model's state dict, not here.
        changed: names of the modules that changed; empty is an error (a technique that changed nothing).
    """

    model: nn.Module
    resolved: dict[str, Any]
    changed: list[str]


@dataclass
class LossInputs:
    """One training step as an extra loss sees it.

    Attributes:
        images: what the model took: (B, C, H, W), or Inputs of a vision-language model.
        logits: (B, classes) float32 of the model in training; targets: (B,) int64, for VQA (B, classes) shares.
            Where images are mixed, the label that an image had before; the task loss takes the mixed ones.
        teacher_logits: (B, classes) float32 of the same images, None unless a technique of the recipe needs the teacher.
        progress: share of the training done, 0 to 1.
        distil_logits: (B, classes) float32 of the distillation token where the model returns both tokens' logits apart;
            ``logits`` are then those of the class token.
        teacher: in eval mode; None unless a technique needs the teacher's model, or the images are augmented.
    """

    model: nn.Module
    images: Any
    logits: torch.Tensor
    targets: torch.Tensor
    teacher_logits: torch.Tensor | None
    progress: float
    distil_logits: torch.Tensor | None = None
    teacher: nn.Module | None = None


@dataclass
class LossTerm:
    """``task_weight`` scales the task loss, ``extra`` is added. Over several techniques weights multiply, extras add."""

    task_weight: float
    extra: torch.Tensor


# --- what goes together -----------------------------------------------------------------------------------------------

# --- the record -------------------------------------------------------------------------------------------------------


def _never(config: Any) -> bool:
    return False


def _no_reason(info: ModelInfo, config: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Technique:
    """One compression technique.

    Attributes:
        name: file name, YAML key, docs row and ledger value.
        family: name of one of :data:`workers.techniques.families.FAMILIES`, or of ``new_family``.
        version: raised when its results would change; part of the trial key.
        Config: frozen dataclass of fields made with :func:`number` and :func:`choice`; the only place a default lives.
        stage: ``surgery`` changes what is computed and comes before the joint recovery training; ``conversion`` changes
            how weights are stored or calculated and comes after it.
        apply: (model, config, surroundings) -> Applied. In place where it can be.
        rebuild: (model, resolved) -> model. Same structure on a skeleton (possibly on the meta device); no data, no
            training, no weights: the artefact's tensors are assigned afterwards with ``load_state_dict(assign=True)``.
            Modules that hold packed tensors store them through ordinary state-dict entries.
        check: (info, config) -> why it cannot be done on this model and device, or None.
        identity: config with which the technique must change nothing that is computed (None: it has none).
        trains: config -> this technique needs the recovery training.
        needs_teacher: config -> the training needs teacher logits.
        needs_teacher_model: config -> the training needs the teacher itself, for what is inside it.
        loss: (inputs, config) -> LossTerm, for the recovery training.
        parameter_groups: (model, config) -> extra optimiser groups (dicts for torch.optim) for parameters it added.
        on_progress: (model, config, progress) -> None, called before every training step (temperatures, annealing). What
            changes over a training and is no function of progress lies in parameters or buffers, and draws come from
            torch's global generator: a training that was killed goes on from these.
        finalise: (model, config) -> changes to merge into ``resolved``; after the training (cut by learned gates,
            fix learned widths).
        calibrate: (model, config, surroundings) -> None, after the model is converted, token reduction active.
        simulated: (config, device kind: ``cpu`` or ``cuda``) -> True where weights are really small but no kernel multiplies
            them so on such a device: no speed may be claimed.
        info_after: (info, config) -> info of the changed model, so that later steps are checked against it.
        foresee: (model, config, surroundings) -> what ``apply`` would resolve of a model without values, on the meta device, which
            it leaves as it is. For a technique whose ``apply`` asks for values (scales, ranges) that decide no dimension; for
            others ``apply`` itself tells, see :mod:`workers.techniques.foresight`.
        models: families of models that it works on, keys of :mod:`workers.models`; on others it is infeasible.
        new_family: the record of ``family`` where it is none of the built-in ones.
        rules: what it may not be combined with, and what it may in spite of a rule of its family.
        either_order: technique or family -> what differs, where both orders of the two are legal and compute different things.
        not_on: device kind, ``cpu`` or ``cuda`` -> why it cannot run there, whatever the config.
        source: paper, arXiv id, section.
    """

    name: str
    family: str
    version: int
    Config: type
    stage: str
    apply: Callable[[nn.Module, Any, Surroundings], Applied]
    rebuild: Callable[[nn.Module, Mapping[str, Any]], nn.Module]
    source: str
    check: Callable[[ModelInfo, Any], str | None] = _no_reason
    identity: Mapping[str, Any] | None = None
    trains: Callable[[Any], bool] = _never
    needs_teacher: Callable[[Any], bool] = _never
    needs_teacher_model: Callable[[Any], bool] = _never
    loss: Callable[[LossInputs, Any], LossTerm] | None = None
    parameter_groups: Callable[[nn.Module, Any], Iterable[dict[str, Any]]] | None = None
    on_progress: Callable[[nn.Module, Any, float], None] | None = None
    finalise: Callable[[nn.Module, Any], dict[str, Any]] | None = None
    calibrate: Callable[[nn.Module, Any, Surroundings], None] | None = None
    simulated: Callable[[Any, str], bool] = field(default=lambda config, device: False)
    info_after: Callable[[ModelInfo, Any], ModelInfo] = field(default=lambda info, config: info)
    foresee: Callable[[nn.Module, Any, Surroundings], dict[str, Any]] | None = None
    models: tuple[str, ...] = ("timm",)
    new_family: Family | None = None
    rules: tuple[Rule, ...] = ()
    either_order: Mapping[str, str] = field(default_factory=dict)
    not_on: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.new_family is not None and self.new_family.name != self.family:
            raise ValueError(
                f"technique {self.name}: family {self.family!r} must be the name of new_family, {self.new_family.name!r}"
            )
        if self.stage not in ("surgery", "conversion"):
            raise ValueError(f"technique {self.name}: stage must be surgery or conversion, got {self.stage!r}")
