"""The state of a running study, without Ray: what to run next, what came back, what is left of the budget.

The ledger is the source of truth. A sweep is rebuilt from it at every start, so that resuming is starting: trials that ended
are told to Optuna again, those in flight are issued again under their own numbers, the remaining budget is run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar, cast

from orchestrator.ledger import Ledger, LedgerError, attempt_row
from orchestrator.ledger.spent import NOTHING, Spent, add
from orchestrator.ledger.stopped import STOPPED, rungs
from orchestrator.study import constraints
from orchestrator.study.constraints import DROPS
from orchestrator.study.schema import StudyConfig
from orchestrator.sweep import points
from orchestrator.sweep.halving import Halving
from orchestrator.sweep.losses import lost_trial
from orchestrator.sweep.searcher import Proposer
from orchestrator.sweep.work import Snapshot, Work
from workers.node.lease import Lease
from workers.node.storage_faults import in_a_line
from workers.stages.graph import recovery_key
from workers.trial import INFRASTRUCTURE, Context, Recipe, TrialSpec, trial_id

RUNNER = "workers.run:run_trial"


F = TypeVar("F", bound=Callable[..., Any])

STORAGE_PATIENCE_S = (2.0, 4.0, 60.0)
"""Seconds without new work after a fault of the storage, the factor for each further one in a row, and the most: what passes by
itself costs no retries."""


def _pauses(method: F) -> F:
    """Makes a study pause where its driver cannot write or read: what was on its way is found again by the next run."""

    @wraps(method)
    def run(self: Sweep, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except (OSError, LedgerError) as error:
            self.pause(in_a_line(error))
            return None

    return cast(F, run)


@dataclass
class Sweep:
    """A study on its way. Make one with :func:`orchestrator.sweep.opening.open_sweep`.

    Attributes:
        rows: trial id to (status, metrics) of accepted attempts in this context.
        exhausted: every recipe of the space has been run.
        stopping: None, or why nothing more is issued.
        paused: it stopped because of the storage; nothing that needs it is tried any more.
        forgiven: attempts that do not count, because what they failed at is asked again.
        resumed: numbers of the proposals that were in flight, or at a rung, when the sweep was opened.
        lease: of the study; while it is not secure nothing is issued. None where nobody else can be there.
        waiting: trials that waited for the lane, or for another's stage, when the marks were last read.
        halving: which proposals stand at a rung of their recovery training, and which of these go on.
        spent: trial id to the seconds that its attempts took.
        learnt: is told of each recipe that was trained.
        ended_works: how many works have come back, whatever became of them.
    """

    config: StudyConfig
    context: Context
    ledger: Ledger
    proposer: Proposer
    halving: Halving
    versions: Mapping[str, int]
    storage_url: str
    token: str
    started: float = field(default_factory=time.monotonic)
    baseline_at: float = field(default_factory=time.monotonic)
    rows: dict[str, tuple[str, dict[str, float]]] = field(default_factory=dict)
    baseline: dict[str, float] | None = None
    exhausted: bool = False
    stopping: str | None = None
    paused: bool = False
    forgiven: frozenset[str] = frozenset()
    open: dict[str, Work] = field(default_factory=dict)
    waiting: frozenset[str] = frozenset()
    issued: int = 0
    done_before: int = 0
    ended_works: int = 0
    learnt: Callable[[Recipe], object] = lambda recipe: None
    spent: dict[str, Spent] = field(default_factory=dict)
    lost_count: Counter[str] = field(default_factory=Counter)
    lease: Lease | None = None
    resumed: set[int] = field(default_factory=set)
    _retry: list[Work] = field(default_factory=list)
    _faults: int = 0
    _not_before: float = 0.0

    # --- issue --------------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Nothing is in flight and nothing more will be issued."""
        if self.open or not self._no_more():
            return False
        return self.stopping is not None or not (self._retry or self.halving.next(closing=True))

    def _no_more(self) -> bool:
        limit = self.config.budget.time
        if self.stopping is None and limit is not None and time.monotonic() - self.started > limit:
            self.stopping = "time budget used up"
        if self.stopping is not None:
            return True
        return self.baseline is not None and (self.issued >= self.config.trials or self.exhausted)

    @_pauses
    def next_work(self) -> Work | None:
        """Returns the next work, or None: wait (something is in flight, the storage did not answer a moment ago) or, where
        :attr:`finished`, nothing is left.
        """
        insecure = self.lease is not None and not self.lease.secure
        if self.stopping is not None or insecure or time.monotonic() < self._not_before:
            return None
        if self._retry:
            return self._issue(self._retry.pop(0))
        if self.baseline is None:
            return None if self.open else self._issue(self._baseline_work())
        over = self._no_more()  # which may be for want of time
        if self.stopping is None and (work := self._go_on(closing=over)) is not None:
            return self._issue(work)
        while not self._no_more():
            work = self._propose()
            if work is not None:
                return self._issue(work)
        if self.finished and self.stopping is None:
            self.close()
        return None

    def _issue(self, work: Work) -> Work:
        self.open[_key(work)] = work
        return work

    def baseline_spec(self) -> TrialSpec:
        """Returns the uncompressed model as a trial."""
        return self._spec(Recipe(), self.config.seeds[0])

    def _baseline_work(self) -> Work:
        return Work(None, Recipe(), (self.baseline_spec(),), None)

    def _go_on(self, *, closing: bool) -> Work | None:
        """Returns the work of a proposal that stood at a rung, None where none is to go on now."""
        while (found := self.halving.next(closing=closing)) is not None:
            number, until = found
            self.halving.take(number)
            proposal = self.proposer.open[number]
            if number in self.resumed:
                self.rows |= self.known([s.trial_id for s in self.specs(proposal.recipe)])
            specs = self._to_do(self.specs(proposal.recipe, until))
            if specs:
                return Work(number, proposal.recipe, specs, dict(proposal.state))
            self._settle(number, proposal.recipe)
        return None

    def close(self) -> None:
        """Tells Optuna of the proposals that stand at a rung when nothing goes on any more that they are stopped there."""
        for number in sorted(self.halving.waiting):
            self.halving.take(number)
            self._tell(number, self.proposer.open[number].recipe)

    def _propose(self) -> Work | None:
        """Asks once; None if the space is exhausted or the answer was in the ledger already."""
        proposal, answered = self.proposer.ask()
        for state in answered:
            self.ledger.write_ask(self.context.digest, int(state["number"]), state)
        if proposal is None:
            self.exhausted = True
            return None
        if proposal.number in self.resumed:  # a process that outlived its killed driver may have finished it since
            self.rows |= self.known([s.trial_id for s in self.specs(proposal.recipe)])
        specs = self._to_do(self.specs(proposal.recipe, self.halving.first))
        self.ledger.write_ask(
            self.context.digest, proposal.number, {**proposal.state, "specs": [s.to_dict() for s in specs]}
        )
        self.issued += 1
        if not specs:
            self._settle(proposal.number, proposal.recipe)
            return None
        return Work(proposal.number, proposal.recipe, specs, dict(proposal.state))

    def _to_do(self, specs: Sequence[TrialSpec]) -> tuple[TrialSpec, ...]:
        """Returns those of a recipe's trials that are left to run: none after a failure that says something about it."""
        statuses = [self.rows[s.trial_id][0] if s.trial_id in self.rows else None for s in specs]
        if any(status not in {None, "ok", STOPPED, *INFRASTRUCTURE} for status in statuses):
            return ()
        return tuple(s for s, status in zip(specs, statuses, strict=True) if status != "ok" and not self._is_there(s))

    def _is_there(self, spec: TrialSpec) -> bool:
        """Says whether a trial stands at the rung that it is to be trained to, or behind it."""
        return spec.until is not None and self.halving.reached(spec.trial_id) >= spec.until

    def known(self, trials: Sequence[str] | None) -> dict[str, tuple[str, dict[str, float]]]:
        """Returns accepted outcomes in the ledger (None: all of this context) that say something about their recipe; what stood at
        a rung when its worker was lost stands there."""
        found = self.ledger.outcomes(self.context.digest, trials, without=self.forgiven)
        known = {t: (s, m) for t, (s, m) in found.items() if s not in INFRASTRUCTURE}
        for trial, seen in rungs(self.ledger, self.context.digest, trials).items():
            self.halving.see(trial, seen)
            known.setdefault(trial, (STOPPED, seen[max(seen)]))
        return known

    def specs(self, recipe: Recipe, until: float | None = None) -> list[TrialSpec]:
        """Returns the trials of a recipe, one a seed; ``until`` a share of its recovery training."""
        return [self._spec(recipe, seed, until) for seed in self.config.seeds]

    def _spec(self, recipe: Recipe, seed: int, until: float | None = None) -> TrialSpec:
        named = [c.metric for c in self.config.parsed_constraints()]
        wanted = [*self.config.objectives, *(DROPS.get(m, m.removesuffix("_ratio")) for m in named)]
        identity = trial_id(recipe, seed, self.context, self.versions)
        return TrialSpec(
            study=self.config.name,
            trial_id=identity,
            recipe=recipe,
            seed=seed,
            context=self.context,
            storage=self.storage_url,
            storage_token=self.token,
            objectives=tuple(dict.fromkeys(wanted)),
            timeout_s=self.config.budget.trial_timeout,
            cpus=self.config.resources.cpus,
            gpus=self.config.resources.gpus,
            until=until,
        )

    # --- take back ----------------------------------------------------------------------------------------------------

    @_pauses
    def ended(self, work: Work, outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Takes what the trainable reported: the attempts are in the ledger already, unless the storage was at fault."""
        self.open.pop(_key(work), None)
        self.ended_works += 1
        for outcome in outcomes:
            self.rows[outcome["trial_id"]] = (outcome["status"], dict(outcome["metrics"]))
            add(self.spent, outcome["trial_id"], outcome.get("spent") or NOTHING)
            if outcome["status"] == STOPPED:
                self.halving.see(outcome["trial_id"], {outcome["rung"]: outcome["metrics"]})
        last = outcomes[-1] if outcomes else {}
        if last.get("status") == "storage_fault":
            self._lost(work, "storage_fault", str(last.get("failure")), recorded=bool(last.get("written", True)))
            return
        self._faults, self._not_before = 0, 0.0
        self._note_equal(work, outcomes)
        self._end(work)

    def _note_equal(self, work: Work, outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Keeps that a recipe's surgery made what another one's had made, under every seed: the sampler is told once for all."""
        firsts = {outcome.get("stages_of") for outcome in outcomes}
        (first,) = firsts if len(firsts) == 1 else (None,)
        if first is None or work.number is None or len(outcomes) < len(self.config.seeds):
            return
        specs = [spec.to_dict() for spec in work.specs]
        ask = {**(work.state or {}), "specs": specs, "stages_of": first}
        self.ledger.write_ask(self.context.digest, work.number, ask)
        self.proposer.same(work.recipe, Recipe.from_json(first))

    def _end(self, work: Work) -> None:
        if work.number is not None:
            self._settle(work.number, work.recipe)
            return
        status, metrics = self.rows[work.specs[0].trial_id]
        if status == "ok":
            self.learnt(Recipe())
            self.baseline, self.baseline_at = metrics, time.monotonic()
            self.halving.baseline = metrics
        else:
            self.stopping = f"the baseline failed ({status})"

    def _settle(self, number: int, recipe: Recipe) -> None:
        """Tells Optuna how a proposal ended, or that it stands at a rung."""
        if stands_at_rung(self.rows, [s.trial_id for s in self.specs(recipe)]):
            self.rest(number, recipe)
        else:
            self._tell(number, recipe)
            self.remember(number, recipe)
            self.learnt(recipe)

    def rest(self, number: int, recipe: Recipe) -> None:
        """Takes that a proposal stands at a rung."""
        share, metrics = self.halving.rest(number, recipe.hash, *self._training(recipe))
        self.proposer.pause(number, share, self.derived(metrics))

    def remember(self, number: int, recipe: Recipe) -> None:
        """Takes for later decisions what is known of a proposal that has ended."""
        self.halving.remember(number, recipe.hash, *self._training(recipe))

    def _training(self, recipe: Recipe) -> tuple[list[str], str | None]:
        """Returns the trials of a recipe and the key of their first one's recovery training."""
        specs = self.specs(recipe)
        return [s.trial_id for s in specs], recovery_key(recipe, specs[0].seed, self.context)

    def _tell(self, number: int, recipe: Recipe) -> None:
        found = [self.rows[s.trial_id] for s in self.specs(recipe) if s.trial_id in self.rows]
        metrics = [self.derived(m) for _, m in found]
        self.proposer.tell(number, [status for status, _ in found], metrics, self.spent_on(recipe))

    def spent_on(self, recipe: Recipe) -> dict[str, float] | None:
        """Returns the seconds of work that went into a recipe, all its seeds together; None where none are known."""
        found = [self.spent[s.trial_id] for s in self.specs(recipe) if s.trial_id in self.spent]
        return {name: sum(one[name] for one in found) for name in NOTHING} if found else None

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns metrics with what follows from the baseline's: drops and ratios."""
        return constraints.derived(metrics, self.baseline or {})

    @_pauses
    def lost(self, work: Work, status: str, reason: str) -> None:
        """Takes that the worker of ``work`` is gone, with ``status`` one of the failure classes.

        Attempts that it still wrote count. Infrastructure failures are retried ``retries`` times; every loss is recorded.
        Where the storage was at fault each time, the study pauses: the same would befall whatever is issued next.
        """
        self.open.pop(_key(work), None)
        self.ended_works += 1
        self._lost(work, status, reason, recorded=False)

    def _lost(self, work: Work, status: str, reason: str, *, recorded: bool) -> None:
        self._retry.append(work)  # until it is clear what becomes of it; a pause may come before that
        left = self._left(work)
        if left and not recorded:
            self._record_loss(left[0], status, reason, work.state)
        self._retry.pop()
        self.lost_count[_key(work)] += 1
        retry = status in INFRASTRUCTURE and self.lost_count[_key(work)] <= self.config.retries
        if left and (retry or status == "storage_fault"):
            self._retry.append(replace(work, specs=left))
        else:
            self._end(work)
        if left and status == "storage_fault":
            self._wait_for_storage()
            if not retry:
                self.pause(reason)

    def _wait_for_storage(self) -> None:
        now, (first, factor, most) = time.monotonic(), STORAGE_PATIENCE_S
        if now >= self._not_before:  # else it was issued before the fault that is waited for
            self._not_before = now + min(most, first * factor**self._faults)
            self._faults += 1

    def pause(self, reason: str) -> None:
        """Issues nothing more, because of the storage: nothing is told to Optuna, so that the next run asks again."""
        self.paused = True
        self.stopping = self.stopping or f"storage: {(reason.splitlines() or [''])[0]}"

    def _left(self, work: Work) -> tuple[TrialSpec, ...]:
        """Takes what the lost worker of ``work`` still wrote; returns the specs that are left to do."""
        self.rows |= self.known([s.trial_id for s in work.specs])
        return self._to_do(work.specs)

    @_pauses
    def again(self, work: Work) -> None:
        """Issues ``work`` once more without blame: the run around it ended, not its worker."""
        self.open.pop(_key(work), None)
        self._retry.append(work)
        left = self._left(work)
        self._retry.pop()
        if left:
            self._retry.append(replace(work, specs=left))
        else:
            self._end(work)

    def hand_back(self) -> None:
        """Takes what workers still wrote after the run around them ended; the others are in flight for the next driver."""
        for work in list(self.open.values()):
            self.again(work)

    def _record_loss(self, spec: TrialSpec, status: str, reason: str, state: Mapping[str, Any] | None) -> None:
        result = lost_trial(spec, status, reason, self.ledger.running().get(spec.trial_id, {}))
        self.ledger.write_attempt(attempt_row(spec, result, state))
        self.rows[spec.trial_id] = (status, {})

    # --- look ---------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Returns the progress as of now."""
        flying = {s.trial_id for w in self.open.values() for s in w.specs}
        ended = [status for trial, (status, _) in self.rows.items() if trial not in flying]
        done = self.issued - len([w for w in [*self.open.values(), *self._retry] if w.number is not None])
        elapsed = time.monotonic() - self.started
        here = done - self.done_before
        spent = time.monotonic() - self.baseline_at  # the baseline is made once, the rate is that of the trials
        left = spent / here * (self.config.trials - done) if here > 0 else None
        if left is not None and self.config.budget.time is not None:
            left = min(left, max(0.0, self.config.budget.time - elapsed))
        failed = Counter(s for s in ended if s not in ("ok", STOPPED))
        waiting = sum(any(s.trial_id in self.waiting for s in work.specs) for work in self.open.values())
        return Snapshot(
            done,
            self.config.trials,
            len(self.open) - waiting,
            waiting,
            failed,
            points.best(self.config, self.proposer, self.baseline),
            points.hypervolume(self.config, self.proposer, self.baseline),
            elapsed,
            left,
            self.stopping or "",
            ended.count(STOPPED),
        )


def _key(work: Work) -> str:
    return "baseline" if work.number is None else str(work.number)


def stands_at_rung(rows: Mapping[str, tuple[str, Mapping[str, float]]], trials: Sequence[str]) -> bool:
    """Says whether a recipe with these trials stands at a rung: none has failed, none is missing, and not all are at their end."""
    statuses = {rows[trial][0] if trial in rows else None for trial in trials}
    return STOPPED in statuses and statuses <= {"ok", STOPPED}
