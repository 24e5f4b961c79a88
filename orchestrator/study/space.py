"""The search space: which techniques, in which order, how strongly; conditional, so that nothing forbidden is drawn.

One categorical a family, in the families' order, over what is still possible after the families before it; then the
order, where several compute different things; then the parameters of the chosen techniques. Samplers demand that a
name always comes with the same options, so the options are part of the name: ``pruning|none,magnitude_prune``. A
question with one answer is not asked. The empty recipe is never drawn: where nothing was chosen before, the last family
offers no ``none``.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

from orchestrator.study.axes import Axis, Grid, Suggest, axis, config_at, count
from workers.techniques import composition
from workers.techniques.record import ModelInfo, make_config
from workers.trial import Recipe, Step

NONE = "none"
PROBES = 2000
"""Configs of one technique that are tried before it counts as infeasible; all of them where there are no more."""


# --- feasibility ------------------------------------------------------------------------------------------------------


def fault(recipe: Recipe, info: ModelInfo) -> str | None:
    """Returns why the recipe cannot be carried out on this model and device, or None; steps see those before them."""
    if reason := _order_fault(recipe.techniques, info):
        return reason
    for step in recipe.steps:
        reason, info = _judge(step.technique, step.config, info)
        if reason:
            return f"{step.technique}: {reason}"
    return None


def _order_fault(names: Sequence[str], info: ModelInfo) -> str | None:
    return composition.fault(names, info.family) or composition.environment_fault(names, info)


def _judge(name: str, values: Mapping[str, Any], info: ModelInfo) -> tuple[str | None, ModelInfo]:
    """Returns why one step cannot be carried out, or None; and what the steps after it see."""
    from workers.techniques import registry  # imports torch

    technique = registry()[name]
    if info.family not in technique.models:
        return f"works on models of family {', '.join(technique.models)}, not on {info.family}", info
    try:
        config = make_config(technique.Config, values)
    except ValueError as error:  # values that are each allowed and contradict one another
        return str(error), info
    reason = technique.check(info, config)
    return reason, info if reason else technique.info_after(info, config)


def _never_feasible(name: str, axes: Mapping[str, Axis], info: ModelInfo) -> str | None:
    """Returns a reason that holds against every config of a technique, or None if one of them can be carried out."""
    total = count(axes)
    indices = range(total) if total <= PROBES else random.Random(0).sample(range(total), PROBES)
    reasons = (fault(Recipe((Step(name, config_at(axes, i)),)), info) for i in indices)
    first = next(reasons)
    if first is None or any(reason is None for reason in reasons):
        return None
    return f"{first} (and so for every other value searched)" if total > 1 else first


@dataclass(frozen=True)
class Hindered:
    """A technique of which a model takes some configs only.

    Attributes:
        infeasible: configs that cannot be carried out, of ``tried``: all there are, or as many of them as :data:`PROBES`.
        reason: the commonest, of one of them.
    """

    technique: str
    infeasible: int
    tried: int
    reason: str


def _hindered(name: str, axes: Mapping[str, Axis], info: ModelInfo) -> Hindered | None:
    total = count(axes)
    indices = range(total) if total <= PROBES else random.Random(0).sample(range(total), PROBES)
    found = [fault(Recipe((Step(name, config_at(axes, i)),)), info) for i in indices]
    reasons = [reason for reason in found if reason is not None]
    if not reasons or len(reasons) == len(found):
        return None
    commonest = Counter(_without_values(reason) for reason in reasons).most_common(1)[0][0]
    example = next(reason for reason in reasons if _without_values(reason) == commonest)
    return Hindered(name, len(reasons), len(found), example.removeprefix(f"{name}: "))


def _without_values(reason: str) -> str:
    """Returns what a reason has in common with those of other values."""
    return re.sub(r"\d+(\.\d+)?", "", reason)


# --- the space --------------------------------------------------------------------------------------------------------


class SearchSpace:
    """The recipes of a study.

    Args:
        techniques: technique to parameter to a list of values or ``{"low", "high", "step"}``, every parameter of a
            technique named, as :class:`orchestrator.study.load.StudyConfig` holds them.
        info: the model and device; techniques that cannot work there are excluded. None judges by composition only.
        max_techniques: most techniques in one recipe.

    Attributes:
        axes: technique to parameter to what it may be, of the techniques that can be drawn.
        families: name and techniques of each, in the order in which they are asked for.
    """

    def __init__(
        self, techniques: Mapping[str, Mapping[str, Any]], info: ModelInfo | None = None, *, max_techniques: int = 3
    ) -> None:
        self.info = info
        self.max_techniques = max_techniques
        self._model_family = info.family if info else "timm"
        self._named = tuple(techniques)
        axes = {t: {p: axis(spec) for p, spec in parameters.items()} for t, parameters in techniques.items()}
        reasons = {t: _never_feasible(t, a, info) for t, a in axes.items()} if info else {}
        self._infeasible = {t: reason for t, reason in reasons.items() if reason}
        self.axes = {t: a for t, a in axes.items() if t not in self._infeasible}
        by_family = {f: tuple(t for t in self.axes if composition.family_of(t) == f) for f in composition.families()}
        self.families = [(f, names) for f, names in by_family.items() if names]
        self._known_options: dict[tuple[int, tuple[str, ...]], list[tuple[str, ...]]] = {}
        self._orders: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def legal_orders(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Returns the orders in which these techniques, in that of their families, may stand in a recipe; none: not together."""
        if names not in self._orders:
            self._orders[names] = composition.legal_orders(names, self._model_family)
        return self._orders[names]

    def _options(self, index: int, drawn: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Returns what family number ``index`` may add to the techniques drawn before it; the empty tuple adds none."""
        if (index, drawn) not in self._known_options:
            self._known_options[index, drawn] = self._find_options(index, drawn)
        return self._known_options[index, drawn]

    def _find_options(self, index: int, drawn: tuple[str, ...]) -> list[tuple[str, ...]]:
        names = self.families[index][1]
        room = self.max_techniques - len(drawn)
        sizes = range(min(room, len(names)) + 1)
        options = [some for n in sizes for some in combinations(names, n) if self.legal_orders(drawn + some)]
        must = not drawn and index == len(self.families) - 1
        return [some for some in options if some] if must else options

    def sample(self, suggest: Suggest) -> Recipe:
        """Draws a recipe; no forbidden combination and never the empty one.

        Raises:
            ValueError: every technique of the study is infeasible.
        """
        if not self.families:
            raise ValueError(
                "the search space is empty: " + "; ".join(f"{t}: {r}" for t, r in self._infeasible.items())
            )
        drawn: tuple[str, ...] = ()
        for index, (family, _) in enumerate(self.families):
            options = {"+".join(some) or NONE: some for some in self._options(index, drawn)}
            drawn += options[_choose(suggest, f"{family}|", list(options))]
        orders = {">".join(order): order for order in self.legal_orders(drawn)}
        order = orders[_choose(suggest, "order|", list(orders))]
        return Recipe(tuple(Step(t, {p: a.ask(f"{t}.{p}", suggest) for p, a in self.axes[t].items()}) for t in order))

    def params_of(self, recipe: Recipe) -> dict[str, Any]:
        """Returns the answers that make :meth:`sample` yield ``recipe``.

        Raises:
            ValueError: the recipe lies outside this space.
        """
        answers = _Known(recipe)
        found = self.sample(answers)
        if found.hash != recipe.hash:
            raise ValueError(f"{recipe.label()} is outside the search space, which has {found.label()} there")
        return answers.asked

    def _sets(self, index: int = 0, drawn: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        """Yields every set of techniques that a recipe may have."""
        if index == len(self.families):
            if drawn:
                yield drawn
            return
        for some in self._options(index, drawn):
            yield from self._sets(index + 1, drawn + some)

    def size(self) -> int:
        """Returns the exact number of distinct recipes, those that :meth:`fault` rejects by their values included."""
        return sum(len(self.legal_orders(s)) * math.prod(count(self.axes[t]) for t in s) for s in self._sets())

    def enumerate(self) -> Iterator[Recipe]:
        """Yields every recipe once, lazily."""
        for order in (order for drawn in self._sets() for order in self.legal_orders(drawn)):
            axes = {(t, p): a for t in order for p, a in self.axes[t].items()}
            for index in range(count(axes)):
                values = config_at(axes, index)
                yield Recipe(tuple(Step(t, {p: values[t, p] for p in self.axes[t]}) for t in order))

    def excluded(self) -> list[tuple[tuple[str, ...], str]]:
        """Returns what is never drawn and why: techniques infeasible on this model, pairs that must not be together."""
        single = [((name,), reason) for name, reason in self._infeasible.items()]
        pairs = composition.conflicts(self._named, self._model_family)
        return [*single, *(((a, b), v.reason) for a, b, v in pairs)]

    def hindered(self) -> list[Hindered]:
        """Returns the techniques that are searched and of which some configs are infeasible on this model."""
        info = self.info
        found = [_hindered(name, axes, info) for name, axes in self.axes.items()] if info else []
        return [one for one in found if one]

    def fault(self, recipe: Recipe, info: ModelInfo | None = None) -> str | None:
        """Returns why the recipe cannot be carried out, or None; a searcher marks it infeasible without running it.

        Args:
            info: the model and device, where the space was made without them.
        """
        info = info or self.info
        return fault(recipe, info) if info else composition.fault(recipe.techniques, self._model_family)

    def count_infeasible(self, limit: int = 20_000) -> int | None:
        """Returns how many recipes :meth:`fault` rejects, or None where more than ``limit`` configs must be looked at.

        Recipes that begin alike, or leave the same facts of the model, are looked at once.
        """
        info, seen = self.info, 0
        if info is None:
            return 0

        @cache
        def rejected(names: tuple[str, ...], info: ModelInfo) -> int:
            nonlocal seen
            (name, *rest), total = names, 0
            below = math.prod(count(self.axes[t]) for t in rest)
            for index in range(count(self.axes[name])):
                if (seen := seen + 1) > limit:
                    raise _TooMany
                reason, after = _judge(name, config_at(self.axes[name], index), info)
                total += below if reason else rejected(tuple(rest), after) if rest else 0
            return total

        orders = (order for drawn in self._sets() for order in self.legal_orders(drawn))
        try:
            return sum(
                math.prod(count(self.axes[t]) for t in order) if _order_fault(order, info) else rejected(order, info)
                for order in orders
            )
        except _TooMany:
            return None


class _TooMany(Exception):
    pass


def _choose(suggest: Suggest, prefix: str, labels: list[str]) -> str:
    if len(labels) == 1:
        return labels[0]
    return str(suggest.categorical(prefix + ",".join(labels), labels))


class _Known:
    """Answers every question as one recipe would, and notes what was asked."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.configs = {step.technique: step.config for step in recipe.steps}
        self.asked: dict[str, Any] = {}

    def _note(self, name: str, value: Any, fits: Callable[[Any], bool], allowed: str) -> Any:
        if not fits(value):
            raise ValueError(f"{self.recipe.label()} is outside the search space: {name} is {value!r}, not {allowed}")
        self.asked[name] = value
        return value

    def categorical(self, name: str, choices: Sequence[Any]) -> Any:
        kind, bar, _ = name.partition("|")
        if not bar:
            value = self._value(name)
        elif kind == "order":
            value = ">".join(self.recipe.techniques)
        else:
            value = self._chosen(kind, choices)
        return self._note(name, value, lambda v: _among(v, choices), "one of " + ", ".join(map(str, choices)))

    def _chosen(self, family: str, choices: Iterable[str]) -> str:
        mine = {t for t in self.configs if composition.family_of(t) == family}
        return next((c for c in choices if set(c.split("+")) == (mine or {NONE})), "+".join(sorted(mine)) or NONE)

    def _value(self, name: str) -> Any:
        technique, _, parameter = name.partition(".")
        config = self.configs.get(technique, {})
        if parameter not in config:
            raise ValueError(f"{self.recipe.label()} is outside the search space: it has no {name}")
        return config[parameter]

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return int(self._on_grid(name, Grid(low, high, step)))

    def floating(self, name: str, low: float, high: float, step: float) -> float:
        return float(self._on_grid(name, Grid(low, high, step)))

    def _on_grid(self, name: str, grid: Grid) -> Any:
        allowed = f"{grid.low:g} to {grid.high:g} in steps of {grid.step:g}"
        return self._note(name, self._value(name), lambda v: _among(v, grid), allowed)


def _among(value: Any, choices: Iterable[Any]) -> bool:
    return any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in choices)
