"""``vitpareto pareto`` over a ledger of a million rows, process start included, beside stock ways to the same frontier.

    python -m benchmarks.bench_query [--rows 1000000] [--storage DIR]

Every arm computes the frontier of the same three objectives. Times are wall seconds of a whole fresh process (best and
median of several runs) for the ledger, and of the computation alone, in this process, for Optuna and pandas: their
process start and their loading are not counted, which favours them. Optuna and the naive filter get fewer rows, and
their numbers are for those rows; nothing is extrapolated.

The noisy arm is a study of 5,000 trials whose accuracies (287 images) and latencies (3 % each) are uncertain.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.frontier.dominance import nondominated
from orchestrator.ledger import Ledger
from orchestrator.ledger.schema import ATTEMPTS, MEASUREMENTS
from workers.evaluation import wilson
from workers.metrics import OBJECTIVES
from workers.node.storage import LocalStorage

STUDY = "million"
NAMES = ["top1_pct", "size_bytes", "latency_ms_p50"]
DIRECTIONS = [OBJECTIVES[name] for name in NAMES]
CONTEXT = "0123456789abcdef"
SLOW_ROWS = 20_000
PART_ROWS = 250_000
NOISY, NOISY_ROWS, IMAGES, NOISE = "noisy", 5_000, 287, 0.03
"""Study of the noisy arm, its rows, search images, and standard deviation of the logarithm of a latency."""

PROGRAM = """
import sys
from orchestrator.ledger import Ledger
from orchestrator.frontier.query import pareto
from orchestrator.words.rows import format_rows
from workers.node.storage import open_storage
ledger = Ledger(open_storage(sys.argv[1]), sys.argv[2])
format_rows(pareto(ledger, sys.argv[3].split(","), where=sys.argv[4] or None), "json", sys.stdout)
"""
"""What the command does, for the time before there is one."""


def synthetic(start: int, rows: int) -> pa.Table:
    """Returns ``rows`` attempts numbered from ``start``: two techniques each, one in twenty failed, row 0 the
    baseline."""
    rng, index = np.random.default_rng(start), np.arange(start, start + rows)
    text = pc.cast(pa.array(index), pa.string())
    strength, loss = rng.random(rows), rng.gamma(2.0, 2.0, rows)
    ok = (rng.random(rows) > 0.05) | (index == 0)
    values = {
        "top1_pct": 98.0 - 8.0 * strength**2 - loss,
        "size_bytes": 22e6 * (1.0 - 0.9 * strength * rng.random(rows)),
        "params": 5.7e6 * (1.0 - 0.5 * rng.random(rows)),
        "macs": 1.2e9 * (1.0 - 0.8 * strength),
        "latency_ms_p50": 9.0 * (1.0 - 0.6 * strength * rng.random(rows)),
    }
    ids = pa.array([f"{n * 0x9E3779B97F4A7C15 % 2**48:012x}" for n in index.tolist()])  # as random as digests
    r = pc.cast(pa.array(index % 24), pa.string())
    recipe = pc.binary_join_element_wise(
        '[{"technique":"tome","config":{"r":',
        r,
        ',"id":',
        text,
        '}},{"technique":"weight_only","config":{"bits":4}}]',
        "",
    )
    shared = {"study": STUDY, "techniques": "tome+weight_only", "context": CONTEXT, "device": "cpu"}
    columns = {f.name: pa.nulls(rows, f.type) for f in ATTEMPTS}
    columns |= {name: pa.array([value] * rows) for name, value in shared.items()}
    columns |= {name: pa.array(value, mask=~ok) for name, value in values.items()}
    columns |= {
        "trial_id": ids,
        "attempt_id": ids,
        "recipe_hash": pc.binary_join_element_wise(ids, "0123", ""),
        "recipe": recipe,
        "label": pc.binary_join_element_wise("tome(r=", r, ") + weight_only(bits=4) #", text, ""),
        "number": pa.array(index),
        "seed": pa.array(np.zeros(rows, np.int64)),
        "is_baseline": pa.array(index == 0),
        "status": pc.if_else(pa.array(ok), "ok", "timeout"),
        "started_at": pa.array(1_700_000_000_000_000 + index * 1_000_000).cast(ATTEMPTS.field("started_at").type),
        "duration_s": pa.array(rng.random(rows) * 60),
        "metrics": pc.binary_join_element_wise('{"id":', text, "}", ""),
    }
    return pa.table(columns, schema=ATTEMPTS)


def fill(ledger: Ledger, rows: int) -> None:
    """Writes the attempts through the ledger's own writer."""
    config = {"constraints": [], "objectives": dict(zip(NAMES, DIRECTIONS, strict=True))}
    ledger.write_study({"config": config, "context": CONTEXT})
    for start in range(0, rows, PART_ROWS):
        ledger.append(synthetic(start, min(PART_ROWS, rows - start)))


def noisy(rows: int) -> tuple[pa.Table, pa.Table]:
    """Returns attempts whose accuracies and latencies have intervals, and their records of which images were right."""
    table, rng = synthetic(0, rows), np.random.default_rng(3)
    true = table["top1_pct"].to_numpy() / 100
    ok = ~np.isnan(true)
    hard = 0.7 * rng.random(IMAGES) + 0.3 * rng.random((rows, IMAGES))  # the same images are hard for most
    right = (hard < np.nan_to_num(true)[:, None]) & ok[:, None]
    count = right.sum(axis=1)
    low, high = 100 * np.array([wilson(k, IMAGES) for k in count.tolist()]).T
    latency, wide = table["latency_ms_p50"].to_numpy() * np.exp(rng.normal(0, NOISE, rows)), np.exp(1.96 * NOISE)
    values = {"top1_pct": 100 * count / IMAGES, "top1_pct_low": low, "top1_pct_high": high}
    values |= {"latency_ms_p50": latency, "latency_ms_p50_ratio": latency / 9.0}
    values |= {"latency_ms_p50_low": latency / wide, "latency_ms_p50_high": latency * wide}
    for name, value in values.items():
        field = ATTEMPTS.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(value, field.type, mask=~ok))
    table = table.set_column(table.schema.get_field_index("study"), ATTEMPTS.field("study"), pa.array([NOISY] * rows))
    ids, kept = table["trial_id"].filter(pa.array(ok)), right[ok]
    texts = [
        json.dumps({"correct": int(one.sum()), "images": IMAGES, "correct_bits": np.packbits(one).tobytes().hex()})
        for one in kept
    ]
    columns = {f.name: pa.nulls(len(kept), f.type) for f in MEASUREMENTS}
    columns |= {"trial_id": ids, "attempt_id": ids, "position": pa.array(np.zeros(len(kept), np.int64))}
    columns |= {"kind": pa.array(["accuracy_search"] * len(kept)), "conditions": pa.array(texts)}
    return table, pa.table(columns, schema=MEASUREMENTS)


def command(storage: str, where: str, study: str = STUDY) -> list[str]:
    """Returns the command line that a user would run, or its equivalent where the command is not there."""
    objectives = ",".join(NAMES)
    if importlib.util.find_spec("orchestrator.cli") is None:
        return [sys.executable, "-c", PROGRAM, storage, study, objectives, where]
    found = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "pareto",
        study,
        "--objectives",
        objectives,
        "--storage",
        storage,
    ]
    return [*found, "--format", "json", *(["--where", where] if where else [])]


def fresh_process(storage: str, where: str, repeats: int, study: str = STUDY) -> tuple[list[float], int]:
    """Returns wall seconds of each run and the number of members."""
    root = Path(__file__).parent.parent
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        done = subprocess.run(command(storage, where, study), capture_output=True, text=True, cwd=root, check=False)
        seconds.append(time.perf_counter() - started)
        if done.returncode:
            raise SystemExit(done.stderr)
    return seconds, len(json.loads(done.stdout))


def timed(run: Callable[[], int]) -> tuple[float, int]:
    """Returns seconds and what ``run`` returned."""
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def with_optuna(values: np.ndarray) -> Callable[[], int]:
    """Optuna's ``study.best_trials`` on an in-memory study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=DIRECTIONS)
    study.add_trials([optuna.trial.create_trial(values=row.tolist()) for row in values])
    return lambda: len(study.best_trials)


def with_pandas(values: np.ndarray) -> Callable[[], int]:
    """The usual loop over a DataFrame: keep a row if no other one is as good everywhere and better somewhere."""
    import pandas as pd

    frame = pd.DataFrame(values * [-1 if d == "maximize" else 1 for d in DIRECTIONS], columns=NAMES)

    def naive() -> int:
        points = frame.to_numpy()
        return sum(not ((points <= p).all(axis=1) & (points < p).any(axis=1)).any() for p in points)

    return naive


def main() -> None:
    """Runs every arm and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--storage", help="keep the ledger there; a temporary folder otherwise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        storage = options.storage or temporary
        ledger = Ledger(LocalStorage(storage), STUDY)
        if not ledger.attempts(["trial_id"]).num_rows:
            started = time.perf_counter()
            fill(ledger, options.rows)
            print(f"wrote {options.rows:,} rows in {time.perf_counter() - started:.1f} s")
        uncertain = Ledger(LocalStorage(storage), NOISY)
        if not uncertain.attempts(["trial_id"]).num_rows:
            fill(uncertain, 0)
            uncertain.append(*noisy(NOISY_ROWS))
        report(ledger, storage, options.rows, options.repeats)


def report(ledger: Ledger, storage: str, rows: int, repeats: int) -> None:
    """Prints machine, versions and one line an arm."""
    versions = {p: importlib.metadata.version(p) for p in ("pyarrow", "duckdb", "moocore", "numpy", "optuna", "pandas")}
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}"
    )
    print("whole process:", " ".join(command("STORAGE", ""))[:120].replace(sys.executable, "python").splitlines()[0])
    print(f"{'arm':58} {'rows':>9} {'members':>7} {'best s':>8} {'median s':>8}")
    for label, where in (
        ("ledger, whole process", ""),
        ("ledger, whole process, --where", "size_bytes < 4e6 and top1_pct_drop <= 8"),
    ):
        seconds, members = fresh_process(storage, where, repeats)
        line(label, rows, members, min(seconds), statistics.median(seconds))
    seconds, members = fresh_process(storage, "", repeats, NOISY)
    line("noisy ledger, whole process", NOISY_ROWS, members, min(seconds), statistics.median(seconds))
    command_line = [sys.executable, "-c", "pass"]
    empty = [timed(lambda: subprocess.run(command_line, check=True).returncode)[0] for _ in range(repeats)]
    line("python -c pass", 0, 0, min(empty), statistics.median(empty))
    table = ledger.trials([*NAMES, "status"])
    table = table.filter(pc.equal(table["status"], "ok"))
    values = np.stack([table[name].to_numpy() for name in NAMES], axis=1)
    for label, arm, size in [
        ("moocore on arrays, computation alone", lambda v: lambda: int(nondominated(v, DIRECTIONS).sum()), len(values)),
        ("moocore on arrays, computation alone", lambda v: lambda: int(nondominated(v, DIRECTIONS).sum()), SLOW_ROWS),
        ("Optuna study.best_trials, computation alone", with_optuna, SLOW_ROWS),
        ("pandas and a naive loop, computation alone", with_pandas, SLOW_ROWS),
    ]:
        run = arm(values[:size])
        times = [timed(run) for _ in range(min(repeats, 2))]
        line(label, size, times[0][1], min(t for t, _ in times), statistics.median(t for t, _ in times))


def line(label: str, rows: int, members: int, best: float, median: float) -> None:
    """Prints one line of the table."""
    print(f"{label:58} {rows:9,} {members:7,} {best:8.3f} {median:8.3f}", flush=True)


if __name__ == "__main__":
    main()
