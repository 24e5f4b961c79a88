"""Does the frontier hold? One list of recipes is run twice, under two names in one storage, and the two answers are compared.

Stages are shared, so that only evaluation and measurement are repeated. A certain member of one run that is certainly
dominated in the other (probability of being non-dominated at most 0.05) is a contradiction; there should be none.

    python -m benchmarks.bench_repeat [STUDY] [--trials N] [--storage DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from typing import Any

from benchmarks.bench_sweep import machine
from orchestrator import load_study, open_ledger, run_study
from orchestrator.frontier.membership import CERTAIN
from orchestrator.frontier.query import candidates

CERTAINLY_DOMINATED = 1 - CERTAIN


def standing(name: str, storage: str, objectives: list[str]) -> dict[str, dict[str, Any]]:
    """Returns recipe hash to row of a study's candidates."""
    found = candidates(open_ledger(name, storage), objectives, all_rows=True)
    return {row["recipe_hash"]: row for row in found.to_pylist()}


def contradictions(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the labels of certain members of ``one`` that are certainly dominated in ``other``."""
    return [
        row["label"]
        for recipe, row in one.items()
        if row["certain"] and recipe in other and other[recipe]["probability"] <= CERTAINLY_DOMINATED
    ]


def main() -> None:
    """Runs both and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="?", default="quick")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--storage")
    options = parser.parse_args()
    storage = options.storage or tempfile.mkdtemp(prefix="vitpareto-repeat-")
    config = load_study(options.study).model_copy(update={"trials": options.trials})
    names = [f"{config.name}-{run}" for run in ("first", "second")]
    for name in names:  # a random sampler draws the same recipes again; one that learns would follow the noise
        sampler = config.sampler.model_copy(update={"name": "random"})
        run_study(config.model_copy(update={"name": name, "sampler": sampler}), storage=storage, quiet=True)
    objectives = list(config.objectives)
    first, second = (standing(name, storage, objectives) for name in names)
    print(json.dumps({"machine": machine(os.cpu_count() or 1), "recipes_in_both": len(first.keys() & second.keys())}))
    for recipe in first.keys() & second.keys():
        rows = (first[recipe], second[recipe])
        numbers = {name: [round(r[name], 1) for r in rows if r[name] is not None] for name in objectives}
        print(json.dumps({"label": rows[0]["label"], "probability": [r["probability"] for r in rows], **numbers}))
    found = contradictions(first, second) + contradictions(second, first)
    certain = sum(r["certain"] for r in (*first.values(), *second.values()))
    print(json.dumps({"certain_members": certain, "contradictions": found}))


if __name__ == "__main__":
    main()
