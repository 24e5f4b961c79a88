"""The command ``pareto``, and the frontier as ``run`` prints it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.io import (
    STORAGE,
    Format,
    FormatOption,
    NameArgument,
    StorageOption,
    UsageError,
    reported,
    say,
    write_table,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestrator.study.constraints import Constraint


@reported
def pareto(
    name: NameArgument,
    objectives: Annotated[str | None, typer.Option(help="Comma-separated; default: the study's own.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over the columns of trials.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Trials that break a constraint of the study too.")] = False,
    knee: Annotated[bool, typer.Option("--knee", help="Only the member that gives up least in all together.")] = False,
    budget: Annotated[
        list[str] | None, typer.Option(help="Best within, and nearest beyond: 'size_bytes<=6e6 and params<2e6'.")
    ] = None,
    members: Annotated[bool, typer.Option("--members", help="Lists the members of each group.")] = False,
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
) -> None:
    """Prints the Pareto frontier of the feasible trials, how sure each place on it is, or one choice from it.

    A budget that nothing keeps shows what comes nearest, with exit status 2.
    """
    if knee and budget:
        raise UsageError("--knee and --budget: must not go together; restrict the knee with --where")
    frontier(name, storage, objectives, where, everything, format_, knee=knee, budget=budget or (), members=members)


def frontier(
    name: str,
    storage: str,
    objectives: str | None = None,
    where: str | None = None,
    everything: bool = False,
    format_: Format = Format.table,
    *,
    knee: bool = False,
    budget: Sequence[str] = (),
    members: bool = False,
) -> None:
    """Prints a frontier; see :func:`pareto`."""
    from orchestrator.frontier import query
    from orchestrator.frontier.choosing import BEST
    from orchestrator.ledger.studies import open_ledger
    from orchestrator.ledger.text_columns import strings

    ledger = open_ledger(name, storage)
    config = (ledger.study_record() or {})["config"]
    wanted = (
        list(config["objectives"]) if objectives is None else [o.strip() for o in objectives.split(",") if o.strip()]
    )
    limits, chosen = _limits(budget), None
    if limits:
        rows, chosen = query.within_budget(ledger, wanted, limits, where, everything)
    else:
        rows = query.pareto(ledger, wanted, None, where, all_rows=everything)
    if not len(rows) and not limits:
        rule = (
            "meets the condition" if where else "is ok" + ("" if everything else " and keeps every constraint (--all)")
        )
        say(f"the frontier is empty: no trial {rule}")
    elif knee:
        rows = _knee(rows, wanted)
    if format_ is Format.table:
        shown = [*wanted, *(limit.metric for limit in limits)]
        write_table(_for_people(rows, shown, config["techniques"], chosen, members), format_)
        _explain(rows, wanted)
    else:
        write_table(rows if chosen is None else rows.add_column(0, "choice", strings(chosen)), format_)
    if chosen is not None and BEST not in chosen:
        nearest = "; what comes nearest is shown" if chosen else ""
        raise UsageError(f"--budget: no trial keeps {' and '.join(map(str, limits))}{nearest}; allow more")


def _limits(budget: Sequence[str]) -> list[Constraint]:
    from orchestrator.frontier.choosing import parse_budget
    from orchestrator.study.constraints import ConstraintError

    try:
        return parse_budget(budget)
    except ConstraintError as error:
        raise UsageError(f"--budget: {error}") from None


def _knee(rows: pa.Table, objectives: list[str]) -> pa.Table:
    """Returns the knee of the certain members (of all, where none is certain) and says why it is that one."""
    import numpy as np

    from orchestrator.frontier.choosing import knee
    from orchestrator.ledger.columns import booleans, floats
    from workers.metrics import OBJECTIVES

    certain = booleans(rows["certain"])
    chosen = np.flatnonzero(certain) if certain.any() else np.arange(len(rows))
    sign = [-1.0 if OBJECTIVES[name] == "maximize" else 1.0 for name in objectives]
    costs = np.stack([floats(rows[name])[chosen] for name in objectives], axis=1) * sign
    found = knee(costs)
    losses = ", ".join(f"{100 * loss:.0f} % in {o}" for o, loss in zip(objectives, found.losses.tolist(), strict=True))
    of = f"of {len(chosen)} {'certain' if certain.any() else 'possible'} members"
    if found.bulges:
        say(
            f"knee {of}: gives up {losses} of the frontier's extent, the least sum, so it lies farthest beyond the extremes"
        )
    else:
        say(f"there is no knee {of}: none gives up less in all than an extreme one; shown is the least sum, {losses}")
    return rows.slice(int(chosen[found.row]), 1)


# --- for people -------------------------------------------------------------------------------------------------------


def _for_people(
    rows: pa.Table, shown: list[str], searched: dict[str, Any], choice: list[str] | None, members: bool
) -> pa.Table:
    """Returns what fits a terminal, labels without what the study fixes; other formats have every column."""
    import pyarrow as pa

    from orchestrator.ledger.text_columns import strings
    from orchestrator.study.constraints import DROPS
    from orchestrator.words.interval_text import metric_text
    from orchestrator.words.labels import short_label
    from workers.trial import Recipe

    found = rows.to_pylist()
    drops = [drop for drop, accuracy in DROPS.items() if any(row[accuracy] is not None for row in found)]
    columns: dict[str, Any] = {} if choice is None else {"choice": strings(choice)}
    columns["trial_id"] = strings([row["trial_id"] for row in found])
    for name in dict.fromkeys([*shown, *drops]):
        columns[name] = strings([metric_text(name, row) for row in found])
    columns["probability"] = strings([f"{row['probability']:.2f}{'' if row['certain'] else ' ?'}" for row in found])
    labels = [short_label(Recipe.from_json(row["recipe"]), searched) for row in found]
    others = [row["members"][1:] for row in found]
    more = [" +" + (" ".join(ids) if members else str(len(ids))) if ids else "" for ids in others]
    columns["label"] = strings([label + text for label, text in zip(labels, more, strict=True)])
    return pa.table(columns)


def _explain(rows: pa.Table, objectives: list[str]) -> None:
    """Says in one line what ``?`` means and how far two speeds must lie apart to be told from each other."""
    from orchestrator.words.interval_text import share
    from workers.metrics import SPEED_OBJECTIVES

    said = []
    found = rows.to_pylist()
    if any(not row["certain"] for row in found):
        said.append(
            "? may belong to the frontier, with that probability of being non-dominated; without it 0.95 or more"
        )
    if any(len(row["members"]) > 1 for row in found):
        said.append("+n more that noise does not tell apart from it (--members)")
    for name in objectives:
        halves = [_half(row[f"{name}_low"], row[f"{name}_high"]) for row in found if name in SPEED_OBJECTIVES]
        known = [half for half in halves if half]
        if known:
            floor = math.expm1(math.sqrt(2) * statistics.median(known))
            said.append(f"the floor of {name} is {share(floor)}: two speeds nearer than that are not told apart")
    if said:
        say("; ".join(said))


def _half(low: float | None, high: float | None) -> float | None:
    return None if low is None or high is None or low <= 0 else math.log(high / low) / 2
