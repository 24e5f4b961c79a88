"""Trials per second of the whole path with a trivial trial, against stock Ray Tune with OptunaSearch.

    python -m benchmarks.bench_sweep --trials 100 --trials 1000 [--side both] [--rounds 1] [--cpus 2] [--sampler random]

Run from the repository root. The sides run in turn, each in a fresh process with its own local Ray, the same number of CPUs,
one CPU a trial, actors reused, the same TPE (multivariate, group, constant liar) over optional techniques with two
objectives, and Tune's auto-loggers off, which favours the stock side. ``whole`` counts from the call to the return, start and
end of Ray included; ``steady`` counts from the end of the first trial to the end of the last; ``driver_cpu_s`` is CPU of the process
that drives, its imports and Ray's start included: between two sizes it says what a trial costs there. One JSON object a line.

What the sides do differently: ours also runs a baseline, writes one immutable file a trial before Tune hears of it, never
evaluates a recipe twice, and ends with Parquet and a frontier; stock keeps its experiment state only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from workers.trial import TrialResult, TrialSpec

STUDY = Path(__file__).parents[1] / "search_spaces" / "quick.yaml"
OBJECTIVES = {"top1_pct": "maximize", "size_bytes": "minimize"}
TECHNIQUES = 7
"""Of the quick study; the stock space has as many."""


def values_of(text: str) -> dict[str, float]:
    """Returns objectives that depend on the recipe's text only, in no time."""
    number = sum(text.encode()) % 997
    return {"top1_pct": 50.0 + number / 20, "size_bytes": 1e5 + 100.0 * (number * 37 % 991)}


# --- ours -------------------------------------------------------------------------------------------------------------


def trivial(spec: TrialSpec) -> TrialResult:
    """Runs nothing: what a worker calls in place of ``workers.run.run_trial``."""
    return TrialResult(
        trial_id=spec.trial_id,
        attempt_id=secrets.token_hex(6),
        status="ok",
        failure=None,
        metrics=values_of(spec.recipe.to_json()),
        started_at=time.time(),
        duration_s=0.0,
    )


def ours(trials: int, cpus: int, folder: str, sampler: str | None = None) -> list[float]:
    """Runs a study of ``trials`` trivial trials; returns the seconds since the epoch at which each ended.

    Args:
        sampler: instead of the study's own.
    """
    import yaml

    from orchestrator.ledger import Ledger
    from orchestrator.study.load import load_study
    from orchestrator.sweep import driver
    from workers.node.storage import open_storage

    study: dict[str, Any] = yaml.safe_load(STUDY.read_text())
    study |= {"trials": trials, "objectives": list(OBJECTIVES), "constraints": []}
    study["resources"] = {"cpus": 1, "max_concurrent": cpus}
    if sampler is not None:
        study["sampler"] = {"name": sampler}
    run = driver.run_study(load_study(study), storage=folder, quiet=True, runner="benchmarks.bench_sweep:trivial")
    assert run.complete, run.reason
    rows = Ledger(open_storage(folder), run.name).trials(columns=["started_at", "status"]).to_pylist()
    assert all(row["status"] == "ok" for row in rows)
    return sorted(seconds(row["started_at"]) for row in rows)


def seconds(moment: Any) -> float:
    """Returns seconds since the epoch of a number or a datetime."""
    return float(moment) if isinstance(moment, int | float) else float(moment.timestamp())


# --- stock ------------------------------------------------------------------------------------------------------------


def space(trial: Any) -> None:
    """Defines the space on an Optuna trial; at module level, because OptunaSearch pickles it."""
    for index in range(TECHNIQUES):
        if trial.suggest_categorical(f"use_{index}", [False, True]):
            trial.suggest_int(f"strength_{index}", 1, 12)


def stock(trials: int, cpus: int, folder: str) -> list[float]:
    """The same with OptunaSearch and a function trainable."""
    import optuna
    import ray
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    def trivial_trial(config: dict[str, Any]) -> None:
        tune.report({**values_of(json.dumps(config, sort_keys=True)), "ended_at": time.time()})

    sampler = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, n_startup_trials=6, seed=0)
    search = OptunaSearch(
        space, metric=list(OBJECTIVES), mode=[mode[:3] for mode in OBJECTIVES.values()], sampler=sampler
    )
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    tuner = tune.Tuner(
        tune.with_resources(trivial_trial, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(search, max_concurrent=cpus), num_samples=trials, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=folder, verbose=0),
    )
    results = tuner.fit()
    ray.shutdown()
    assert not results.errors, results.errors[0]
    return sorted(result.metrics["ended_at"] for result in results)


# --- both -------------------------------------------------------------------------------------------------------------


def measure(side: str, trials: int, cpus: int, sampler: str | None) -> dict[str, Any]:
    """Runs one side in this process; ``sampler`` is that of ours."""
    with tempfile.TemporaryDirectory(prefix="vitpareto-bench-") as folder:
        started, spent = time.perf_counter(), time.process_time()
        ends = stock(trials, cpus, folder) if side == "stock" else ours(trials, cpus, folder, sampler)
        whole, spent = time.perf_counter() - started, time.process_time() - spent
    return {
        "side": side,
        "sampler": sampler if side == "ours" else None,
        "trials": len(ends),
        "whole_s": round(whole, 2),
        "whole_trials_per_s": round(len(ends) / whole, 2),
        "steady_trials_per_s": round((len(ends) - 1) / (ends[-1] - ends[0]), 2),
        "driver_cpu_s": round(spent, 2),
    }


def in_fresh_process(side: str, trials: int, cpus: int, sampler: str | None) -> dict[str, Any]:
    """Runs one side in a new process without Ray's settings of this one."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.bench_sweep", "--inside", "--side", side]
    command += ["--trials", str(trials), "--cpus", str(cpus), *(["--sampler", sampler] if sampler else [])]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def machine(cpus: int) -> dict[str, Any]:
    """Returns what the numbers depend on."""
    return {
        "machine": platform.machine(),
        "cpus_used": cpus,
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("ray", "optuna", "torch", "pyarrow")},
    }


def main() -> None:
    """Prints the machine, then one line a side, size and round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, action="append", help="number of trials; repeat it for several sizes")
    parser.add_argument("--side", choices=("both", "ours", "stock"), default="both")
    parser.add_argument("--rounds", type=int, default=1, help="how often the pair runs")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of the local Ray, and trials at once")
    parser.add_argument("--sampler", help="of our side, instead of the quick study's")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.trials or [100]
    if options.inside:
        print(json.dumps(measure(options.side, sizes[0], options.cpus, options.sampler)))
        return
    print(json.dumps(machine(options.cpus)), flush=True)
    sides = ["stock", "ours"] if options.side == "both" else [options.side]
    for trials in sizes:
        for turn in range(options.rounds):
            for side in sides if turn % 2 == 0 else sides[::-1]:
                print(json.dumps(in_fresh_process(side, trials, options.cpus, options.sampler)), flush=True)


if __name__ == "__main__":
    main()
