"""Both sides of ``bench_budget`` on recipes that were run before: no training, no Ray, seconds a search. For quick experiments.

    python -m benchmarks.budget_replay --table digits_recipes.jsonl --side stock --side ours --seeds 10 --output replay.jsonl
    python -m benchmarks.bench_budget --output replay.jsonl --summary

The table is a file of JSON lines: ``steps`` (technique and searched parameters), ``metrics``, ``train_cpu`` and ``curve``, the accuracy after
each epoch of the recovery. The space is what the table spans. A recipe whose order the table lacks is looked up in the
table's order; one that it lacks altogether is infeasible and costs nothing. Ours is the real sweep, from sampler to ledger, with
a worker that looks up what the real one would train, and remembers which recoveries were trained how far.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.bench_budget import MOST_TRIALS, SIDES, line, read
from benchmarks.budget_curves import Run, Spent, quartiles
from benchmarks.budget_runs import OBJECTIVES, DefinedByRun, attempts, grouped_tpe, reference, spent_of, study
from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from orchestrator.study.schema import model_info
from orchestrator.study.space import SearchSpace
from orchestrator.sweep.opening import open_sweep
from orchestrator.sweep.trainable import run_specs
from workers.evaluation import wilson
from workers.node.storage import open_storage
from workers.techniques import registry, versions
from workers.training.settings import whole_epochs
from workers.trial import Recipe, StageRun, TrialResult, TrialSpec, digest

BASELINE = {"top1_pct": 98.60627177700349, "size_bytes": 814057.0, "params": 202186.0, "macs": 3495040.0}
"""Of the quick study, whose recipes the table holds."""

IMAGES, EPOCHS = 287, 8
"""Of the search split, and of a recovery training."""

CONVERSION_S = 0.02
"""CPU seconds of ``train`` that a conversion takes, median of the table's study run anew."""


class Table:
    """Recipes that were run."""

    def __init__(self, path: Path) -> None:
        self.rows = [json.loads(line) for line in path.read_text().splitlines()]
        self.known = {_name(row["steps"]): row for row in self.rows if row["status"] == "ok"}
        self.orders = list(dict.fromkeys(name for row in self.rows for name, _ in row["steps"]))
        self.curves = {_name(_surgery(row["steps"])): row["curve"][-EPOCHS - 1 :] for row in self.rows if row["curve"]}
        trained = [row for row in self.rows if row["train_cpu"] > 0 and len(row["curve"]) == EPOCHS + 1]
        self.seconds = {_name(_surgery(row["steps"])): row["train_cpu"] for row in trained}
        self.mean_s = fmean(self.seconds.values())

    def techniques(self) -> dict[str, dict[str, list[Any]]]:
        """Returns the search space that the table spans."""
        found: dict[str, dict[str, list[Any]]] = {}
        for name, config in (step for row in self.rows for step in row["steps"]):
            axes = found.setdefault(name, {})
            for parameter, value in config.items():
                if value not in axes.setdefault(parameter, []):
                    axes[parameter].append(value)
        return {name: {p: sorted(v) for p, v in axes.items()} for name, axes in found.items()}

    def steps(self, recipe: Recipe) -> list[list[Any]]:
        """Returns a recipe as the table's rows have theirs, in the table's order."""
        axes = self.techniques()
        steps = [[s.technique, {p: s.config[p] for p in axes[s.technique]}] for s in recipe.steps]
        return sorted(steps, key=lambda step: self.orders.index(step[0]))

    def training_s(self, steps: Sequence[Any]) -> float:
        """Returns what the recovery of a recipe's surgery takes; 0 where nothing is trained."""
        name = _name(_surgery(steps))
        return self.seconds.get(name, self.mean_s) if name in self.curves else 0.0


def _surgery(steps: Sequence[Any]) -> list[Any]:
    known = registry()
    return [step for step in steps if known[step[0]].stage == "surgery"]


def _name(steps: Sequence[Any]) -> str:
    return digest(steps)


class Worker:
    """Answers trials from the table; ``cached`` says whether recoveries are kept for whoever needs them again."""

    def __init__(self, table: Table, *, cached: bool) -> None:
        self.table, self.cached = table, cached
        self.trained: dict[str, float] = {}

    def run(self, spec: TrialSpec) -> TrialResult:
        """Returns what :func:`workers.run.run_trial` would."""
        if not spec.recipe.steps:
            return self._result(spec, "ok", BASELINE, 0.0)
        steps = self.table.steps(spec.recipe)
        row = self.table.known.get(_name(steps))
        if row is None:
            return self._result(spec, "infeasible", {}, 0.0)
        recovery = Recipe(tuple(s for s in spec.recipe.steps if registry()[s.technique].stage == "surgery")).hash
        before = self.trained.get(recovery, 0.0) if self.cached else 0.0
        goal = spec.until or 1.0
        whole = self.table.training_s(steps)
        spent = whole * max(0.0, goal - before)
        self.trained[recovery] = share = max(goal, before)
        if whole and share < 1.0:
            correct = round(self.table.curves[_name(_surgery(steps))][whole_epochs(share, EPOCHS)][1] * IMAGES / 100)
            low, high = wilson(correct, IMAGES)
            at = {"top1_pct": 100 * correct / IMAGES, "top1_pct_low": 100 * low, "top1_pct_high": 100 * high}
            return self._result(spec, "stopped", {**row["metrics"], **at}, spent, share)
        return self._result(spec, "ok", row["metrics"], spent)

    def _result(
        self, spec: TrialSpec, status: str, metrics: Mapping[str, float], train_s: float, rung: float | None = None
    ) -> TrialResult:
        whole = train_s + CONVERSION_S
        stages = (StageRun("recovery", spec.recipe.hash, False, train_s),) if train_s else ()
        seconds = dict.fromkeys(("train", "train_cpu", "cpu"), whole if metrics else 0.0)
        attempt, reason = secrets.token_hex(6), None if metrics else "not in the table"
        started = time.time() - whole  # so that it ends now, before what is begun next
        return TrialResult(
            spec.trial_id, attempt, status, reason, metrics, started, whole, stages=stages, seconds=seconds, rung=rung
        )


_WORKER: list[Worker] = []
"""The one that :func:`replayed` asks: a sweep names its runner, it does not hand it over."""


def replayed(spec: TrialSpec) -> TrialResult:
    """Runs a trial with the worker of the search that is going on."""
    return _WORKER[-1].run(spec)


class TableFacts:
    """What the table's recipes have without training, as the sweep's own facts tell it of real ones."""

    names = frozenset(("size_bytes", "macs"))

    def __init__(self, table: Table) -> None:
        self._table = table

    def of(self, recipe: Recipe) -> Mapping[str, float]:
        """Returns bytes and MACs; nothing of a recipe that the table lacks."""
        row = self._table.known.get(_name(self._table.steps(recipe)))
        return {name: row["metrics"][name] for name in self.names} if row else {}

    def ask_for(self, recipes: Sequence[Recipe]) -> None:
        """Nothing: all that can be known is."""

    def learnt(self, recipe: Recipe) -> None:
        """Nothing: a training tells no more."""


def ours(table: Table, asked: Mapping[str, Any], most_s: float) -> list[Spent]:
    """Runs the sweep of a study, one work after another, until it has trained for ``most_s``."""
    config = load_study(dict(asked))
    context = config.context()
    _WORKER.append(Worker(table, cached=True))
    spent = 0.0
    with tempfile.TemporaryDirectory(prefix="vitpareto-bench-") as folder:
        storage = open_storage(folder)
        ledger = Ledger(storage, config.name, (), context.digest)
        where = {"storage_url": storage.url, "token": "", "versions": versions(), "facts": TableFacts(table)}
        sweep = open_sweep(config, context, model_info(context), ledger, **where)
        while spent < most_s and (work := sweep.next_work()) is not None:
            outcomes = run_specs(work.to_dict("benchmarks.budget_replay:replayed"))
            sweep.ended(work, outcomes)
            spent += sum(outcome["spent"]["all"] for outcome in outcomes)
        return attempts(ledger)


def stock(table: Table, asked: Mapping[str, Any], seed: int) -> list[Spent]:
    """Asks TPE as OptunaSearch does for one trial at a time, and looks each up as if nothing were kept; what the table lacks is no trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = load_study(dict(asked))
    context, worker = config.context(), Worker(table, cached=False)
    space = DefinedByRun(SearchSpace(config.techniques, model_info(context), max_techniques=config.max_techniques))
    directions = list(OBJECTIVES.values())
    search = optuna.create_study(directions=directions, sampler=grouped_tpe(seed))
    worst: dict[str, float] = dict(asked["reference_point"])
    found: list[Spent] = []
    while sum(one.metrics is not None for one in found) < config.trials:
        trial = search.ask()
        recipe = Recipe.from_json(space(trial)["recipe"])
        done = worker.run(TrialSpec(config.name, str(len(found)), recipe, 0, context, ""))
        found.append(spent_of(done.status, done.seconds, done.metrics, done.duration_s, recipe.label()))
        search.tell(trial, list((found[-1].metrics or worst).values()))
    return found


def search(table: Table, side: str, seed: int, changes: Mapping[str, Any], most_s: float) -> Run:
    """Runs one search on the table."""
    techniques = table.techniques()
    corner = reference(BASELINE)
    asked = study("digits", None, {"techniques": techniques, "max_techniques": 4, "reference_point": corner, **changes})
    if side.startswith("stock"):
        trials = stock(table, asked, seed)
    else:
        sampler = {**asked.get("sampler", {}), "seed": seed}
        trials = ours(table, {**asked, "sampler": sampler, "trials": MOST_TRIALS}, most_s)
    base = {name: BASELINE[name] for name in OBJECTIVES}
    return Run("table", side, seed, OBJECTIVES, base, tuple(corner.values()), tuple(trials))


def main() -> None:
    """Appends a line a run, those that are there left out, and prints it in short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument(
        "--side", choices=tuple(SIDES), action="append", help="stock first, whose seconds end the others"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--startup", type=int, help="startup trials of our samplers")
    parser.add_argument("--most", type=float, default=0.5, help="share of stock's seconds after which the others end")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines")
    options = parser.parse_args()
    from benchmarks import budget_replay as here  # not __main__, whose worker the sweep's runner does not see

    table = here.Table(options.table)
    for side in options.side or ["stock", "ours"]:
        changes: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in SIDES[side].items()}
        if options.startup:
            changes["sampler"] = {**changes.get("sampler", {}), "n_startup_trials": options.startup}
        for seed in range(options.seeds):
            there = read(options.output)
            if ("table", side, seed) in {run.name for run in there}:
                continue
            spent = [run.spent() for run in there if run.side == "stock"]
            run = here.search(table, side, seed, changes, options.most * quartiles(spent)[1] if spent else 0.0)
            with options.output.open("a") as file:
                file.write(json.dumps(run.to_dict()) + "\n")
            print(json.dumps(line(run)), flush=True)


if __name__ == "__main__":
    main()
