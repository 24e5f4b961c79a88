"""The sampler that a study names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from orchestrator.sampling.costs import Costs
from orchestrator.sampling.recipe_sampler import Facts, RecipeSampler
from orchestrator.sampling.recipes import Space
from orchestrator.study.sampler import SamplerSection
from orchestrator.study.scalars import SAMPLER_GROUP
from workers.trial import Recipe


@dataclass(frozen=True)
class Question:
    """What a study asks, as far as a sampler may know it; see :class:`orchestrator.sampling.recipe_sampler.RecipeSampler`."""

    space: Space
    objectives: Sequence[str]
    constraints: Sequence[str] = ()
    late: Collection[str] = ()
    conversions: Collection[str] = ()
    reference: Callable[[], Sequence[float] | None] = lambda: None
    facts: Facts | None = None
    costs: Costs | None = None
    possible: Callable[[Recipe], bool] = lambda recipe: True


def make_sampler(section: SamplerSection, question: Question) -> BaseSampler:
    """Returns the sampler of a study: ``recipe``, ``tpe``, ``nsga2``, ``random``, or one of the entry point group ``vitpareto.samplers``.

    Raises:
        ValueError: the sampler does not take the section's options.
    """
    own: dict[str, tuple[Callable[..., BaseSampler], Mapping[str, Any]]] = {
        "recipe": (RecipeSampler, {"n_startup_trials": section.n_startup_trials, **vars(question)}),
        "tpe": (
            optuna.samplers.TPESampler,
            {"multivariate": True, "group": True, "constant_liar": True, "n_startup_trials": section.n_startup_trials},
        ),
        "nsga2": (optuna.samplers.NSGAIISampler, {"population_size": section.population_size}),
        "random": (optuna.samplers.RandomSampler, {}),
    }
    if section.name in own:
        make, settings = own[section.name]
    else:
        (point,) = entry_points(group=SAMPLER_GROUP, name=section.name)
        make, settings = point.load(), {}
    try:
        with warnings.catch_warnings():  # multivariate, group and constant_liar are what we tested (docs/decisions)
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return make(**{"seed": section.seed, **settings, **section.options})
    except TypeError as error:
        raise ValueError(f"sampler.options: {section.name} does not take them: {error}") from None
