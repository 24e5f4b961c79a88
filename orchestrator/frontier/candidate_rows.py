"""Candidates as rows for people and programs: names, numbers, intervals and what must be said about their speeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.frontier import estimates
from orchestrator.frontier.candidates import Candidates, simulated
from orchestrator.frontier.objective_kinds import source_of
from orchestrator.ledger.columns import to_arrow
from orchestrator.ledger.snapshot import Snapshot
from orchestrator.ledger.text_columns import string_lists
from orchestrator.ledger.trials import DEFAULT_COLUMNS
from workers.metrics import INTERVALS, SPEED_OBJECTIVES

Numbers = npt.NDArray[np.int64]


def describe(
    snapshot: Snapshot, candidates: Candidates, rows: Numbers, groups: Sequence[Sequence[int]], numbers: Sequence[str]
) -> dict[str, Any]:
    """Returns the columns that describe ``rows``, ascending, reading what is not known yet for them only.

    Args:
        groups: candidates of the group of each of ``rows``.
        numbers: objectives and other numeric columns to show besides the usual ones.
    """
    everyone = np.unique(np.concatenate([rows, *(np.array(one, np.int64) for one in groups)]))
    names = list(dict.fromkeys([*DEFAULT_COLUMNS[:3], *numbers, *DEFAULT_COLUMNS]))
    asked = {source_of(name)[0] for name in numbers} & set(INTERVALS)
    known = candidates.some(rows).table
    missing = [name for name in names if name not in known.column_names]
    bounds = [f"{name}_{end}" for name in sorted(asked | SPEED_OBJECTIVES) for end in ("low", "high")]
    timed = bool(asked & SPEED_OBJECTIVES)
    more = ["trial_id", *bounds, *(["conditions"] if timed else [])]
    trials, of = candidates.trials(snapshot, [*dict.fromkeys([*missing, *more])], everyone)
    place = {row: i for i, row in enumerate(everyone.tolist())}
    first = _shown(candidates, everyone, of)
    here = first[np.searchsorted(everyone, rows)]
    read = trials.take(to_arrow(here))
    columns = {name: read[name] if name in missing else known[name] for name in [*names, "seeds"]}
    ids = trials["trial_id"].to_pylist()
    columns["members"] = string_lists([[ids[first[place[row]]] for row in one] for one in groups])
    flags = simulated(trials["conditions"], of, len(everyone)) if timed else np.zeros(len(everyone), np.bool_)
    columns["simulated"] = to_arrow(flags[np.searchsorted(everyone, rows)])
    measured = [s for s in sorted(asked | SPEED_OBJECTIVES) if trials[f"{s}_low"].null_count < len(trials)]
    return columns | _measured(snapshot, candidates, rows, asked, measured)


def _shown(candidates: Candidates, rows: Numbers, of: Numbers) -> Numbers:
    """Returns the position of each candidate's shown trial among the trials of ``rows``."""
    place = np.full(len(candidates), -1)
    place[rows] = np.arange(len(rows))
    mine = place[candidates.of] >= 0
    order = np.argsort(candidates.row[mine], kind="stable")
    ascending = candidates.row[mine][order]
    return np.searchsorted(ascending, candidates.numbers[rows])


def _measured(
    snapshot: Snapshot, candidates: Candidates, rows: Numbers, asked: set[str], measured: Sequence[str]
) -> dict[str, Any]:
    """Returns what is told from intervals: their ends, pooled values, ratios of speeds, and which are slower."""
    unknown = to_arrow(np.full(len(rows), np.nan))
    columns: dict[str, Any] = {f"{name}_{end}": unknown for name in sorted(asked) for end in ("low", "high")}
    columns |= {f"{name}_ratio": unknown for name in sorted(asked & SPEED_OBJECTIVES)}
    slower = np.zeros(len(rows), np.bool_)
    if measured:
        wanted = dict.fromkeys([c for name in measured for c in estimates.columns_of(name)])
        trials, of = candidates.trials(snapshot, [*wanted, "trial_id"], rows)
    for name in measured:
        found = estimates.estimate(name, snapshot, trials, of, len(rows))
        columns[name] = to_arrow(found.point)
        if name in asked:
            columns |= {f"{name}_low": to_arrow(found.low), f"{name}_high": to_arrow(found.high)}
        if name in SPEED_OBJECTIVES:
            slower |= found.slower(name)
            columns |= {f"{name}_ratio": to_arrow(found.ratio)} if name in asked else {}
    return {**columns, "slower_than_baseline": to_arrow(slower)}
