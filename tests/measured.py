"""Ledger rows with intervals, as measured trials have them, without training or timing anything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.ledger import Ledger
from tests.ledger_rows import make_row
from workers.evaluation import wilson

BASELINE_MS = 4.0


def measured_row(
    n: int,
    *,
    right: npt.NDArray[np.bool_] | None = None,
    ratio: float | None = None,
    sigma: float = 0.02,
    simulated: bool = False,
    seed: int = 0,
    bits: bool = True,
    **exact: float,
) -> dict[str, Any]:
    """Recipe ``n`` (0: the baseline).

    Args:
        right: which search images are right; None for no accuracy.
        ratio: latency over the strong baseline's; ``sigma``: standard deviation of its logarithm; None for no latency.
        bits: the ledger says which images were right.
        exact: further metrics.
    """
    metrics: dict[str, float] = dict(exact)
    row = make_row(n, seed=seed, metrics=metrics)
    row["measurements"] = []
    row["conditions"] = {"simulated": simulated}
    if right is not None:
        low, high = wilson(int(right.sum()), len(right))
        metrics |= {"top1_pct": 100 * float(right.mean()), "top1_pct_low": 100 * low, "top1_pct_high": 100 * high}
        conditions = {"correct": int(right.sum()), "images": len(right)}
        if bits:
            conditions["correct_bits"] = np.packbits(right).tobytes().hex()
        row["measurements"].append(record("accuracy_search", metrics["top1_pct"], "percent", conditions))
    if ratio is not None:
        metrics |= {"latency_ms_p50": ratio * BASELINE_MS, "latency_ms_p50_ratio": ratio}
        if n:
            wide = math.exp(1.959964 * sigma)
            metrics |= {
                "latency_ms_p50_low": ratio * BASELINE_MS / wide,
                "latency_ms_p50_high": ratio * BASELINE_MS * wide,
            }
        row["measurements"].append(record("latency", ratio * BASELINE_MS, "ms", {}, ratio=ratio))
    row["metrics"] = metrics
    return row


def record(
    kind: str, value: float, unit: str, conditions: dict[str, Any], ratio: float | None = None
) -> dict[str, Any]:
    """Fields of ``trial.Measurement``."""
    return {
        "kind": kind,
        "artefact": "k",
        "device": "cpu",
        "batch": 1,
        "resolution": 8,
        "protocol": "quick",
        "value": value,
        "unit": unit,
        "ratio": ratio,
        "ratio_low": None if ratio is None else ratio * 0.99,
        "ratio_high": None if ratio is None else ratio * 1.01,
        "samples": [],
        "baseline_samples": [],
        "conditions": conditions,
    }


def measure_again(ledger: Ledger, row: dict[str, Any], ratio: float) -> None:
    """Adds a further latency of a trial."""
    ledger.write_remeasurement(
        row["trial_id"], row["recipe_hash"], [record("latency", ratio * BASELINE_MS, "ms", {}, ratio=ratio)]
    )
