"""The techniques: one literal tuple, loaded on demand, and others through the entry point group ``vitpareto.techniques``."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from workers.techniques.record import Technique

NAMES = (
    "distill",
    "magnitude_prune",
    "taylor_prune",
    "importance_prune",
    "resolution",
    "tome",
    "pitome",
    "evit",
    "dynamicvit",
    "diffrate",
    "pumer",
    "nystrom",
    "performer",
    "linformer",
    "scatterbrain",
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
)

GROUP = "vitpareto.techniques"


@cache
def registry() -> dict[str, Technique]:
    """Returns every known technique by name: the built-in ones in order, then those of other installed packages.

    Raises:
        ValueError: an entry point names a technique that exists already, or one whose record has another name.
    """
    found: dict[str, Technique] = {name: import_module(f"workers.techniques.{name}").TECHNIQUE for name in NAMES}
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        technique = point.load()
        if point.name in found or technique.name != point.name:
            raise ValueError(
                f"entry point {point.name} of group {GROUP} must name a new technique and equal its record's name; "
                f"known: {', '.join(found)}; record: {technique.name}"
            )
        found[point.name] = technique
    return found


def versions() -> dict[str, int]:
    """Returns the version integer of every technique."""
    return {name: technique.version for name, technique in registry().items()}
