"""What crosses the process boundary: frozen dataclasses of plain values, standard library only.

A driver writes a :class:`TrialSpec`, a worker answers with a :class:`TrialResult`. Both go through JSON unchanged, so any
trial can be rerun from its file alone (``python -m workers spec.json``). No tensor, module or exception object crosses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Self

SCHEMA_VERSION = 1
"""Of TrialSpec and TrialResult; raised when a field changes its meaning."""

STATUSES = (
    "ok",
    "stopped",
    "infeasible",
    "cuda_oom",
    "host_oom",
    "timeout",
    "worker_died",
    "node_lost",
    "preempted",
    "storage_fault",
    "error",
)
"""Every way a trial can end. ``ok`` is the only success; ``stopped`` is neither that nor a failure: the recovery training was
paused at a rung, and whoever runs the trial again goes on from there."""

INFRASTRUCTURE = frozenset({"worker_died", "node_lost", "preempted", "storage_fault"})
"""Failures that say nothing about the recipe; the only ones that are retried."""

_LOCATIONS = frozenset({"path", "root", "checkpoint", "cache", "checkpoint_s", "weights_notes"})
"""Keys that say where a thing lies, how often a training is saved, or what of the weights was told. They never enter a
digest: content does."""


def canonical_json(value: object) -> str:
    """Returns the one JSON text of ``value``: sorted keys, no white space, no NaN.

    Raises:
        ValueError: for NaN or infinity, which JSON does not have.
        TypeError: for values that are not plain.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Step:
    """One technique of a recipe with its complete config (every field, defaults included)."""

    technique: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """An ordered combination of techniques. The empty recipe is the uncompressed baseline."""

    steps: tuple[Step, ...] = ()

    def to_json(self) -> str:
        """Returns the canonical JSON: a list of ``{"technique", "config"}`` in order."""
        return canonical_json([{"technique": s.technique, "config": dict(s.config)} for s in self.steps])

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what :meth:`to_json` wrote."""
        return cls(tuple(Step(s["technique"], s["config"]) for s in json.loads(text)))

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits that name the recipe; order counts."""
        return digest(json.loads(self.to_json()))

    @property
    def techniques(self) -> tuple[str, ...]:
        """The names of the techniques, in order."""
        return tuple(s.technique for s in self.steps)

    def label(self) -> str:
        """A short text for people: ``tome(r=8) + weight_only(bits=4)``, or ``baseline``."""
        parts = (s.technique + "(" + ", ".join(f"{k}={v}" for k, v in s.config.items()) + ")" for s in self.steps)
        return " + ".join(parts) or "baseline"


@dataclass(frozen=True)
class Context:
    """Everything besides recipe and seed that changes a trial's numbers.

    Attributes:
        model: model section of the study, with the checkpoint's ``checkpoint_digest`` where one is used; in a study's
            trials also ``weights_notes``, what ``plan`` says of loading it.
        data: data section with the data's own ``digest`` and the split settings.
        training: ``baseline`` and ``recovery`` training settings.
        measurement: protocol name, batch sizes, repetitions, thread count.
        device: device kind that objectives are for: ``cpu`` or ``cuda``.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    training: Mapping[str, Any]
    measurement: Mapping[str, Any]
    device: str = "cpu"

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits; moving a file does not change it, changing its content does."""
        return digest(without_locations(asdict(self)))


def _plain(value: Any) -> dict[str, Any]:
    """Returns a record of this file as JSON's encoder takes it: a quarter of the time of ``asdict``, which copies every value."""
    return dict(value) if isinstance(value, Mapping) else {f.name: getattr(value, f.name) for f in fields(value)}


def without_locations(value: Any) -> Any:
    """Returns ``value`` without the keys that only say where something lies."""
    if isinstance(value, Mapping):
        return {k: without_locations(v) for k, v in value.items() if k not in _LOCATIONS}
    if isinstance(value, list | tuple):
        return [without_locations(v) for v in value]
    return value


def trial_id(recipe: Recipe, seed: int, context: Context, versions: Mapping[str, int]) -> str:
    """Returns the trial key: recipe, seed, context and the versions of the techniques that the recipe uses.

    Args:
        versions: technique name to version integer; only those in ``recipe`` count, so that a new version of one
            technique leaves the rows of the others valid.
    """
    used = {name: versions[name] for name in recipe.techniques}
    return digest([recipe.hash, seed, context.digest, used])[:12]


@dataclass(frozen=True)
class TrialSpec:
    """One trial, complete: what :func:`workers.run.run_trial` needs and nothing else.

    Attributes:
        study: name of the study, a folder under ``storage``.
        storage: root of the storage, a path or the URL of an object store, as seen from the worker.
        storage_token: ``token`` in the study's ``study.json``; a node that reads another one does not see the storage.
        objectives: names from :data:`workers.metrics.OBJECTIVES` that the result must hold.
        timeout_s: seconds of own work before the trial counts as timed out (waiting for the lane does not count).
        cpus: threads to train with.
        gpus: GPU share that was scheduled; 0 trains on CPU.
        until: share of the recovery training, above 0 and below 1, rounded up to whole epochs, after which it pauses and the
            trial ends ``stopped``; None runs to the end, as does a recipe without a recovery or with a finished one.
    """

    study: str
    trial_id: str
    recipe: Recipe
    seed: int
    context: Context
    storage: str
    storage_token: str = ""
    objectives: tuple[str, ...] = ("top1_pct", "size_bytes")
    timeout_s: float | None = None
    cpus: int = 1
    gpus: float = 0.0
    until: float | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.until is not None and not 0 < self.until < 1:
            raise ValueError(f"trial spec: until must be above 0 and below 1, or None for the end, got {self.until!r}")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON takes; :meth:`from_dict` reads them back."""
        return json.loads(json.dumps(self, default=_plain))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: if the schema version is another one.
        """
        found = values.get("schema_version")
        if found != SCHEMA_VERSION:
            raise ValueError(
                f"trial spec: schema_version must be {SCHEMA_VERSION}, found {found!r}; "
                "rerun it with the vitpareto version that wrote it"
            )
        fields = dict(values)
        fields["recipe"] = Recipe(tuple(Step(**s) for s in values["recipe"]["steps"]))
        fields["context"] = Context(**values["context"])
        fields["objectives"] = tuple(values["objectives"])
        return cls(**fields)


@dataclass(frozen=True)
class StageRun:
    """One stage of a trial: ``kind`` is baseline, surgery, recovery or conversion; ``epochs`` were trained in this attempt."""

    kind: str
    key: str
    cached: bool
    duration_s: float
    epochs: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """One measured quantity of one artefact with its conditions and raw samples.

    Attributes:
        kind: ``latency``, ``throughput``, ``peak_memory``, ``accuracy_search``, ``accuracy_report``, and ``aa_latency``,
            ``aa_throughput`` for the uncompressed baseline timed against itself.
        artefact: stage key of the artefact that was measured.
        device: device kind; ``device_name`` in ``conditions`` has the product name.
        batch: images per call; resolution: side length in pixels; protocol: name of the protocol.
        value: in ``unit``: ms (median), images/s, bytes, percent.
        ratio: compressed over the best uncompressed way to run the model, interleaved, same quantity, with its bootstrap
            interval; None where not paired.
        samples: raw values of the artefact, ``baseline_samples`` those of the interleaved baseline.
        conditions: dtype, threads, kernels, device name, driver, repetitions, whatever else the number depends on.
    """

    kind: str
    artefact: str
    device: str
    batch: int
    resolution: int
    protocol: str
    value: float
    unit: str
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    samples: tuple[float, ...] = ()
    baseline_samples: tuple[float, ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what ``dataclasses.asdict`` and JSON made of a record."""
        lists = {name: tuple(values[name]) for name in ("samples", "baseline_samples")}
        return cls(**{**values, **lists})


@dataclass(frozen=True)
class TrialResult:
    """How one attempt at a trial ended. Total: a failure is a value here, never an exception.

    Attributes:
        attempt_id: unique name of the attempt.
        status: one of :data:`STATUSES`.
        failure: None when ok, else one line for a person, then the traceback text where there is one.
        metrics: objective and other metric values; the unit is the suffix of the name.
        conditions: what every metric was taken under: device, dtype, threads, splits, parity.
        stages: the stages the trial needed, in order.
        artefact: path of the artefact relative to the storage root, None unless ok.
        provenance: versions, git commit, host, device, digests.
        seconds: where the time went: ``train``, ``evaluate``, ``measure``, ``lane_wait``, ``stage_wait``, ``other``.
        started_at: seconds since the epoch, UTC.
        rung: share of the recovery training that was done, where the trial is ``stopped``; None otherwise.
    """

    trial_id: str
    attempt_id: str
    status: str
    failure: str | None
    metrics: Mapping[str, float]
    started_at: float
    duration_s: float
    conditions: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[StageRun, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    artefact: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    rung: float | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"trial result: status must be one of {STATUSES}, got {self.status!r}")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON takes."""
        return json.loads(json.dumps(self, default=_plain))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote."""
        fields = dict(values)
        fields["stages"] = tuple(StageRun(**s) for s in values["stages"])
        fields["measurements"] = tuple(map(Measurement.from_dict, values["measurements"]))
        return cls(**fields)
