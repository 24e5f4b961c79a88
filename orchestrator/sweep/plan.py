"""What a study would run, said before it runs: techniques, space, exclusions, resources, time. Starts no Ray."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.ledger import Ledger
from orchestrator.ledger.studies import find_storage
from orchestrator.study.load import StudyRefused, check_measurable, check_runs_here, check_same_study
from orchestrator.study.schema import StudyConfig, model_info
from orchestrator.study.space import SearchSpace
from orchestrator.study.weights import weights_notes
from orchestrator.words.units import format_seconds, format_value
from workers.node.storage import Storage
from workers.tasks import IMAGES, KINDS

if TYPE_CHECKING:
    from workers.model_info import ModelInfo
    from workers.tasks.description import DataDescription


def describe_plan(config: StudyConfig, storage: str, *, here: bool = False, landscape: bool = False) -> Iterator[str]:
    """Yields the lines of a plan.

    Args:
        here: whether trials are to run on this machine, which must then have room for the model.
        landscape: whether to say how large the models would be, which takes from seconds to a minute.

    Raises:
        TaskError, ModelError, OSError: the data or the model cannot be read.
        StudyRefused: it would not run, which is said after what can be said of it.
    """
    store = find_storage(storage)
    context = config.context()
    info = model_info(context)
    described = describe_data(context.data)
    notes = weights_notes(config, context)
    check_measurable(config, info)
    if here:
        check_runs_here(config, info.params)
    space = SearchSpace(config.techniques, info, max_techniques=config.max_techniques)
    yield f"study {config.name}: {config.trials} recipes towards {_objectives(config)}"
    yield _model_line(config, info)
    yield from data_lines(described)
    for note in notes:
        yield f"  weights: {note}"
    yield from _space_lines(config, space)
    for text in config.constraints:
        yield f"constraint: {text}"
    if landscape and space.size():
        from orchestrator.sweep import landscape as looked  # imports torch

        yield from looked.lines(looked.look(config, context, space, store), config.parsed_constraints())
    yield from _resource_lines(config)
    if space.size() == 0:
        raise StudyRefused(
            f"study {config.name}: none of its techniques can work on {info.name}, for the reasons above"
        )
    done, seconds = _finished_before(config, context.digest, store)
    yield _time_line(config, done, seconds)


def _model_line(config: StudyConfig, info: ModelInfo) -> str:
    task, tokens = KINDS[config.data.kind].task, f"{info.num_tokens} tokens"
    blocks, classes = "blocks", f"{info.num_classes} classes"
    if task != IMAGES:
        text = info.num_text_tokens
        tokens = f"up to {text} text and {info.num_tokens - text} image tokens"
        blocks = "layers over both modalities"
        classes = f"{task}, " + {"vqa": f"{info.num_classes} answers", "retrieval": "a score a pair"}.get(task, classes)
    return (
        f"model {info.name}: {info.depth} {blocks} of width {info.embed_dim}, {tokens}, {info.params:,} parameters; "
        f"data {config.data.kind}, {classes}"
    )


def describe_data(data: Mapping[str, Any]) -> DataDescription:
    """Returns what a context's data is; see :func:`workers.tasks.describe`."""
    from workers import tasks  # imports torch

    return tasks.describe(data)


def data_lines(found: DataDescription) -> Iterator[str]:
    """Yields what is to be said of the data: its splits, its images, what is done to them, and warnings."""
    for split in found.splits:
        examples = f"{split.examples:,} examples with {split.images:,} pictures"
        line = f"  {split.name}: " + (f"{split.images:,} images" if found.info.task == IMAGES else examples)
        if split.classes:
            (rarest, fewest), (commonest, most) = (f(split.classes.items(), key=lambda one: one[1]) for f in (min, max))
            line += (
                f" of {len(split.classes):,} classes; rarest {rarest!r} {fewest:,}, commonest {commonest!r} {most:,}"
            )
        yield line
    sizes = _counts({f"{height}x{width}": count for (height, width), count in found.sizes.items()})
    yield f"  images: {sizes} pixels, {_counts(found.modes)}; the model sees {found.info.image_size}x{found.info.image_size}x{found.info.in_chans}"
    low, mean, high = found.values
    yield f"  decoded as a sample: {found.sample:,}, values from {low:g} to {high:g}, mean {mean:.1f}"
    yield from (f"  {note}" for note in found.notes)
    yield from (f"  warning: {warning}" for warning in found.warnings)


def _counts(found: Mapping[str, int]) -> str:
    """Returns the three most frequent with their numbers, and how many others there are."""
    if len(found) == 1:
        return next(iter(found))
    some = ", ".join(f"{name} ({count:,})" for name, count in list(found.items())[:3])
    return some + (f" and {len(found) - 3:,} more" if len(found) > 3 else "")


def _objectives(config: StudyConfig) -> str:
    return ", ".join(f"{name} ({direction})" for name, direction in config.objectives.items())


def _space_lines(config: StudyConfig, space: SearchSpace) -> Iterator[str]:
    size = space.size()
    fewer = f"; the study ends with them, before its {config.trials} trials" if 0 < size < config.trials else ""
    yield f"search space: {size:,} recipes of up to {config.max_techniques} techniques{fewer}"
    rejected = space.count_infeasible()
    if rejected:
        yield f"  {rejected:,} of them cannot be carried out on this model and are never run"
    for name, parameters in config.techniques.items():
        searched = ", ".join(f"{p} {_domain(d)}" for p, d in parameters.items())
        yield f"  {name}: {searched or 'no parameters'}"
    yield from _excluded(space)
    yield f"enqueued first: {len(config.recipes)} known-good recipes; then sampler {config.sampler.name}"


def _excluded(space: SearchSpace) -> Iterator[str]:
    """One line a reason: three examples are enough of a rule that forbids every pair of a family; then what is left in part."""
    by_reason: dict[str, list[str]] = {}
    for names, reason in space.excluded():
        what = " + ".join(names)
        by_reason.setdefault(reason.removeprefix(f"{what}: "), []).append(what)
    for reason, found in by_reason.items():
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield f"  excluded: {', '.join(found[:3])}{more}: {reason}"
    for part in space.hindered():
        share = part.infeasible / part.tried
        yield f"  excluded in part: {part.technique}, {share:.0%} of its configs, most of them as this one: {part.reason}"


def _domain(domain: Any) -> str:
    if isinstance(domain, dict):
        return f"{domain['low']:g}..{domain['high']:g} step {domain['step']:g}"
    values = domain if isinstance(domain, list) else [domain]
    return str(values[0]) if len(values) == 1 else "{" + ", ".join(map(str, values)) + "}"


def _resource_lines(config: StudyConfig) -> Iterator[str]:
    resources = config.resources
    each = f"{resources.cpus} CPU" + (f", {resources.gpus:g} GPU" if resources.gpus else "")
    if resources.memory is not None:
        each += f", {format_value('memory_bytes', resources.memory)} memory"
    at_once = resources.max_concurrent or max(1, (os.cpu_count() or 1) // resources.cpus)
    yield f"each trial: {each}; at most {at_once} at once on this machine; seeds {config.seeds}"


def _finished_before(config: StudyConfig, context: str, store: Storage) -> tuple[int, list[float]]:
    """Returns how many trials of the study the storage holds and how long the ones that worked took."""
    ledger = Ledger(store, config.name)
    stored = ledger.study_record()
    if stored is None:
        return 0, []
    check_same_study(config, stored["config"], ledger.folder)
    rows = ledger.trials(["context", "status", "duration_s", "is_baseline"]).to_pylist()
    mine = [r for r in rows if r["context"] == context and not r["is_baseline"]]
    return len(mine), [r["duration_s"] for r in mine if r["status"] == "ok"]


def _time_line(config: StudyConfig, done: int, seconds: list[float]) -> str:
    limit = "" if config.budget.time is None else f"; none is started after {format_seconds(config.budget.time)}"
    at_once = config.resources.max_concurrent or max(1, (os.cpu_count() or 1) // config.resources.cpus)
    left = max(0, config.trials - done)
    if seconds:
        each = sum(seconds) / len(seconds)
        return f"time: {done} trials are done, {left} are left: about {format_seconds(each * left / at_once)}{limit}"
    if config.budget.trial_timeout is None:
        return f"time: not known before the first trials{limit}"
    longest = config.budget.trial_timeout * len(config.seeds) * math.ceil(left / at_once)
    timeout = format_seconds(config.budget.trial_timeout)
    return f"time: at most {format_seconds(longest)} (every trial at its timeout of {timeout}){limit}"


def technique_rows() -> list[dict[str, Any]]:
    """Returns one mapping a technique: name, family, stage, version, source, and its parameters with range and default."""
    from workers.techniques import registry  # imports torch
    from workers.techniques.record import Options

    rows = []
    for technique in registry().values():
        parameters = []
        for field in dataclasses.fields(technique.Config):
            domain = field.metadata["domain"]
            known: dict[str, Any] = {"name": field.name, "default": field.default, "doc": field.metadata["doc"]}
            if isinstance(domain, Options):
                known |= {"values": list(domain.values), "searched": list(domain.search)}
            else:
                known |= {
                    "range": {"low": domain.low, "high": domain.high, "step": domain.step},
                    "searched": {"low": domain.search_low, "high": domain.search_high, "step": domain.search_step},
                }
            parameters.append(known)
        rows.append(
            {
                "name": technique.name,
                "family": technique.family,
                "stage": technique.stage,
                "version": technique.version,
                "models": list(technique.models),
                "source": technique.source,
                "parameters": parameters,
            }
        )
    return rows


def technique_lines() -> list[dict[str, Any]]:
    """Returns one mapping a parameter, as people read it: what is searched, unless a study says otherwise, and the default."""
    return [
        {
            "technique": technique["name"],
            "family": technique["family"],
            "parameter": parameter["name"],
            "searched": _domain(parameter["searched"]),
            "default": str(parameter["default"]),
            "meaning": parameter["doc"],
        }
        for technique in technique_rows()
        for parameter in technique["parameters"] or [{"name": "-", "searched": [""], "default": "", "doc": ""}]
    ]
