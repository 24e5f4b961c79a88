"""What the driver spends on a trial, without Ray: CPU of asking, issuing and telling, as a study grows.

    python -m benchmarks.bench_driver --trials 1000 --trials 10000 [--study quick] [--sampler random]

Run from the repository root. Every trial is one proposal that is issued (``Sweep.next_work``), turned into what crosses the process
boundary, run by the worker's own code with a trial that returns at once (``run_specs``: its attempt file is written), and taken
back (``Sweep.ended``). ``driver_ms`` is CPU of the first, second and last of these: Optuna's own bookkeeping, the ask's file and the
sampler included; ``ask_tell_ms`` is the part inside the proposer (``Proposer.ask`` and ``tell``); ``worker_ms`` is CPU of the third. Means over
the last hundred trials before each size, one JSON object a line: of CPU, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bench_sweep import OBJECTIVES, machine
from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from orchestrator.study.schema import model_info
from orchestrator.sweep.state import Sweep, open_sweep
from orchestrator.sweep.trainable import run_specs
from workers.node.storage import LocalStorage
from workers.techniques import versions

WINDOW = 100
"""Trials that a mean is taken over."""


class Clock:
    """CPU milliseconds by name, summed."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the CPU time of the block."""
        start = time.process_time()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.process_time() - start) * 1e3

    def inside(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns ``function`` with its time added to ``name``."""

        def run(*arguments: Any, **named: Any) -> Any:
            with self.of(name):
                return function(*arguments, **named)

        return run


def open_bench(study: str, sampler: str | None, trials: int, folder: str) -> Sweep:
    """Opens a study of trivial trials in ``folder``, as the driver does."""
    path = Path(__file__).parents[1] / "search_spaces" / f"{study}.yaml"
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    values |= {"trials": trials, "objectives": list(OBJECTIVES), "constraints": []}
    if sampler is not None:
        values["sampler"] = {"name": sampler}
    config = load_study(values)
    context = config.context()
    ledger = Ledger(LocalStorage(folder), config.name, config.parsed_constraints(), context.digest)
    return open_sweep(
        config, context, model_info(context), ledger, storage_url=ledger.storage.url, token="", versions=versions()
    )


def main() -> None:
    """Prints the machine, then one line a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, action="append", help="a size; repeat it for several")
    parser.add_argument("--study", default="quick", help="a file of search_spaces")
    parser.add_argument("--sampler", help="instead of the study's")
    options = parser.parse_args()
    sizes = sorted(options.trials or [1000])
    print(json.dumps(machine(1)), flush=True)
    with tempfile.TemporaryDirectory(prefix="vitpareto-bench-") as folder:
        sweep = open_bench(options.study, options.sampler, sizes[-1], folder)
        clock = Clock()
        sweep.proposer.ask = clock.inside("ask_tell", sweep.proposer.ask)  # type: ignore[method-assign]
        sweep.proposer.tell = clock.inside("ask_tell", sweep.proposer.tell)  # type: ignore[method-assign]
        done = -1  # the baseline comes first
        while True:
            if done % WINDOW == 0:
                clock.ms.clear()
            with clock.of("driver"):
                work = sweep.next_work()
                text = json.dumps(work.to_dict("benchmarks.bench_sweep:trivial")) if work else ""
            if work is None:
                break
            with clock.of("worker"):
                outcomes = run_specs(json.loads(text))
            with clock.of("driver"):
                sweep.ended(work, outcomes)
            done += 1
            if done in sizes:
                means = {f"{name}_ms": round(ms / WINDOW, 2) for name, ms in sorted(clock.ms.items())}
                print(json.dumps({"trials": done, "sampler": sweep.config.sampler.name, **means}), flush=True)


if __name__ == "__main__":
    main()
