"""What no machine, or not this one, could carry out, told from the file alone before anything slow is imported.

As in :mod:`orchestrator.study.faults`, the functions return faults with their path. Only what is certain is one: sizes are
estimated from below, and what cannot be seen of a machine is taken to be there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from orchestrator.study.constraints import DROPS, Constraint, parse
from orchestrator.study.yaml_lines import Fault
from orchestrator.words.units import format_value
from workers import model_settings, weight_names
from workers.metrics import METRICS

if TYPE_CHECKING:
    from orchestrator.study.model import ModelSection
    from orchestrator.study.schema import StudyConfig

_ELSEWHERE = "ask for less, or run it on a cluster with --address"

_BYTES_A_PARAMETER = {"adamw": 16, "sgd": 8}
"""While it is trained: float32 weight and gradient, and AdamW's two moments."""


_OURS = {"width": "embed_dim", "heads": "num_heads", "patch": "patch_size", "registers": "reg_tokens"}
"""Keys of ``create`` that timm calls otherwise."""

# --- constraints ------------------------------------------------------------------------------------------------------


def constraint_faults(constraints: tuple[Constraint, ...]) -> list[Fault]:
    """Judges whether any value of each metric keeps all constraints on it; the later of two that exclude each other is the fault."""
    faults = []
    for i, constraint in enumerate(constraints):
        for other in (
            *_natural(constraint.metric),
            *(str(c) for c in constraints[:i] if c.metric == constraint.metric),
        ):
            if _exclude(constraint, other):
                rule = f"must leave a value of {constraint.metric}: none also is {other.removeprefix(constraint.metric).strip()}"
                faults.append(Fault(f"constraints[{i}]", rule, str(constraint), "change or remove one"))
                break
    return faults


def _natural(metric: str) -> tuple[str, ...]:
    """Returns what holds of every value of a metric: shares have two ends, all else is no less than nothing."""
    if metric in DROPS:
        return (f"{metric} >= -100", f"{metric} <= 100")
    share = metric in METRICS and METRICS[metric].unit == "%"
    return (f"{metric} >= 0", f"{metric} <= 100") if share else (f"{metric} >= 0",)


def _exclude(one: Constraint, other: str) -> bool:
    two = parse(other)
    if one.op[0] == two.op[0]:
        return False
    low, high = (one, two) if one.op[0] == ">" else (two, one)
    met = low.op == ">=" and high.op == "<="
    return low.bound > high.bound or (low.bound == high.bound and not met)


# --- model ------------------------------------------------------------------------------------------------------------


def setting_faults(model: object) -> list[Fault]:
    """Judges what a model section hands to a constructor: ``options`` of a timm name, by the settings of its structure."""
    options = model.get("options") if isinstance(model, Mapping) else None
    if (
        not isinstance(model, Mapping)
        or model.get("family", "timm") not in ("timm", "hf_vit")
        or not isinstance(options, Mapping)
    ):
        return []
    faults, known = [], model_settings.SETTINGS["timm"]
    for key, value in options.items():
        where = f"model.options.{key}"
        if key not in known:
            near = model_settings.nearest("timm", key)
            remedy = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
            faults.append(Fault(where, "must be a setting of a model's structure", value, remedy))
        elif rule := known[key].rule(value):
            faults.append(Fault(where, rule, value, "see search_spaces/README.md"))
    return faults


def key_map_faults(model: object) -> list[Fault]:
    """Judges the rules of ``key_map`` by themselves; what they match is seen once the weights are read."""
    rules = model.get("key_map") if isinstance(model, Mapping) else None
    faults = []
    for expression, target in rules.items() if isinstance(rules, Mapping) else ():
        if isinstance(expression, str) and (found := weight_names.rule_fault(expression, target)):
            faults.append(Fault(f"model.key_map.{expression}", found[0], target, found[1]))
    return faults


def size_faults(model: object) -> list[Fault]:
    """Judges sizes in ``create`` that no model has, on whatever machine."""
    create = model.get("create") if isinstance(model, Mapping) else None
    family = str(model.get("family", "timm")) if isinstance(model, Mapping) else ""
    if not isinstance(create, Mapping) or family not in model_settings.SETTINGS:
        return []
    faults, known = [], model_settings.SETTINGS[family]
    for key, value in create.items():
        setting = known.get(_OURS.get(key, str(key)) if family == "timm" else key)
        high = getattr(setting, "high", None)
        if high is not None and isinstance(value, int | float) and value > high:
            rule = f"must be at most {high:,.15g}"
            faults.append(Fault(f"model.create.{key}", rule, value, "no vision transformer is that large"))
    return faults


def least_parameters(model: ModelSection) -> int:
    """Returns a number that a model's parameters are no fewer than: attention and MLP of the blocks that its settings name."""
    found = {
        key: value for key, value in model.settings().items() if isinstance(value, int | float)
    }  # others are told elsewhere

    def layers(width: str, depth: str, streams: int = 1, attentions: int = 1) -> int:
        c, ratio = int(found.get(width, 1)), float(found.get("mlp_ratio", 1))
        return streams * int(found.get(depth, 1)) * int((4 * attentions + 2 * ratio) * c * c)

    if model.family == "meter":
        return (
            layers("embed_dim", "cross_depth", streams=2, attentions=2)
            + layers("text_dim", "text_depth")
            + layers("image_dim", "image_depth")
        )
    return layers("embed_dim", "depth")


# --- this machine -----------------------------------------------------------------------------------------------------


def machine_faults(study: StudyConfig, params: int | None = None) -> list[Fault]:
    """Judges what the study asks of the machine that runs it, where that is this one.

    More CPUs than there are is none: a trial then has all of them.

    Args:
        params: of the model; None takes :func:`least_parameters`.
    """
    faults, wanted = [], study.resources
    gpus, memory = _gpus(), psutil.virtual_memory().total
    if gpus is not None and wanted.gpus > gpus:
        rule = f"must be at most what this machine has: {gpus} GPUs that can be used"
        faults.append(Fault("resources.gpus", rule, wanted.gpus, _ELSEWHERE))
    if wanted.memory is not None and wanted.memory > memory:
        rule = f"must be at most what this machine has: {format_value('memory_bytes', memory)}"
        faults.append(Fault("resources.memory", rule, wanted.memory, _ELSEWHERE))
    params = least_parameters(study.model) if params is None else params
    training = study.training.baseline
    each = 4 if not study.model.train or study.device != "cpu" else _BYTES_A_PARAMETER[training.optimizer]
    if params * each > memory:
        doing = "train" if each > 4 else "hold"
        rule = (
            f"must fit this machine's memory of {format_value('memory_bytes', memory)}: {params:,} parameters or more take "
            f"{format_value('memory_bytes', params * each)} to {doing}"
        )
        faults.append(Fault("model", rule, _named(study.model), "make it smaller, or run it elsewhere with --address"))
    return faults


def _named(model: ModelSection) -> dict[str, Any]:
    return {k: v for k, v in {"name": model.name, **model.settings()}.items() if v is not None}


def _gpus() -> int | None:
    """Returns how many GPUs a process may see here, None where that cannot be told without a driver's library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [one for one in visible.split(",") if one.strip()]
        return 0 if not chosen or chosen[0].strip() in ("-1", "NoDevFiles") else len(chosen)
    nodes = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    if nodes:
        return len(nodes)
    other = any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
    return None if other else 0
