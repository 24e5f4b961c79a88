"""Builds the sweep of a study from its ledger, which is how every driver begins, the first and whoever comes after a crash."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from orchestrator.ledger import Ledger
from orchestrator.ledger.spent import spent_by_trial
from orchestrator.ledger.stopped import STOPPED
from orchestrator.sampling.costs import Costs
from orchestrator.sampling.recipes import Key, RecipeKeys
from orchestrator.sampling.samplers import Question, make_sampler
from orchestrator.study import constraints
from orchestrator.study.schema import StudyConfig
from orchestrator.study.space import SearchSpace
from orchestrator.sweep import points
from orchestrator.sweep.facts import BackgroundFacts
from orchestrator.sweep.halving import Halving
from orchestrator.sweep.searcher import Proposer
from orchestrator.sweep.state import Sweep, stands_at_rung
from workers.metrics import DEVICE_BOUND
from workers.model_info import ModelInfo
from workers.techniques import registry
from workers.techniques.record import make_config
from workers.trial import Context, Recipe

Outcomes = dict[int, tuple[list[str], list[dict[str, float]]]]
"""Number of a proposal to the statuses and metrics of its trials."""


def open_sweep(
    config: StudyConfig,
    context: Context,
    info: ModelInfo,
    ledger: Ledger,
    *,
    storage_url: str,
    token: str,
    versions: Mapping[str, int],
    retry: Collection[str] = (),
    finish: Collection[str] = (),
    facts: BackgroundFacts | None = None,
) -> Sweep:
    """Builds the sweep of a study from its ledger: what ended is told to Optuna, what was in flight is issued again, what stands
    at a rung waits there. The trials in ``finish``, and with them their recipes, are brought to their end.

    Trials that ended in an infrastructure failure are in flight as well: they say nothing about their recipe. So are those
    that ended in a failure of a class in ``retry``. ``facts`` are what is known of recipes before they are trained.
    """
    space = SearchSpace(config.techniques, info, max_techniques=config.max_techniques)
    limits = config.parsed_constraints()

    def refusal(recipe: Recipe) -> str | None:
        known = facts.of(recipe) if facts and limits and sweep.baseline else None
        return space.fault(recipe) or (constraints.violation(known, sweep.baseline or {}, limits) if known else None)

    proposer = Proposer(
        space,
        config.objectives,
        config.parsed_constraints(),
        make_sampler(config.sampler, _question(config, space, lambda: sweep.baseline, refusal, facts)),
        first=config.known_good(),
        seed=config.sampler.seed,
        refusal=refusal,
    )
    halving = Halving(
        config.rungs, config.eta, config.objectives, config.parsed_constraints(), outcomes=proposer.outcomes
    )
    sweep = Sweep(config, context, ledger, proposer, halving, versions, storage_url, token)
    if facts is not None:
        sweep.learnt = facts.learnt
    if retry:
        sweep.forgiven = ledger.accepted_attempts(context.digest, retry)
    known = sweep.rows = sweep.known(None)
    base = sweep.baseline_spec().trial_id
    if known.get(base, ("",))[0] == "ok":
        sweep.baseline = halving.baseline = dict(known[base][1])
    asks = ledger.asks(context.digest)
    asked = {int(ask["number"]): Recipe.from_json(ask["recipe"]) for ask in asks if "specs" in ask}
    at_rung, outcomes = _ends(sweep, asked)
    sweep.spent = spent_by_trial(ledger, context.digest)
    spent = {n: found for n, recipe in asked.items() if (found := sweep.spent_on(recipe)) is not None}
    proposer.restore(asks, outcomes, spent)
    for number in at_rung:
        sweep.rest(number, asked[number])
    for number in outcomes:
        sweep.remember(number, asked[number])
    wanted = {n for n in at_rung if any(s.trial_id in finish for s in sweep.specs(asked[n]))}
    halving.finish |= wanted
    sweep.resumed = set(proposer.open)
    sweep.issued = len(asked) - len(sweep.resumed.difference(at_rung))  # these are issued, and counted, once more
    sweep.done_before = sweep.issued
    if sweep.finished and sweep.stopping is None:
        sweep.close()
    return sweep


def _question(
    config: StudyConfig,
    space: SearchSpace,
    baseline: Callable[[], Mapping[str, float] | None],
    refusal: Callable[[Recipe], str | None],
    facts: BackgroundFacts | None,
) -> Question:
    """Returns what the sampler is told of a study.

    Args:
        baseline: returns the metrics of the uncompressed model, None before they are known.
        refusal: says why a recipe is not run, or None.
        facts: what is known of recipes before they are trained.
    """
    known = registry()
    keys = RecipeKeys(space)

    def trains(surgery: Key) -> bool:
        steps = keys.recipe(surgery).steps
        return any(known[s.technique].trains(make_config(known[s.technique].Config, s.config)) for s in steps)

    def reference() -> list[float] | None:
        base = baseline()
        return None if base is None else points.reference(config, base)

    limits = {str(c): c.metric.removesuffix("_ratio") for c in config.parsed_constraints()}
    return Question(
        space,
        tuple(config.objectives),
        constraints=tuple(limits),
        late={*DEVICE_BOUND, *(text for text, metric in limits.items() if metric in DEVICE_BOUND)},
        conversions=[t for t in space.axes if known[t].stage == "conversion"],
        reference=reference,
        facts=facts,
        costs=Costs(trains),
        possible=lambda recipe: refusal(recipe) is None,
    )


def _ends(sweep: Sweep, asked: Mapping[int, Recipe]) -> tuple[list[int], Outcomes]:
    """Returns which proposals stand at a rung, and how those ended that have an end."""
    at_rung: list[int] = []
    outcomes: Outcomes = {}
    for number, recipe in asked.items():
        ids = [s.trial_id for s in sweep.specs(recipe)]
        found = [sweep.rows[i] for i in ids if i in sweep.rows]
        if stands_at_rung(sweep.rows, ids):
            at_rung.append(number)
        elif len(found) == len(ids) or any(status not in ("ok", STOPPED) for status, _ in found):
            outcomes[number] = ([status for status, _ in found], [sweep.derived(m) for _, m in found])
    return at_rung, outcomes
