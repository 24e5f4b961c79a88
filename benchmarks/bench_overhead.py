"""The share of a digits trial's time that is not training, evaluation or measurement.

    python -m benchmarks.bench_overhead [--trials 16]

Runs the embedded quick study on a local Ray and adds up where each trial's time went, as its row says. ``other`` is what the
project itself costs inside a trial (loading and writing artefacts, building models, counting); ``stage_wait`` and
``lane_wait`` are waits for another trial's stage or measurement; ``between trials`` is the time in which a slot was free:
Ray's start and end, the driver, Tune.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter

from benchmarks.bench_sweep import machine
from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from orchestrator.sweep.driver import run_study
from workers.node.storage import open_storage


def main() -> None:
    """Prints the machine and one JSON object with seconds and shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    options = parser.parse_args()
    slots = os.cpu_count() or 1
    print(json.dumps(machine(slots)), flush=True)
    with tempfile.TemporaryDirectory(prefix="vitpareto-bench-") as folder:
        started = time.perf_counter()
        run = run_study(load_study("quick").model_copy(update={"trials": options.trials}), storage=folder, quiet=True)
        wall = time.perf_counter() - started
        rows = Ledger(open_storage(folder), run.name).trials(["seconds", "duration_s", "is_baseline"]).to_pylist()
    rows = [row for row in rows if not row["is_baseline"]]
    total = sum(row["duration_s"] for row in rows)
    spent: Counter[str] = Counter()
    for row in rows:
        spent.update(json.loads(row["seconds"]))
    print(
        json.dumps(
            {
                "trials": len(rows),
                "wall_s": round(wall, 1),
                "trial_seconds": round(total, 1),
                "share": {name: round(seconds / total, 3) for name, seconds in sorted(spent.items())},
                "not_training_evaluation_measurement": round(
                    1 - sum(spent[name] for name in ("train", "evaluate", "measure")) / total, 3
                ),
                "slots_busy_share_of_wall": round(total / (wall * slots), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
