"""The training seconds that a search needs for the hypervolume of stock Ray Tune with OptunaSearch and 60 trained recipes.

    python -m benchmarks.bench_budget --data digits --side stock --side ours --seeds 5 --output budget.jsonl
    python -m benchmarks.bench_budget --data cifar10 --path cifar10_subset.parquet --side stock --output budget.jsonl
    python -m benchmarks.bench_budget --output budget.jsonl --summary [--draw docs/images/budget.png]

Run from the repository root. Each run is a fresh process and a line of the output file; runs that the file holds are not
made again. The baseline is trained once, into the folder ``--baselines``, and no side pays for it. What the sides share and
where they differ: ``budget_runs.py``. The ablation is sides of their own, each the study with one part switched off.

``train_s`` is what the worker spends in surgery, recovery and conversion, the teacher's logits included, waiting left out;
``train_cpu_s`` are the CPU seconds of that, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.budget_curves import COSTS, Run, quartiles, share

SIDES: Mapping[str, Mapping[str, Any]] = {
    "stock": {},
    "stock-default": {},
    "ours": {},
    "tpe": {"sampler": {"name": "tpe"}},
    "no-facts": {"sampler": {"options": {"use_facts": False}}},
    "no-costs": {"sampler": {"options": {"use_costs": False}}},
    "no-halving": {"early_stopping": "none"},
    "tpe-no-halving": {"sampler": {"name": "tpe"}, "early_stopping": "none"},
}
"""Side to what it changes in the study. ``ours`` has every part on; the others lack what their name says, the last all but the
stages that recipes share."""

MOST_TRIALS = 300
"""Of this project's sides, which end when they have trained long enough."""


def read(path: Path) -> list[Run]:
    """Returns the runs that a file of JSON lines holds, none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Run.from_dict(json.loads(line)) for line in lines if line]


def make(order: Mapping[str, Any]) -> Run:
    """Makes one run in a new process, without Ray's settings of this one."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.bench_budget", "--output", "-", "--inside", json.dumps(order)]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return Run.from_dict(json.loads(done.stdout.strip().splitlines()[-1]))


def run_all(options: argparse.Namespace) -> None:
    """Makes the runs that are asked for and not there yet, seed by seed, and appends each as a line."""
    there = {run.name for run in read(options.output)}
    for seed in options.seeds:
        for side in options.side:
            if (options.data, side, seed) in there:
                continue
            stock = [r for r in read(options.output) if r.data == options.data and r.side == "stock"]
            if not side.startswith("stock") and not stock:
                raise SystemExit(f"--side {side}: a share needs stock's seconds; run --side stock first")
            changes = dict(SIDES[side])
            if side.startswith("stock"):
                changes["trials"], most = options.trials, 0.0
            else:
                changes["trials"] = MOST_TRIALS
                most = options.most * quartiles([run.spent("train_cpu_s") for run in stock])[1]
            folder = options.baselines / options.data
            order = {"data": options.data, "path": options.path, "side": side, "seed": seed}
            done = make({**order, "changes": changes, "folder": str(folder.absolute()), "most_s": most})
            with options.output.open("a") as file:
                file.write(json.dumps(done.to_dict()) + "\n")
            print(json.dumps(line(done)), flush=True)


def line(run: Run) -> dict[str, Any]:
    """Returns a run in short."""
    ok = [trial for trial in run.trials if trial.metrics is not None]
    told: dict[str, Any] = {"data": run.data, "side": run.side, "seed": run.seed, "attempts": len(run.trials)}
    told |= {"ok": len(ok), "recipes": len({trial.recipe for trial in ok}), "hypervolume": round(run.volume, 5)}
    return told | {cost: round(run.spent(cost), 1) for cost in COSTS} | {"wall_s": run.notes.get("wall_s")}


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns a row for each kind of data and side: what it needs for the level of stock, in seconds and as a share."""
    rows = []
    for data in sorted({run.data for run in runs}):
        here = [run for run in runs if run.data == data]
        stock = [run for run in here if run.side == "stock"]
        for side in [name for name in SIDES if any(run.side == name for run in here)]:
            its = [run for run in here if run.side == side]
            row: dict[str, Any] = {"data": data, "side": side, "seeds": len(its)}
            row["hypervolume"] = [round(value, 5) for value in quartiles([run.volume for run in its])]
            for cost in COSTS:
                found = share(stock, its, cost)
                row |= {"level": round(found.level, 5), "reached": found.reached}
                row[cost] = {"stock": round(found.stock, 1), "needed": _numbers(found.needed, 1)}
                row[cost]["share"] = _numbers(found.of_stock, 3)
            rows.append(row)
    return rows


def _numbers(values: Sequence[float], digits: int) -> list[float | str]:
    """Returns values for JSON, which has no infinity."""
    return [round(value, digits) if value != float("inf") else "not reached" for value in values]


def parser() -> argparse.ArgumentParser:
    """Returns the options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    made.add_argument("--path", help="Parquet file of CIFAR-10 with the columns image, label and split")
    made.add_argument("--side", choices=tuple(SIDES), action="append", help="repeat it for several")
    made.add_argument("--seeds", type=lambda text: range(int(text)), default=range(5), help="how many")
    made.add_argument("--seed", type=int, help="this one alone")
    made.add_argument("--trials", type=int, default=60, help="recipes of the stock side")
    made.add_argument(
        "--most", type=float, default=0.5, help="share of stock's CPU seconds of training after which the others end"
    )
    made.add_argument("--output", type=Path, required=True, help="file of JSON lines")
    made.add_argument("--baselines", type=Path, default=Path("results/budget"), help="folder of the trained baselines")
    made.add_argument("--summary", action="store_true", help="print a row a side instead of running")
    made.add_argument("--draw", type=Path, help="with --summary: a picture of the curves, .png or .svg")
    made.add_argument("--inside", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Prints a line a run, or a row a side."""
    options = parser().parse_args()
    if options.inside:
        from benchmarks.budget_runs import search

        print(json.dumps(search(json.loads(options.inside)).to_dict()))
        return
    if options.summary:
        runs = read(options.output)
        for row in summary(runs):
            print(json.dumps(row))
        if options.draw:
            from benchmarks.budget_picture import draw

            options.draw.write_bytes(draw(runs, options.draw.suffix.removeprefix(".")))
        return
    if options.data == "cifar10" and not options.path:
        raise SystemExit("--data cifar10: needs --path, the Parquet file of the images")
    options.seeds = options.seeds if options.seed is None else [options.seed]
    options.side = options.side or ["stock", "ours"]
    run_all(options)


if __name__ == "__main__":
    main()
