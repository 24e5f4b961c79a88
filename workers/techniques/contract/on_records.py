"""The contract's checks of the record, its rules and its config, and of draws and losses; asked once a technique."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import torch

from workers.techniques import registry
from workers.techniques.contract.models import build, classes, inputs, surroundings
from workers.techniques.contract.subject import Check, Subject, require, require_same
from workers.techniques.record import LossInputs, Options, Range, config_faults, defaults, domains, make_config
from workers.techniques.rules import Table


def record_is_complete(subject: Subject) -> None:
    """Version, source and every parameter's line are there; a technique that needs the teacher has a loss."""
    technique = subject.technique
    require(technique.version >= 1, f"version must be at least 1, is {technique.version}")
    require(technique.source, "source must name paper, arXiv id and section")
    require(technique.Config.__doc__, "Config must have a docstring of its own")
    undocumented = [field.name for field in fields(technique.Config) if not field.metadata["doc"]]
    require(not undocumented, f"parameters must say what they are: {', '.join(undocumented)}")
    alone = technique.needs_teacher(technique.Config()) and technique.loss is None
    require(not alone, "a technique that needs the teacher's logits must have a loss")


def rules_fit(subject: Subject) -> None:
    """Its rules name known things and contradict none; and where it may stand, surgery comes before conversion."""
    technique = subject.technique
    try:
        table = Table({**registry(), technique.name: technique})
    except ValueError as error:
        raise AssertionError(str(error)) from None
    known = {*table.techniques, *table.families}
    named = {name for rule in technique.rules for name in rule.others} | set(technique.either_order)
    require(named <= known, f"rules must name techniques or families; these are neither: {sorted(named - known)}")
    require(set(technique.not_on) <= {"cpu", "cuda"}, f"not_on must name cpu or cuda, names {list(technique.not_on)}")
    for other in table.techniques.values():
        if other.name == technique.name or not table.verdict(technique.name, other.name, "timm").allowed:
            continue
        for order in table.orders((technique.name, other.name)):
            first, then = (table.techniques[name] for name in order)
            require(
                (first.stage, then.stage) != ("conversion", "surgery"),
                f"{first.name} would come before {then.name}, though conversion comes after surgery: say in the family's "
                "before and after where it stands",
            )


def config_goes_through_json(subject: Subject) -> None:
    """Configs are frozen, and come back from JSON."""
    config_class = subject.technique.Config
    for values in ({}, subject.sample, subject.technique.identity or {}):
        config = make_config(config_class, values)
        require(make_config(config_class, json.loads(json.dumps(asdict(config)))) == config, f"{config} through JSON")
        for field in fields(config_class)[:1]:
            try:
                setattr(config, field.name, None)
            except FrozenInstanceError:
                continue
            require(False, "Config must be frozen: @dataclass(frozen=True)")


def defaults_and_searched_parts_are_allowed(subject: Subject) -> None:
    """Defaults and what is searched by default lie in the ranges and on their grids."""
    config_class = subject.technique.Config
    faults = config_faults(config_class, defaults(config_class))
    require(not faults, f"defaults must be allowed: {faults}")
    for name, domain in domains(config_class).items():
        searched = domain.search if isinstance(domain, Options) else (domain.search_low, domain.search_high)
        require(searched, f"{name}: searches nothing")
        for value in searched:
            require(domain.fault(value) is None, f"{name}: searches {value!r}, which {domain.fault(value)}")
        if isinstance(domain, Range):
            span = (domain.search_high - domain.search_low) / domain.search_step
            step = domain.search_step / domain.step
            require(_whole(span), f"{name}: the last step of what is searched misses its end")
            require(_whole(step), f"{name}: searches between the allowed values")


def _whole(number: float) -> bool:
    return abs(number - round(number)) <= 1e-6 * max(1.0, abs(number))


def what_is_out_of_range_gives_a_reason(subject: Subject) -> None:
    """Every parameter refuses what is not allowed, and says what it must be."""
    config_class = subject.technique.Config
    for name, domain in domains(config_class).items():
        wrong: list[Any] = ["no such value", None]
        if isinstance(domain, Range):
            wrong += [domain.low - domain.step, domain.high + domain.step, domain.low + domain.step / 3]
        for value in wrong:
            faults = config_faults(config_class, {name: value})
            said = [f"{n}: {rule}" for n, rule in faults]
            fits = [n for n, _ in faults] == [name] and faults[0][1].startswith("must be")
            require(fits, f"{name}={value!r} must be refused with what it must be; it says {said}")
            try:
                make_config(config_class, {name: value})
            except ValueError:
                continue
            require(False, f"{name}={value!r} must raise ValueError")
    require(config_faults(config_class, {"no_such_parameter": 1}), "an unknown parameter must be refused")


def same_seed_gives_the_same_model(subject: Subject) -> None:
    """Everything is drawn from ``surroundings.generator``."""
    torch.manual_seed(1)
    one = subject.apply()
    torch.manual_seed(2)
    two = subject.apply()
    require(one.resolved == two.resolved, f"the same seed must resolve the same: {one.resolved} and {two.resolved}")
    require_same(subject.logits(two.model), subject.logits(one.model), "the same seed must give the same logits")


def global_generator_is_left_alone(subject: Subject) -> None:
    """torch's global generator is where it was."""
    model = build(subject.variant)
    around, config = (
        surroundings(model, variant=subject.variant),
        make_config(subject.technique.Config, subject.sample),
    )
    state = torch.get_rng_state()
    subject.technique.apply(model, config, around)
    untouched = torch.equal(torch.get_rng_state(), state)
    require(untouched, "torch's global generator must be left alone: draw from surroundings.generator")


def changed_model_can_be_copied(subject: Subject) -> None:
    """A deep copy computes the same."""
    model = subject.apply().model
    require_same(subject.logits(copy.deepcopy(model)), subject.logits(model), "a copy's logits")


def extra_loss_trains_the_model(subject: Subject) -> None:
    """Where there is a loss, it is a number whose gradient reaches a parameter."""
    technique, variant = subject.technique, subject.variant
    if technique.loss is None:
        return
    config = make_config(technique.Config, subject.sample)
    model, shown = subject.apply().model.train(), inputs(variant)
    teacher = torch.randn(4, classes(variant), generator=torch.Generator().manual_seed(3))
    targets = torch.arange(4) % classes(variant)
    given = LossInputs(model, shown, model(shown), targets, teacher, 0.0, teacher=build(variant))
    term = technique.loss(given, config)
    require(term.extra.ndim == 0, f"the extra loss must be one number, has shape {tuple(term.extra.shape)}")
    term.extra.backward()  # type: ignore[no-untyped-call]
    reached = any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    require(reached, "the extra loss must have a gradient for some parameter")


ON_ONE_VARIANT: tuple[Check, ...] = (
    record_is_complete,
    rules_fit,
    config_goes_through_json,
    defaults_and_searched_parts_are_allowed,
    what_is_out_of_range_gives_a_reason,
    same_seed_gives_the_same_model,
    global_generator_is_left_alone,
    changed_model_can_be_copied,
    extra_loss_trains_the_model,
)
