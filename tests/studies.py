"""Small studies for tests: real digits, a ViT of two narrow blocks, trials of a fraction of a second."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from workers.trial import Recipe, Step

TINY_MODEL = {"create": {"width": 16, "depth": 2, "heads": 2, "patch": 4, "mlp_ratio": 2.0}}
ONE_EPOCH = {"baseline": {"epochs": 1}, "recovery": {"epochs": 1}}


ONE_WORKER = {"cpus": 1, "max_concurrent": 1}
"""Where trials side by side are not the point: each worker imports for seconds what its few trials need."""


def tiny_study(name: str = "tiny", **changes: Any) -> dict[str, Any]:
    """Returns a study that trains in seconds and searches four techniques."""
    study: dict[str, Any] = {
        "name": name,
        "model": TINY_MODEL,
        "data": {"kind": "digits", "train_limit": 300, "search_limit": 100, "report_limit": 100},
        "training": ONE_EPOCH,
        "objectives": ["top1_pct", "size_bytes"],
        "techniques": {
            "magnitude_prune": {
                "head_ratio": [0.0],
                "mlp_ratio": {"low": 0.1, "high": 0.6, "step": 0.1},
                "round_to": [1],
            },
            "tome": {"r": {"low": 1, "high": 2, "step": 1}},
            "dynamic_int8": {},
            "precision": {},
        },
        "sampler": {"name": "tpe", "n_startup_trials": 4},
        "trials": 6,
    }
    return {**study, **changes}


def fault_study(name: str, kinds: list[str], **changes: Any) -> dict[str, Any]:
    """Returns a study that searches the test technique ``fault`` only, each of ``kinds`` first."""
    study = {
        "techniques": {"fault": {"kind": kinds, "level": {"low": 0, "high": 20, "step": 1}}},
        "recipes": [[{"fault": {"kind": kind, "level": 0}}] for kind in kinds],
        "sampler": {"name": "random"},
        "trials": len(kinds),
    }
    return tiny_study(name, **{**study, **changes})


def recipe(*steps: tuple[str, dict[str, Any]]) -> Recipe:
    """Steps with the parameters that are not named at their defaults."""
    from workers.techniques import registry  # imports torch

    known = registry()
    return Recipe(tuple(Step(name, asdict(known[name].Config(**config))) for name, config in steps))
