"""The stage graph of a recipe: what is run, in which order, and the key that names each result.

A recipe compiles to ``baseline -> surgery -> recovery -> conversion``. Each stage is named by the hash of what it does and of
its parent's key, so that recipes which share a prefix run it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.techniques import registry, versions
from workers.techniques.record import Technique, make_config
from workers.trial import Context, Recipe, Step, digest, without_locations


class Infeasible(Exception):
    """The recipe cannot be built on this model and device; the message says why."""


@dataclass(frozen=True)
class Stage:
    """One stage: ``steps`` are what it applies, ``parent`` the key of the artefact it starts from."""

    kind: str
    key: str
    parent: str | None
    steps: tuple[Step, ...] = ()


def compile_recipe(recipe: Recipe, seed: int, context: Context) -> tuple[Stage, ...]:
    """Returns the stages of ``recipe`` in order; the last one's artefact is what ships.

    Raises:
        Infeasible: a conversion step stands before a surgery step.
    """
    known = registry()
    plain = without_locations({"model": context.model, "data": context.data, "training": context.training["baseline"]})
    stages = [Stage("baseline", digest(["baseline", plain]), None)]
    by_kind: dict[str, list[Step]] = {"surgery": [], "conversion": []}
    for step in recipe.steps:
        kind = known[step.technique].stage
        if kind == "surgery" and by_kind["conversion"]:
            raise Infeasible(
                f"{step.technique} changes the structure and must come before {by_kind['conversion'][0].technique}"
            )
        by_kind[kind].append(step)

    def add(kind: str, steps: list[Step], *more: object) -> None:
        parent = stages[-1].key
        parts = [[s.technique, dict(s.config), versions()[s.technique]] for s in steps]
        stages.append(Stage(kind, digest([kind, parent, parts, seed, *more]), parent, tuple(steps)))

    surgery = by_kind["surgery"]
    if surgery:
        add("surgery", surgery)
        if any(t.trains(c) for t, c in resolve(surgery)):
            add("recovery", surgery, without_locations(context.training["recovery"]), stages[0].key)
    if by_kind["conversion"]:
        add("conversion", by_kind["conversion"])
    return tuple(stages)


def recovery_key(recipe: Recipe, seed: int, context: Context) -> str | None:
    """Returns the key of the recovery training of ``recipe``, None where it needs none."""
    return next((stage.key for stage in compile_recipe(recipe, seed, context) if stage.kind == "recovery"), None)


def resolve(steps: tuple[Step, ...] | list[Step]) -> list[tuple[Technique, Any]]:
    """Returns (technique, config object) for every step."""
    known = registry()
    return [(known[s.technique], make_config(known[s.technique].Config, s.config)) for s in steps]


def prefix(key: str) -> str:
    """The storage folder of a stage's artefact."""
    return f"stages/{key}"
