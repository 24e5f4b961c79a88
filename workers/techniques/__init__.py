"""The techniques: one literal table, loaded on demand, and others through the entry point group ``vitpareto.techniques``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from workers.techniques.record import Technique
from workers.techniques.rules import Table

FOLDERS = {
    "distillation": ("distill",),
    "pruning": ("magnitude_prune", "taylor_prune", "importance_prune", "semi_structured_prune"),
    "tokens": ("resolution", "tome", "pitome", "evit", "dynamicvit", "diffrate", "pumer"),
    "low_rank": ("nystrom", "performer", "linformer", "scatterbrain", "svd"),
    "quantisation": (
        "precision",
        "qat",
        "lsq",
        "diffq",
        "dynamic_int8",
        "weight_only",
        "static_int8",
        "fq_vit",
        "smoothquant",
        "gptq",
        "repq_vit",
        "fp8",
    ),
}
"""Folder to the techniques in it, each a file that exports ``TECHNIQUE``; in the order in which they are listed, which is the
canonical order within a family. The only place that knows them by name: everything else is in their records."""

NAMES = tuple(name for names in FOLDERS.values() for name in names)

GROUP = "vitpareto.techniques"


@dataclass(frozen=True)
class LeftOut:
    """A technique of another package that cannot be used here; as text one line that says whose it is and why.

    Attributes:
        name: of the entry point.
        package: name and version of the distribution.
        target: what the entry point names, ``module:attribute``.
    """

    name: str
    package: str
    target: str
    reason: str

    def __str__(self) -> str:
        return f"technique {self.name} of {self.package} is left out ({self.target}): {self.reason}"


def registry() -> dict[str, Technique]:
    """Returns every known technique by name: the built-in ones in order, then those of other installed packages."""
    return _known()[0]


def left_out() -> tuple[LeftOut, ...]:
    """Returns the entry points of other packages that :func:`registry` has no technique of, because they are broken."""
    return _known()[1]


def unknown(name: str) -> str:
    """Returns why :func:`registry` has no technique of that name, as the end of a sentence about it."""
    return next((f"cannot be used: {broken}" for broken in left_out() if broken.name == name), "is not known here")


def versions() -> dict[str, int]:
    """Returns the version integer of every technique."""
    return {name: technique.version for name, technique in registry().items()}


@cache
def _known() -> tuple[dict[str, Technique], tuple[LeftOut, ...]]:
    found: dict[str, Technique] = {
        name: import_module(f"workers.techniques.{folder}.{name}").TECHNIQUE
        for folder, names in FOLDERS.items()
        for name in names
    }
    Table(found)  # which raises where rules of our own contradict one another
    broken: list[LeftOut] = []
    waiting: list[tuple[EntryPoint, Technique]] = []
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, _package(p))):
        try:
            technique = _load(point, {*found, *(p.name for p, _ in waiting)})
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a package does at its import
            broken.append(_left_out(point, error))
        else:
            waiting.append((point, technique))
    while waiting:  # a family may be described by a technique that comes later
        refused = list(_add_to(found, waiting))
        if len(refused) == len(waiting):
            broken += [_left_out(point, error) for point, _, error in refused]
            break
        waiting = [(point, technique) for point, technique, _ in refused]
    others = {name: found[name] for name in sorted(set(found) - set(NAMES))}
    return {**{name: found[name] for name in NAMES}, **others}, tuple(sorted(broken, key=lambda b: (b.name, b.package)))


def _load(point: EntryPoint, taken: set[str]) -> Technique:
    technique = point.load()
    if not isinstance(technique, Technique):
        raise TypeError(f"it must name a workers.techniques.record.Technique, not a {type(technique).__name__}")
    if technique.name != point.name:
        raise ValueError(f"the entry point must have the name of its record, {technique.name}")
    if point.name in taken:
        raise ValueError("there is a technique of that name already")
    return technique


def _add_to(
    found: dict[str, Technique], waiting: list[tuple[EntryPoint, Technique]]
) -> Iterator[tuple[EntryPoint, Technique, ValueError]]:
    """Adds what fits with all that is known, rules included; yields the others, with what is wrong with them."""
    for point, technique in waiting:
        try:
            Table({**found, point.name: technique})
        except ValueError as error:
            yield point, technique, error
        else:
            found[point.name] = technique


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"


def _left_out(point: EntryPoint, error: BaseException) -> LeftOut:
    reason = " ".join(str(error).split())
    if not isinstance(error, ValueError):
        reason = f"{type(error).__name__}: {reason}"
    return LeftOut(point.name, _package(point), point.value, reason)
