from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import budget_replay
from benchmarks.budget_replay import CONVERSION_S, Table, Worker
from tests.studies import recipe
from workers.trial import Context, Recipe, TrialSpec

CONTEXT = Context({}, {}, {}, {})
CURVE = [[epoch, 50.0 + 5 * epoch] for epoch in range(9)]


def row(mlp_ratio: float, bits: int | None) -> dict[str, Any]:
    """A pruned model that took 4 s, or a conversion of it."""
    prune = ["magnitude_prune", {"head_ratio": 0.0, "mlp_ratio": mlp_ratio}]
    steps = [prune] if bits is None else [prune, ["weight_only", {"bits": bits, "group_size": 32}]]
    size = 400_000.0 * (1 - mlp_ratio) * (bits or 32) / 32
    metrics = {"top1_pct": 98.0 - 10 * mlp_ratio - 8 / (bits or 32), "size_bytes": size, "macs": 3e6 * (1 - mlp_ratio)}
    own = {"curve": CURVE, "train_cpu": 4.0} if bits is None else {"curve": [], "train_cpu": 0.0}
    return {"steps": steps, "status": "ok", "metrics": metrics, **own}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    file = tmp_path / "table.jsonl"
    rows = [row(mlp_ratio, bits) for mlp_ratio in (0.1, 0.3, 0.5) for bits in (None, 4, 8)]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return Table(file)


def pruned(*steps: tuple[str, dict[str, Any]]) -> Recipe:
    return recipe(("magnitude_prune", {"head_ratio": 0.0, "mlp_ratio": 0.3}), *steps)


def asked(one: Recipe, until: float | None = None) -> TrialSpec:
    return TrialSpec("s", "t", one, 0, CONTEXT, "", until=until)


def spent(seconds: Mapping[str, float]) -> float:
    return seconds["train"]


def test_a_conversion_of_what_was_trained_costs_itself(table: Table) -> None:
    worker, converted = Worker(table, cached=True), pruned(("weight_only", {"bits": 4, "group_size": 32}))
    assert spent(worker.run(asked(pruned())).seconds) == pytest.approx(4.0 + CONVERSION_S)
    found = worker.run(asked(converted))
    assert spent(found.seconds) == pytest.approx(CONVERSION_S)
    assert found.metrics == row(0.3, 4)["metrics"]
    assert spent(Worker(table, cached=False).run(asked(converted)).seconds) == pytest.approx(4.0 + CONVERSION_S)


def test_a_paused_recovery_goes_on_from_its_rung(table: Table) -> None:
    worker = Worker(table, cached=True)
    first = worker.run(asked(pruned(), until=0.125))
    assert (first.status, first.rung) == ("stopped", 0.125)
    assert first.metrics["top1_pct"] == pytest.approx(55.0, abs=0.2)  # of the curve, in whole images
    assert spent(first.seconds) == pytest.approx(0.5 + CONVERSION_S)
    last = worker.run(asked(pruned()))
    assert (last.status, last.metrics) == ("ok", row(0.3, None)["metrics"])
    assert spent(last.seconds) == pytest.approx(3.5 + CONVERSION_S)
    assert worker.run(asked(pruned(), until=0.125)).status == "ok", "it is at its end already"


def test_what_the_table_lacks_is_infeasible_and_free(table: Table) -> None:
    found = Worker(table, cached=True).run(asked(recipe(("magnitude_prune", {"mlp_ratio": 0.2}))))
    assert (found.status, spent(found.seconds)) == ("infeasible", 0.0)


def test_both_sides_search_the_table(table: Table) -> None:
    stock = budget_replay.search(table, "stock", 0, {"trials": 8}, 0.0)
    ours = budget_replay.search(table, "ours", 0, {"sampler": {"n_startup_trials": 2}}, 1e6)
    assert stock.spent() == pytest.approx(8 * (4.0 + CONVERSION_S))
    assert sum(trial.metrics is not None for trial in ours.trials) == 9  # all that the table has
    assert ours.spent() < 3 * 4.0 + len(ours.trials) * CONVERSION_S + 1e-6  # three recoveries, none twice
    assert ours.volume >= stock.volume
