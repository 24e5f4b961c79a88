"""What is known of a model in numbers: one record a metric, from which everything derives that lists, names or sorts metrics.

Columns of the ledger, objectives and constraints, the statistics of the frontier, units, and what report and model card say are
made from :data:`METRICS`; only what measures a value names its metric again. Standard library only; imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["accuracy", "exact", "speed", "memory", "detail"]
"""What a metric's numbers are worth.

- ``accuracy``: per cent of a split's examples, with an interval over them (Wilson's; of VQA accuracy, a mean of shares, a normal
  one). Models are compared example by example; the distance to the baseline is in points: the metric ``<name>_drop``.
- ``exact``: a size or a count. It has no interval and must be equal wherever it is taken again.
- ``speed``: timed in turn with the strong baseline, hence a ratio to it, and comparable within one device kind only. Its interval is
  the larger of the bootstrap's and the device's noise (an A/A measurement in fresh processes); the uncompressed baseline's
  speed is the unit that the others are measured in and has none. A simulated quantisation may claim none.
- ``memory``: a ratio to the baseline on the same device, to the resolution of what tells it.
- ``detail``: told beside another metric; no objective, no interval.
"""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric; no field may be left out but the last.

    Attributes:
        name: key in a study's YAML and column of the ledger; its ending says the unit.
        direction: what is better; None: no study may have it as an objective.
        unit: ``%``, ``bytes``, ``ms`` or another; empty for a count. Bytes and counts are shown with k, M, G.
        title: what the report calls it. Up to a comma it names the metric, what follows says how it is taken.
        card: what the model card calls it; an accuracy's says ``search split``, which its row of the report split replaces.
        gain: what a recipe does that is ``{}`` times better than the baseline; empty for accuracies and details.
        record: kind of the measurement records that it is told from; empty where there are none.
        tasks: of an accuracy, the tasks that have it.
    """

    name: str
    kind: Kind
    direction: Literal["maximize", "minimize"] | None
    unit: str
    title: str
    card: str
    gain: str
    record: str
    tasks: tuple[str, ...] = ()


def _accuracy(name: str, title: str, *tasks: str) -> Metric:
    return Metric(
        name=name,
        kind="accuracy",
        direction="maximize",
        unit="%",
        title=title,
        card=f"{title[0].upper()}{title[1:]}, search split",
        gain="",
        record="accuracy_search",
        tasks=tasks,
    )


_TABLE = (
    _accuracy("top1_pct", "top-1 accuracy", "image_classification", "entailment", "nlvr2", "nlvr1"),
    _accuracy("vqa_pct", "VQA accuracy", "vqa"),
    _accuracy("text_recall1_pct", "text recall@1", "retrieval"),
    _accuracy("image_recall1_pct", "image recall@1", "retrieval"),
    Metric(
        name="size_bytes",
        kind="exact",
        direction="minimize",
        unit="bytes",
        title="artefact size",
        card="Size of the artefact",
        gain="is {:.1f}× smaller",
        record="",
    ),
    Metric(
        name="params",
        kind="exact",
        direction="minimize",
        unit="",
        title="weights",
        card="Parameters",
        gain="has {:.1f}× fewer weights",
        record="",
    ),
    Metric(
        name="macs",
        kind="exact",
        direction="minimize",
        unit="",
        title="MACs of one image",
        card="Multiply-accumulates an image",
        gain="needs {:.1f}× fewer MACs",
        record="",
    ),
    Metric(
        name="latency_ms_p50",
        kind="speed",
        direction="minimize",
        unit="ms",
        title="latency, batch 1, median",
        card="Latency, median",
        gain="is {:.1f}× faster at batch 1",
        record="latency",
    ),
    Metric(
        name="latency_ms_p95",
        kind="detail",
        direction=None,
        unit="ms",
        title="latency, batch 1, 95th percentile",
        card="Latency, 95th percentile",
        gain="",
        record="",
    ),
    Metric(
        name="throughput_images_per_s",
        kind="speed",
        direction="maximize",
        unit="images/s",
        title="throughput",
        card="Throughput",
        gain="has {:.1f}× the throughput",
        record="throughput",
    ),
    Metric(
        name="peak_memory_bytes",
        kind="memory",
        direction="minimize",
        unit="bytes",
        title="peak memory",
        card="Peak memory",
        gain="needs {:.1f}× less peak memory",
        record="peak_memory",
    ),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}
"""Every metric by name, in the order in which they are shown."""


def _of(*kinds: Kind) -> tuple[str, ...]:
    return tuple(name for name, metric in METRICS.items() if metric.kind in kinds)


OBJECTIVES: Mapping[str, str] = {name: metric.direction for name, metric in METRICS.items() if metric.direction}
"""What a study may name as an objective, with the direction that is better."""

ACCURACIES = _of("accuracy")
"""Whose difference from the baseline is ``<name>_drop``. Which of them a study has is a matter of its task."""

SPEED_OBJECTIVES = frozenset(_of("speed"))
"""What is timed, hence comparable only within one device kind."""

SPEEDS: Mapping[str, str] = {METRICS[name].record: name for name in _of("speed")}
"""Kind of record to the speed that it tells."""

DEVICE_BOUND = frozenset(_of("speed", "memory"))
"""What is measured on a device against the baseline, hence told and compared as a ratio; statistics take its logarithm."""

INTERVALS = _of("accuracy", "speed", "memory")
"""What is measured, hence has a 95 % interval: ``<name>_low`` and ``<name>_high``, in the same unit. The others are exact."""

EXACT = _of("exact")
"""What follows from an artefact's structure, hence is known before it is trained where the structure is."""

DETAILS = _of("detail")
"""What is told beside an objective and is none."""
