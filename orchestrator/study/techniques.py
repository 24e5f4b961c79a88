"""What a study says of techniques and recipes, filled in from the techniques' own ranges; each fault with its path.

Reads plain values as they stand in the file, skips what has the wrong type (the schema reports that), and goes on after
a fault, so that one reading finds them all.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.study.axes import Axis, Grid, axis
from orchestrator.study.yaml_lines import ABSENT, Fault, nearest
from workers.techniques import composition
from workers.techniques.record import Options, Range, defaults, domains

_BOUNDS = ("low", "high", "step")


# --- techniques -------------------------------------------------------------------------------------------------------


def resolve_techniques(named: object, family: str = "timm") -> tuple[dict[str, dict[str, Any]], list[Fault]]:
    """Returns what is searched of every parameter of the techniques without a fault, and the faults of the others.

    Args:
        family: of the study's model; a technique that does not work on it is a fault.
    """
    from workers.techniques import left_out, registry  # imports torch once asked

    resolved: dict[str, dict[str, Any]] = {}
    faults: list[Fault] = []
    for name, given in named.items() if isinstance(named, Mapping) else ():
        where = f"techniques.{name}"
        broken = next((b for b in left_out() if b.name == name), None)
        if name not in registry() and broken:
            remedy = f"repair {broken.package}, or uninstall it and leave the technique out"
            faults.append(Fault(where, f"must be a technique that can be used: {broken}", name, remedy))
            continue
        if name not in registry():
            faults.append(Fault(where, "must be a known technique", name, nearest(name, registry())))
            continue
        possible = [technique for technique, record in registry().items() if family in record.models]
        if possible and name not in possible:
            rule = f"must be a technique that works on models of family {family}"
            faults.append(Fault(where, rule, name, "these do: " + ", ".join(possible)))
            continue
        config = registry()[name].Config
        given = {} if given is None else given
        if isinstance(given, Mapping):
            searched, found = _resolve_parameters(config, given, where)
            faults += found
            if not found:
                resolved[name] = searched
    return resolved, faults


def _resolve_parameters(config: type, given: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[Fault]]:
    fields, standing = domains(config), defaults(config)
    faults = [
        Fault(f"{where}.{name}", "must be a parameter of the technique", name, nearest(name, fields))
        for name in given
        if name not in fields
    ]
    searched: dict[str, Any] = {}
    for name, domain in fields.items():
        if name not in given:
            searched[name] = _default_search(domain, standing[name])
            continue
        here, spec = f"{where}.{name}", given[name]
        faults += _grid_faults(domain, spec, here) if isinstance(spec, Mapping) else _value_faults(domain, spec, here)
        if not faults:
            searched[name] = _normalised(domain, spec)
    return searched, faults


def _default_search(domain: Range | Options, standing: Any) -> list[Any] | dict[str, Any]:
    if isinstance(domain, Options):
        return list(domain.search) or [standing]
    if domain.search_low == domain.search_high:
        return [typed(domain, standing)]
    return _normalised(domain, {})


def typed(domain: Range | Options, value: Any) -> Any:
    """Returns an allowed value in the one type its parameter has, so that 8 and 8.0 are the same recipe."""
    if isinstance(domain, Options):
        return value
    whole = all(isinstance(x, int) for x in (domain.low, domain.high, domain.step))
    return round(value) if whole else round(float(value), 10)


def _normalised(domain: Range | Options, spec: Any) -> list[Any] | dict[str, Any]:
    if isinstance(spec, Mapping) and isinstance(domain, Range):
        return {key: typed(domain, value) for key, value in _bounds(domain, spec).items()}
    return [typed(domain, value) for value in (spec if isinstance(spec, list) else [spec])]


def _bounds(domain: Range, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns low, high and step, those left out being the ones searched by default."""
    return {key: spec.get(key, getattr(domain, f"search_{key}")) for key in _BOUNDS}


def _value_faults(domain: Range | Options, spec: Any, where: str) -> list[Fault]:
    """Judges one fixed value, or a list of choices."""
    if not isinstance(spec, list):
        return _one_value(domain, spec, where)
    if not spec:
        return [Fault(where, "must have at least one choice", spec, "leave it out to search the default range")]
    faults = [f for i, value in enumerate(spec) for f in _one_value(domain, value, f"{where}[{i}]")]
    if not faults and len({repr(typed(domain, value)) for value in spec}) < len(spec):
        faults.append(Fault(where, "must not repeat a choice", spec, "remove the repeated ones"))
    return faults


def _one_value(domain: Range | Options, value: Any, where: str) -> list[Fault]:
    rule = domain.fault(value)
    return [Fault(where, rule, value, _closest(domain, value))] if rule else []


def _closest(domain: Range | Options, value: Any) -> str:
    """Returns the remedy for a value outside its domain."""
    if isinstance(domain, Options):
        names = [v for v in domain.values if isinstance(v, str)]
        return nearest(value, names) if names and isinstance(value, str) else f"for example {domain.values[0]!r}"
    if not _is_number(value):
        return f"for example {domain.search_low:g}, or {{low: {domain.low:g}, high: {domain.high:g}}}"
    inside = min(max(value, domain.low), domain.high)
    steps = round((inside - domain.low) / domain.step)
    return f"the nearest allowed value is {domain.low + steps * domain.step:g}"


def _grid_faults(domain: Range | Options, spec: Mapping[str, Any], where: str) -> list[Fault]:
    """Judges ``{low, high, step}``."""
    if isinstance(domain, Options):
        return [Fault(where, "must be a value or a list of values", dict(spec), f"for example {list(domain.values)}")]
    faults = [
        Fault(f"{where}.{key}", "must be one of low, high, step", key, nearest(key, _BOUNDS))
        for key in spec
        if key not in _BOUNDS
    ]
    bounds = _bounds(domain, spec)
    low, high, step = bounds.values()
    for key in ("low", "high"):
        faults += _one_value(domain, bounds[key], f"{where}.{key}")
    if not _is_number(step) or step <= 0 or not _whole(step / domain.step):
        rule = f"must be a positive multiple of {domain.step:g}"
        faults.append(Fault(f"{where}.step", rule, step, f"the default is {domain.search_step:g}"))
    if faults:
        return faults
    if low > high:
        faults.append(Fault(where, "must have low <= high", dict(spec), "swap the two"))
    elif not _whole((high - low) / step):
        below = low + (high - low) // step * step
        faults.append(
            Fault(
                f"{where}.high", f"must be {low:g} plus a multiple of the step {step:g}", high, f"the next is {below:g}"
            )
        )
    return faults


def _is_number(value: Any) -> bool:
    """Says whether ``value`` is a number to calculate with: the largest integers are none that a float could hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(number: float) -> bool:
    return abs(number) < 2**53 and abs(number - round(number)) < 1e-6


# --- recipes ----------------------------------------------------------------------------------------------------------


def resolve_recipes(
    given: object,
    techniques: Mapping[str, Mapping[str, Any]],
    named: object,
    max_techniques: object,
    family: str = "timm",
) -> tuple[list[list[dict[str, dict[str, Any]]]], list[Fault]]:
    """Returns the known-good recipes with complete configs, and their faults.

    A parameter that a recipe leaves out takes its default, or the searched value nearest to it.

    Args:
        techniques: the study's techniques that had no fault, resolved.
        named: the ``techniques`` section as it stands; steps of a technique that has a fault there are not judged.
        family: of the study's model, on which it depends what goes together.
    """
    from workers.techniques import registry  # imports torch

    recipes, faults = [], []
    for index, steps in enumerate(given) if isinstance(given, list) else ():
        pairs = [_pair(step) for step in steps] if isinstance(steps, list) else []
        if not all(pairs):
            continue  # the schema says what is wrong with their form
        recipe, found = _resolve_recipe([p for p in pairs if p], techniques, named, f"recipes[{index}]")
        names = [next(iter(step)) for step in recipe]
        if isinstance(max_techniques, int) and 1 <= max_techniques < len(names):
            rule = f"must have at most max_techniques = {max_techniques} steps"
            found.append(Fault(f"recipes[{index}]", rule, names, "raise max_techniques"))
        if not found and registry().keys() >= set(names) and (reason := composition.fault(names, family)):
            orders = composition.legal_orders(names, family)
            remedy = "a legal order is " + " -> ".join(orders[0]) if orders else "leave one of them out"
            found.append(Fault(f"recipes[{index}]", f"must be a legal combination: {reason}", names, remedy))
        recipes.append(recipe)
        faults += found
    return recipes, faults


def _pair(step: object) -> tuple[str, Mapping[str, Any]] | None:
    """Returns technique and parameters of ``tome``, ``{tome: }`` or ``{tome: {r: 8}}``; None for other forms."""
    if isinstance(step, str):
        return step, {}
    if not isinstance(step, Mapping) or len(step) != 1:
        return None
    name, parameters = next(iter(step.items()))
    parameters = {} if parameters is None else parameters
    return (name, parameters) if isinstance(name, str) and isinstance(parameters, Mapping) else None


def _resolve_recipe(
    pairs: Sequence[tuple[str, Mapping[str, Any]]],
    techniques: Mapping[str, Mapping[str, Any]],
    named: object,
    where: str,
) -> tuple[list[dict[str, dict[str, Any]]], list[Fault]]:
    recipe: list[dict[str, dict[str, Any]]] = []
    faults: list[Fault] = []
    known = list(named) if isinstance(named, Mapping) else []
    for index, (name, given) in enumerate(pairs):
        here = f"{where}[{index}]"
        if name not in known:
            faults.append(Fault(here, "must be one of the study's techniques", name, nearest(name, known)))
            continue
        config = dict(given)
        if name in techniques:
            config, found = _complete(name, given, techniques[name], f"{here}.{name}")
            faults += found
        recipe.append({name: config})
    return recipe, faults


def _complete(
    name: str, given: Mapping[str, Any], searched: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], list[Fault]]:
    """Returns one step's config with every parameter, and what of ``given`` the study does not search."""
    from workers.techniques import registry  # imports torch

    fields, standing = domains(registry()[name].Config), defaults(registry()[name].Config)
    faults = [
        Fault(f"{where}.{p}", "must be a parameter of the technique", p, nearest(p, fields))
        for p in given
        if p not in fields
    ]
    config = {}
    for p, domain in fields.items():
        here = axis(searched[p])
        if p not in given:
            config[p] = _near(here, standing[p])
            continue
        config[p] = _among(here, domain, given[p])
        if config[p] is ABSENT:
            rule = f"must be what the study searches: {_says(here)}"
            faults.append(Fault(f"{where}.{p}", rule, given[p], f"for example {_near(here, given[p])!r}"))
    return config, faults


def _among(searched: Axis, domain: Range | Options, value: Any) -> Any:
    """Returns ``value`` as the study searches it, ABSENT if it does not."""
    if domain.fault(value):
        return ABSENT
    value = typed(domain, value)
    return next((v for v in searched if v == value and type(v) is type(value)), ABSENT)


def _near(searched: Axis, value: Any) -> Any:
    """Returns the searched value nearest to ``value``; the first one where they have no distance."""
    values = list(searched)
    if value in values or not _is_number(value):
        return value if value in values else values[0]
    return min(values, key=lambda v: abs(v - value) if _is_number(v) else 0)


def _says(searched: Axis) -> str:
    if isinstance(searched, Grid):
        return f"{searched.low:g} to {searched.high:g} in steps of {searched.step:g}"
    return ", ".join(map(repr, searched.values))
