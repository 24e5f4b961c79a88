"""The sampler section of a study, and which arguments its sampler takes: told without Optuna, which takes long to import."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from orchestrator.study.data import Section
from orchestrator.study.scalars import SAMPLER_GROUP, Natural, Positive, Seed, sampler_name
from orchestrator.study.yaml_lines import Fault, nearest

Share = Annotated[float, Field(ge=0, le=1)]


class SamplerSection(Section):
    """``options`` go to the sampler as keyword arguments."""

    name: Annotated[str, AfterValidator(sampler_name)] = "recipe"
    seed: Seed = 0
    n_startup_trials: Positive = 10
    population_size: Annotated[int, Field(ge=2)] = 50
    options: dict[str, Any] = Field(default_factory=dict)


class _Options(Section):
    """Arguments of one sampler that a file can hold; None leaves Optuna's default. Those that are functions are left out."""

    seed: Seed | None = None


class _RecipeOptions(_Options):
    n_startup_trials: Natural | None = None
    use_facts: bool = True
    use_costs: bool = True


class _TpeOptions(_Options):
    n_startup_trials: Natural | None = None
    n_ei_candidates: Positive | None = None
    prior_weight: Annotated[float, Field(gt=0)] | None = None
    consider_prior: bool | None = None
    consider_magic_clip: bool | None = None
    consider_endpoints: bool | None = None
    multivariate: bool | None = None
    group: bool | None = None
    constant_liar: bool | None = None
    warn_independent_sampling: bool | None = None


class _Nsga2Options(_Options):
    population_size: Annotated[int, Field(ge=2)] | None = None
    mutation_prob: Share | None = None
    crossover_prob: Share | None = None
    swapping_prob: Share | None = None


OPTIONS: dict[str, type[_Options]] = {
    "recipe": _RecipeOptions,
    "tpe": _TpeOptions,
    "nsga2": _Nsga2Options,
    "random": _Options,
}
"""The arguments of the samplers of Optuna that are known by name; a test compares them with the installed Optuna's."""


def sampler_faults(sampler: SamplerSection) -> list[Fault]:
    """Judges the keyword arguments that go to the sampler; those of another package's sampler by its signature."""
    if not sampler.options:
        return []
    if sampler.name in OPTIONS:
        return _option_faults(sampler)
    (point,) = entry_points(group=SAMPLER_GROUP, name=sampler.name)
    try:
        inspect.signature(point.load()).bind_partial(**sampler.options)
    except TypeError as error:
        return [Fault("sampler.options", "must be arguments of the sampler", sampler.options, str(error))]
    return []


def _option_faults(sampler: SamplerSection) -> list[Fault]:
    known = OPTIONS[sampler.name]
    try:
        known.model_validate(sampler.options)
    except ValidationError as error:
        return [_fault(sampler.name, found) for found in error.errors(include_url=False)]
    return []


def _fault(sampler: str, found: Any) -> Fault:
    name = str(found["loc"][0])
    if found["type"] == "extra_forbidden":
        takes = OPTIONS[sampler].model_fields
        remedy = nearest(name, takes) or f"{sampler} takes {', '.join(takes)}"
        return Fault(f"sampler.options.{name}", "must be an argument of the sampler", found["input"], remedy)
    rule = str(found["msg"]).removeprefix("Input should be ")
    return Fault(f"sampler.options.{name}", f"must be {rule}", found["input"], "")
