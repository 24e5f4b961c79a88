"""The techniques: one literal table, loaded on demand, and others through the entry point group ``vitpareto.techniques``."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from workers.techniques.record import Technique

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
"""Folder to the techniques in it, each a file that exports ``TECHNIQUE``; in the order in which they are listed."""

NAMES = tuple(name for names in FOLDERS.values() for name in names)

GROUP = "vitpareto.techniques"


@cache
def registry() -> dict[str, Technique]:
    """Returns every known technique by name: the built-in ones in order, then those of other installed packages.

    Raises:
        ValueError: an entry point names a technique that exists already, or one whose record has another name.
    """
    found: dict[str, Technique] = {
        name: import_module(f"workers.techniques.{folder}.{name}").TECHNIQUE
        for folder, names in FOLDERS.items()
        for name in names
    }
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
