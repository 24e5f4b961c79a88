"""Optuna behind ask and tell: what was told can be rebuilt exactly, nothing is asked twice, failures say the right thing."""

from __future__ import annotations

import inspect
import json
import random
from typing import Any

import pytest
from optuna import samplers
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from orchestrator.sampling.recipe_sampler import RecipeSampler
from orchestrator.sampling.samplers import Question, make_sampler
from orchestrator.study.constraints import parse
from orchestrator.study.sampler import OPTIONS, SamplerSection
from orchestrator.study.space import SearchSpace
from orchestrator.sweep.searcher import Proposer
from orchestrator.sweep.work import Proposal
from tests.orchestrator.study.test_space import TECHNIQUES
from workers.techniques import composition
from workers.trial import Recipe, Step

OBJECTIVES = {"top1_pct": "maximize", "size_bytes": "minimize"}
FOUR = {"tome": {"r": {"low": 1, "high": 4, "step": 1}}}


def proposer(
    sampler: str = "tpe", techniques: Any = TECHNIQUES, constraints: tuple[str, ...] = (), **more: Any
) -> Proposer:
    section = SamplerSection(name=sampler, n_startup_trials=5, population_size=6)
    space, limits = SearchSpace(techniques), [parse(c) for c in constraints]
    question = Question(space, tuple(OBJECTIVES), tuple(map(str, limits)))
    return Proposer(space, OBJECTIVES, limits, make_sampler(section, question), **more)


def outcome(recipe: Recipe) -> tuple[list[str], list[dict[str, float]]]:
    """How a recipe ends under two seeds: one in four fails on its own account, one in eight loses its worker."""
    value = int(recipe.hash[:4], 16)
    metrics = {"top1_pct": value / 700.0, "size_bytes": float(value % 977) + 1.0}
    last = {0: "infeasible", 1: "timeout", 2: "worker_died"}.get(value % 8, "ok")
    return ["ok", last], [metrics, {k: v + 1.0 for k, v in metrics.items()} if last == "ok" else {}]


def told(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.system_attrs


@pytest.mark.parametrize("sampler", ["recipe", "tpe", "nsga2", "random"])
def test_the_optuna_study_is_rebuilt_exactly(sampler: str) -> None:
    first = [Recipe((Step("tome", {"r": 2, "proportional": True}),))]
    original = proposer(sampler, constraints=("size_bytes < 700",), first=first)
    generator = random.Random(3)
    asks: list[dict[str, Any]] = []
    ends: dict[int, tuple[list[str], list[dict[str, float]]]] = {}
    flying: list[Proposal] = []
    for _ in range(60):
        while len(flying) < 3:
            proposal, answered = original.ask()
            assert proposal is not None
            asks += [*answered, dict(proposal.state)]
            flying.append(proposal)
        ended = flying.pop(generator.randrange(3))
        ends[ended.number] = outcome(ended.recipe)
        original.tell(ended.number, *ends[ended.number])

    again = proposer(sampler, constraints=("size_bytes < 700",), first=first)
    again.restore(json.loads(json.dumps(asks)), ends)

    assert [told(t) for t in again.study.trials] == [told(t) for t in original.study.trials]
    states = {t.state for t in again.study.trials}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING}
    assert again.outcomes == original.outcomes
    issued = [again.ask()[0] for _ in flying]
    assert {(p.number, p.recipe.hash) for p in issued if p} == {(p.number, p.recipe.hash) for p in flying}
    fresh, _ = again.ask()
    assert fresh is not None
    assert fresh.number >= len(asks)


@pytest.mark.parametrize(
    "damage", [None, {"params": {"x": 1}}, {"distributions": {"x": "{}"}}, {"distributions": {"x": "no JSON"}}]
)
def test_a_lost_ask_keeps_the_numbers_right(damage: dict[str, Any] | None) -> None:
    original = proposer("random")
    asks = [dict(p.state) for p, _ in (original.ask() for _ in range(4)) if p]
    again = proposer("random")
    rest = [a for a in asks if a["number"] != 1]
    again.restore(rest if damage is None else [*rest, {**asks[1], **damage}], {})
    assert [t.state for t in again.study.trials] == [TrialState.RUNNING, TrialState.FAIL, *[TrialState.RUNNING] * 2]


@pytest.mark.parametrize("sampler", ["recipe", "tpe", "nsga2", "random"])
def test_nothing_is_asked_twice_and_an_exhausted_space_ends(sampler: str) -> None:
    made = proposer(sampler, FOUR)
    seen, duplicates = [], 0
    while True:
        proposal, answered = made.ask()
        duplicates += len(answered)
        if proposal is None:
            break
        seen.append(proposal.recipe.hash)
        made.tell(proposal.number, ["ok"], [{"top1_pct": 1.0, "size_bytes": 2.0}])
    assert len(seen) == len(set(seen)) == 4
    assert duplicates > 0
    answers = [t for t in made.study.trials if t.values]
    assert len(answers) == 4 + duplicates
    assert made.ask()[0] is None


def test_what_is_in_flight_or_given_up_is_not_asked_again() -> None:
    made = proposer("random", FOUR)
    proposals = [made.ask()[0] for _ in range(4)]
    assert len({p.recipe.hash for p in proposals if p}) == 4
    assert made.ask()[0] is None
    for proposal in proposals:
        assert proposal is not None
        made.tell(proposal.number, ["worker_died"], [{}])
    assert made.ask()[0] is None
    assert not made.outcomes


def test_no_forbidden_combination_is_asked_for() -> None:
    made = proposer("random")
    for _ in range(150):
        proposal, _ = made.ask()
        assert proposal is not None
        assert composition.fault(proposal.recipe.techniques, "timm") is None
        made.tell(proposal.number, *outcome(proposal.recipe))


def test_known_good_recipes_come_first() -> None:
    first = [Recipe((Step("tome", {"r": r}),)) for r in (3, 1, 3, 9)]  # one repeated, one outside the space
    made = proposer("tpe", FOUR, first=first)
    asked = [p.recipe for p, _ in (made.ask() for _ in range(4)) if p]
    assert asked[:2] == [first[0], first[1]]
    assert [recipe for recipe, _ in made.rejected] == [first[3]]


@pytest.mark.parametrize(
    ("statuses", "state", "known"),
    [
        (["ok", "ok"], TrialState.COMPLETE, True),
        (["ok", "infeasible"], TrialState.PRUNED, True),
        (["host_oom"], TrialState.PRUNED, True),
        (["cuda_oom"], TrialState.PRUNED, True),
        (["timeout"], TrialState.PRUNED, True),
        (["error"], TrialState.PRUNED, True),
        (["worker_died"], TrialState.FAIL, False),
        (["ok", "node_lost"], TrialState.FAIL, False),
        (["preempted"], TrialState.FAIL, False),
        (["storage_fault"], TrialState.FAIL, False),
    ],
)
def test_a_failure_is_told_by_whose_fault_it_is(statuses: list[str], state: TrialState, known: bool) -> None:
    made = proposer("random", FOUR)
    proposal, _ = made.ask()
    assert proposal is not None
    metrics = [{"top1_pct": 10.0 + n, "size_bytes": 100.0} for n in range(len(statuses))]
    made.tell(proposal.number, statuses, metrics)
    trial = made.study.trials[0]
    assert trial.state == state
    assert trial.values == ([10.5, 100.0] if state == TrialState.COMPLETE else None)  # the mean over seeds
    assert (proposal.recipe.hash in made.outcomes) == known


@pytest.mark.parametrize(
    ("status", "state"),
    [("ok", TrialState.COMPLETE), ("error", TrialState.PRUNED), ("worker_died", TrialState.FAIL)],
)
def test_duplicates_of_what_is_asked_again_get_its_new_answer(status: str, state: TrialState) -> None:
    made = proposer("random", FOUR)
    proposal, _ = made.ask()
    assert proposal is not None
    asks = [{**proposal.state, "number": 0}, {**proposal.state, "number": 1, "duplicate": True}]
    for known in (True, False):  # told in another process, and to be asked again
        resumed = proposer("random", FOUR)
        resumed.restore(asks, {0: (["error"], [{}])} if known else {})
        before = TrialState.PRUNED if known else TrialState.RUNNING
        assert [t.state for t in resumed.study.trials] == [before] * 2
    again, _ = resumed.ask()
    assert again is not None
    assert again.number == 0
    resumed.tell(0, [status], [{"top1_pct": 1.0, "size_bytes": 2.0}])
    assert [t.state for t in resumed.study.trials] == [state] * 2
    values = [1.0, 2.0] if status == "ok" else None
    assert [t.values for t in resumed.study.trials] == [values] * 2


@pytest.mark.parametrize(("size", "violation"), [(50.0, -50.0), (130.0, 30.0)])
def test_constraints_are_told_with_the_values(size: float, violation: float) -> None:
    made = proposer("tpe", FOUR, constraints=("size_bytes < 100",))
    proposal, _ = made.ask()
    assert proposal is not None
    made.tell(proposal.number, ["ok"], [{"top1_pct": 1.0, "size_bytes": size}])
    trial = made.study.trials[0]
    assert trial.state == TrialState.COMPLETE
    assert trial.constraints == {"size_bytes < 100": violation}


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("recipe", RecipeSampler),
        ("tpe", samplers.TPESampler),
        ("nsga2", samplers.NSGAIISampler),
        ("random", samplers.RandomSampler),
    ],
)
def test_a_study_may_name_the_arguments_that_optuna_s_samplers_take(name: str, sampler: type[BaseSampler]) -> None:
    taken = {n: p for n, p in inspect.signature(sampler).parameters.items() if n not in Question.__annotations__}
    objects = ("Callable", "BaseMutation", "BaseCrossover")  # what no file can hold
    expected = {n for n, p in taken.items() if not any(kind in str(p.annotation) for kind in objects)}
    assert set(OPTIONS[name].model_fields) == expected


# --- recipes that prove to be the same --------------------------------------------------------------------------------

CUTS = {"tome": {"r": {"low": 1, "high": 2, "step": 1}}, "dynamic_int8": {}}
"""Five recipes: two that change the structure, each with and without a conversion, and the conversion alone."""


def test_the_outcome_of_an_equal_recipe_is_told_without_a_run() -> None:
    """Once a study knows that two cuts are equal, what follows the one answers what follows the other."""
    made = proposer("random", CUTS)
    asks: list[dict[str, Any]] = []
    ends: dict[int, tuple[list[str], list[dict[str, float]]]] = {}
    cuts: dict[str, Recipe] = {}
    run: list[Recipe] = []
    while True:
        proposal, answered = made.ask()
        asks += answered
        if proposal is None:
            break
        run.append(proposal.recipe)
        state = dict(proposal.state)
        surgery = Recipe(tuple(step for step in proposal.recipe.steps if step.technique == "tome"))
        if surgery.steps and not any(surgery.hash == cut.hash for cut in cuts.values()):
            cuts[surgery.hash] = surgery
            if len(cuts) == 2:  # it proves to be equal to the one before
                first = next(cut for name, cut in cuts.items() if name != surgery.hash)
                stages_of = Recipe(first.steps + proposal.recipe.steps[len(surgery.steps) :])
                made.same(proposal.recipe, stages_of)
                state["stages_of"] = stages_of.to_json()
        asks.append(state)
        value = float(len(proposal.recipe.steps))
        ends[proposal.number] = (["ok"], [{"top1_pct": value, "size_bytes": value}])
        made.tell(proposal.number, *ends[proposal.number])
    assert len(cuts) == 2
    assert len(run) in (3, 4), "what the one cut has shown, with the conversion or without it, is told of the other"
    again = proposer("random", CUTS)
    again.restore(json.loads(json.dumps(asks)), ends)
    assert [told(t) for t in again.study.trials] == [told(t) for t in made.study.trials]
    assert again.ask()[0] is None


# --- another sampler than before --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [("tpe", "recipe"), ("recipe", "tpe"), ("random", "recipe")])
def test_a_study_may_go_on_with_another_sampler(before: str, after: str) -> None:
    """What was asked and told stays, under its numbers; who asks next learns from it and repeats none of it."""
    original = proposer(before)
    asks: list[dict[str, Any]] = []
    ends: dict[int, tuple[list[str], list[dict[str, float]]]] = {}
    for _ in range(20):
        proposal, answered = original.ask()
        assert proposal is not None
        asks += [*answered, dict(proposal.state)]
        ends[proposal.number] = ["ok"], [{"top1_pct": float(proposal.number), "size_bytes": 1.0 + proposal.number % 7}]
        original.tell(proposal.number, *ends[proposal.number])
    again = proposer(after)
    again.restore(json.loads(json.dumps(asks)), ends)
    assert [t.values for t in again.study.trials] == [t.values for t in original.study.trials]
    fresh = [again.ask()[0] for _ in range(8)]
    assert {p.recipe.hash for p in fresh if p}.isdisjoint(original.recipes)
    assert len({p.recipe.hash for p in fresh if p}) == 8
