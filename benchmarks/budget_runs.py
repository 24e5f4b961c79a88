"""Runs of both sides of ``bench_budget``: stock Ray Tune with OptunaSearch, and this project, on one study and one worker.

What both sides share: the study, its data and its baseline (trained once, before, and paid by nobody), the worker that runs a
recipe (``workers.run.run_trial``), one CPU, one thread, one recipe at a time, and objectives that no noise of the machine
enters. No recipe is named to either of them as known to be good, and there is no constraint, since OptunaSearch takes none.

What stock gets: the conditional space, so that no illegal combination is drawn; and a new storage for each recipe, in which
the baseline lies and nothing else, so that every recipe is trained from there on.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from benchmarks.bench_sweep import machine
from benchmarks.budget_curves import Run, Spent
from orchestrator.frontier.dominance import default_reference
from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from orchestrator.study.schema import StudyConfig, model_info
from orchestrator.study.space import SearchSpace
from workers.node.storage import open_storage
from workers.run import run_trial
from workers.stages.workbench import Workbench
from workers.trial import Recipe, TrialResult, TrialSpec

STUDY = Path(__file__).parents[1] / "search_spaces" / "quick.yaml"
"""Whose techniques both sides search."""

OBJECTIVES = {"top1_pct": "maximize", "size_bytes": "minimize", "macs": "minimize"}
DROP_PCT = 10.0
"""Accuracy below that of the baseline at which the reference point lies, as the constraint of the quick study."""

CIFAR10: Mapping[str, Any] = {
    "model": {"create": {"width": 64, "depth": 4, "heads": 4, "patch": 8}},
    "training": {
        "baseline": {"epochs": 20, "batch_size": 64, "lr": 2.0e-3, "seed": 0},
        "recovery": {"epochs": 8, "batch_size": 64, "lr": 1.0e-3},
    },
}
"""What differs from the quick study on CIFAR-10: 17 tokens as there, out of 32 x 32 pixels."""

LIMITS: Mapping[str, int] = {"train_limit": 2000, "search_limit": 2000, "report_limit": 500}
"""Images of CIFAR-10, so that a stock search of 60 recipes takes minutes."""


def study(data: str, path: str | None = None, changes: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Returns the study of a kind of data, as its file would hold it, without a reference point.

    Args:
        data: ``digits`` or ``cifar10``.
        path: Parquet file with the columns image, label and split; of ``cifar10``.
        changes: keys of a study that are replaced.
    """
    made: dict[str, Any] = yaml.safe_load(STUDY.read_text())
    for key in ("constraints", "recipes", "sampler"):
        made.pop(key)
    made |= {"name": f"budget_{data}", "objectives": list(OBJECTIVES), "trials": 60, "seeds": [0]}
    made["resources"] = {"cpus": 1, "max_concurrent": 1}
    if data == "cifar10":
        made |= {**CIFAR10, "data": {"kind": "parquet", "path": path, **LIMITS}}
    return {**made, **changes}


# --- the worker -------------------------------------------------------------------------------------------------------


@contextmanager
def cpu_of_parts(spent: dict[str, float]) -> Iterator[None]:
    """Adds the CPU seconds of this process within each timed part of a trial to ``spent``, for the time of the block."""
    timed = Workbench.timed

    @contextmanager
    def both(self: Workbench, name: str) -> Iterator[None]:
        start = time.process_time()
        with timed(self, name):
            try:
                yield
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - start

    Workbench.timed = both  # type: ignore[method-assign]
    try:
        yield
    finally:
        Workbench.timed = timed  # type: ignore[method-assign]


def clocked(spec: TrialSpec) -> TrialResult:
    """Runs a trial as the worker does, and notes CPU seconds beside its wall seconds, which other work on the machine stretches."""
    parts: dict[str, float] = {}
    start = time.process_time()
    with cpu_of_parts(parts):
        result = run_trial(spec)
    cpu = {"train_cpu": parts.get("train", 0.0), "cpu": time.process_time() - start}
    return replace(result, seconds={**result.seconds, **cpu})


def spent_of(
    status: str, seconds: Mapping[str, float], metrics: Mapping[str, float], duration_s: float, recipe: str
) -> Spent:
    """Returns what an attempt cost, and its objectives where it was finished."""
    costs = {
        "train_s": seconds.get("train", 0.0),
        "train_cpu_s": seconds.get("train_cpu", 0.0),
        "cpu_s": seconds.get("cpu", 0.0),
        "trial_s": duration_s,
    }
    found = {name: metrics[name] for name in OBJECTIVES} if status == "ok" else None
    return Spent(costs, found, recipe, status)


# --- the baseline -----------------------------------------------------------------------------------------------------


def baseline(config: StudyConfig, folder: Path) -> tuple[TrialSpec, TrialResult]:
    """Trains the baseline into ``folder``, where it does not lie there; returns its trial and what it has found.

    Raises:
        RuntimeError: the baseline failed.
    """
    spec = TrialSpec(
        study=config.name,
        trial_id="baseline",
        recipe=Recipe(),
        seed=config.seeds[0],
        context=config.context(),
        storage=str(folder),
        objectives=tuple(config.objectives),
        cpus=config.resources.cpus,
    )
    result = run_trial(spec)
    if result.status != "ok":
        raise RuntimeError(f"the baseline failed: {result.status}: {result.failure}")
    return spec, result


def reference(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the reference point that the study states: the default one, with accuracy :data:`DROP_PCT` below the baseline's."""
    base = [metrics[name] for name in OBJECTIVES]
    stated = default_reference(base, list(OBJECTIVES.values()))
    found = dict(zip(OBJECTIVES, map(float, stated), strict=True))
    return {**found, "top1_pct": metrics["top1_pct"] - DROP_PCT}


def give_baseline(folder: Path, storage: Path) -> None:
    """Lays the baseline's stage, and nothing else, into a storage."""
    shutil.copytree(folder / "stages", storage / "stages")


# --- stock ------------------------------------------------------------------------------------------------------------


class DefinedByRun:
    """The study's conditional space as OptunaSearch takes it: a function of an Optuna trial. The recipe is a constant beside."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

    def __call__(self, trial: Any) -> dict[str, str]:
        """Asks ``trial`` as this project's own searcher does."""
        from orchestrator.sweep.searcher import TrialSuggest

        return {"recipe": self.space.sample(TrialSuggest(trial)).to_json()}


def alone(spec: TrialSpec, recipe: Recipe, folder: Path) -> TrialResult:
    """Runs a recipe in a storage of its own that holds the baseline, and removes it."""
    with tempfile.TemporaryDirectory(prefix="vitpareto-bench-") as storage:
        give_baseline(folder, Path(storage))
        return clocked(replace(spec, trial_id=recipe.hash[:12], recipe=recipe, storage=storage))


def grouped_tpe(seed: int) -> Any:
    """Returns TPE that is multivariate by groups of parameters, which Optuna calls experimental."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)


def stock(config: StudyConfig, folder: Path, sampler: str, seed: int) -> tuple[list[Spent], float]:
    """Searches with Ray Tune and OptunaSearch; returns the attempts in order and the wall seconds.

    A recipe that fails is reported at the reference point, where it adds nothing: a report that lacks an objective would
    end the sweep.

    Args:
        sampler: ``default`` is what OptunaSearch takes by itself (TPE, each parameter alone); ``group`` is TPE that is
            multivariate by groups, made for conditional spaces, and the better choice for it.
    """
    import optuna
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    from orchestrator.sweep.ray_session import connection

    spec = baseline(config, folder)[0]
    worst = dict(config.reference_point or {})

    def trainable(asked: dict[str, Any]) -> None:
        recipe = Recipe.from_json(asked["recipe"])
        done = alone(spec, recipe, folder)
        found = spent_of(done.status, done.seconds, done.metrics, done.duration_s, recipe.label())
        attempt = {"costs": dict(found.costs), "metrics": found.metrics, "recipe": found.recipe, "status": found.status}
        tune.report({**(found.metrics or worst), "attempt": json.dumps(attempt), "ended_at": time.time()})

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = OptunaSearch(
        DefinedByRun(SearchSpace(config.techniques, model_info(spec.context), max_techniques=config.max_techniques)),
        metric=list(OBJECTIVES),
        mode=[mode[:3] for mode in OBJECTIVES.values()],
        sampler=grouped_tpe(seed) if sampler == "group" else None,
        seed=seed if sampler == "default" else None,
    )
    with connection(config, None), tempfile.TemporaryDirectory(prefix="vitpareto-bench-") as results:
        started = time.perf_counter()
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=ConcurrencyLimiter(search, max_concurrent=1), num_samples=config.trials, reuse_actors=True
            ),
            run_config=tune.RunConfig(storage_path=results, verbose=0),
        )
        done = tuner.fit()
        wall = time.perf_counter() - started
    if done.errors:
        raise RuntimeError(f"{len(done.errors)} trials of the stock side raised, the first: {done.errors[0]}")
    rows = sorted((one.metrics for one in done), key=lambda row: row["ended_at"])
    return [Spent(**json.loads(row["attempt"])) for row in rows], wall


# --- ours -------------------------------------------------------------------------------------------------------------


def attempts(ledger: Ledger) -> list[Spent]:
    """Returns the attempts of a study in the order in which they ended, the baseline left out."""
    columns = ["label", "status", "metrics", "seconds", "duration_s", "started_at", "is_baseline"]
    rows = [row for row in ledger.attempts(columns).to_pylist() if not row["is_baseline"]]
    rows.sort(key=lambda row: row["started_at"].timestamp() + row["duration_s"])
    return [
        spent_of(
            row["status"],
            json.loads(row["seconds"] or "{}"),
            json.loads(row["metrics"]),
            row["duration_s"],
            row["label"],
        )
        for row in rows
    ]


@contextmanager
def ended_when(enough: Callable[[], bool], every_s: float = 2.0) -> Iterator[None]:
    """Ends a study that runs in the block as Ctrl-C does, once ``enough`` says so."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            if enough():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def ours(config: StudyConfig, folder: Path, most_s: float) -> tuple[list[Spent], float]:
    """Searches with this project until the study ends or has trained for ``most_s`` CPU seconds; returns attempts and wall seconds."""
    from orchestrator import run_study

    with tempfile.TemporaryDirectory(prefix="vitpareto-bench-") as results:
        give_baseline(folder, Path(results))
        ledger = Ledger(open_storage(results), config.name)

        def enough() -> bool:
            return sum(one.costs["train_cpu_s"] for one in attempts(ledger)) >= most_s

        started = time.perf_counter()
        with ended_when(enough):
            run_study(config, storage=results, quiet=True, runner="benchmarks.budget_runs:clocked")
        wall = time.perf_counter() - started
        return attempts(ledger), wall


# --- both -------------------------------------------------------------------------------------------------------------


def search(order: Mapping[str, Any]) -> Run:
    """Runs one search in this process.

    Args:
        order: ``data``, ``path``, ``side``, ``seed``, ``changes`` to the study, ``folder`` of the baseline, ``most_s``.
    """
    changes, seed = dict(order["changes"]), int(order["seed"])
    if not order["side"].startswith("stock"):
        changes["sampler"] = {**changes.get("sampler", {}), "seed": seed}
    asked = study(order["data"], order["path"], changes)
    metrics = baseline(load_study(asked), Path(order["folder"]))[1].metrics
    corner = reference(metrics)
    config = load_study({**asked, "reference_point": corner})
    if order["side"].startswith("stock"):
        _, _, sampler = order["side"].partition("-")
        trials, wall = stock(config, Path(order["folder"]), sampler or "group", seed)
    else:
        trials, wall = ours(config, Path(order["folder"]), float(order["most_s"]))
    base = {name: metrics[name] for name in OBJECTIVES}
    notes = {"wall_s": round(wall, 1), "study": asked, **conditions()}
    point = tuple(corner[name] for name in OBJECTIVES)
    return Run(order["data"], order["side"], seed, OBJECTIVES, base, point, tuple(trials), notes)


def conditions() -> dict[str, Any]:
    """Returns what the seconds depend on: machine, versions, commit."""
    here = machine(1)
    here["versions"] |= {"vitpareto": importlib.metadata.version("vitpareto")}
    told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=STUDY.parent, capture_output=True, text=True)
    return {**here, "commit": told.stdout.strip(), "run": secrets.token_hex(4)}
