"""What it costs to know size, weights and MACs of a recipe before it is trained.

    python -m benchmarks.bench_facts [--recipes 200] [--models quick vit_small_patch16_224 vit_base_patch16_224]

Run from the repository root. ``quick`` is the embedded study; the others are models of timm at 224 pixels with the techniques of
``survey_cifar10``, on digits blown up to that size, so that no data set is needed: nothing is trained and no image looked at. One JSON
object a line: the machine; of each model the seconds of some recipes, in order, so that the first one with a surgery and the conversions that follow
it can be told apart; and recipes drawn as the random sampler draws them, one after the other, each with its surgery, under one seed. Seconds are of
the process's CPU time, on one thread, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from orchestrator.sweep.suggestions import RandomSuggest

from orchestrator.study.load import load_study
from orchestrator.study.schema import StudyConfig, model_info
from orchestrator.study.space import SearchSpace
from workers.metrics import EXACT
from workers.structure import Structures
from workers.techniques import registry
from workers.trial import Context, Recipe, Step

STUDIES = Path(__file__).parent.parent / "search_spaces"
SURVEY = "survey_cifar10"

STEPS: Sequence[Sequence[tuple[str, dict[str, Any]]]] = (
    [],
    [("weight_only", {"bits": 8})],
    [("weight_only", {"bits": 4})],
    [("magnitude_prune", {"mlp_ratio": 0.5})],
    [("magnitude_prune", {"mlp_ratio": 0.5}), ("weight_only", {"bits": 8})],
    [("magnitude_prune", {"mlp_ratio": 0.5}), ("precision", {})],
    [("distill", {"depth": 0.5}), ("magnitude_prune", {"mlp_ratio": 0.5}), ("tome", {"r": 2})],
    [("nystrom", {"landmarks": 4})],
    [("nystrom", {"landmarks": 4}), ("static_int8", {})],
)
"""Told apart in the first part: what a surgery costs, and what a further conversion of it does."""


def study(model: str) -> StudyConfig:
    """Returns ``quick``, or the survey's with a model of timm and data that is there."""
    if model == "quick":
        return load_study(STUDIES / "quick.yaml")
    asked = yaml.safe_load((STUDIES / f"{SURVEY}.yaml").read_text())
    data = {"kind": "digits", "image_size": 224}
    return load_study({**asked, "model": {"name": model, "train": True}, "data": data, "device": "cpu", "recipes": []})


def recipe(steps: Sequence[tuple[str, dict[str, Any]]]) -> Recipe:
    known = registry()
    return Recipe(tuple(Step(name, asdict(known[name].Config(**values))) for name, values in steps))


def told_apart(context: Context) -> Iterator[dict[str, Any]]:
    """Yields the cost of :data:`STEPS`, by one who has found nothing before."""
    structures = Structures(context, load_data=False)
    for steps in STEPS:
        wanted, start = recipe(steps), time.process_time()
        facts = structures.facts(wanted, 0)
        yield {"recipe": wanted.techniques, "seconds": round(time.process_time() - start, 4), **facts}


def drawn(config: StudyConfig, context: Context, count: int) -> dict[str, Any]:
    """Returns how long a sample of the study's space takes, and how much of it is known."""
    space = SearchSpace(config.techniques, model_info(context), max_techniques=config.max_techniques)
    structures, suggest = Structures(context, load_data=False), RandomSuggest(random.Random(0))
    seconds, known = list[float](), 0
    while len(seconds) < count:
        wanted = space.sample(suggest)
        if space.fault(wanted) is not None:
            continue
        start = time.process_time()
        known += structures.facts(wanted, 0).keys() >= set(EXACT)
        seconds.append(time.process_time() - start)
    ordered = sorted(seconds)
    at = {f"p{share}": round(ordered[int(share / 100 * (count - 1))], 4) for share in (50, 90, 100)}
    return {"recipes": count, "known": known, "recipes_per_s": round(count / sum(seconds), 1), "seconds": at}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=200)
    parser.add_argument(
        "--models", nargs="+", default=["quick", "vit_small_patch16_224", "vit_base_patch16_224"], metavar="MODEL"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"machine": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}))
    for model in arguments.models:
        config = study(model)
        context = config.context()
        for one in told_apart(context):
            print(json.dumps({"model": model, **one}), flush=True)
        print(json.dumps({"model": model, **drawn(config, context, arguments.recipes)}), flush=True)


if __name__ == "__main__":
    main()
