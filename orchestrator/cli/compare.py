"""The command ``compare``."""

from __future__ import annotations

import json
from dataclasses import asdict
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
    from orchestrator.frontier.compare import Against, Comparison


@reported
def compare(
    name: NameArgument,
    trials: Annotated[list[str], typer.Argument(metavar="TRIAL TRIAL...", help="Trial ids, or the starts of them.")],
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
) -> None:
    """Sets trials side by side: what differs in their recipes, every metric, and whether noise tells them apart."""
    from orchestrator.frontier import compare as comparing
    from orchestrator.ledger.studies import open_ledger

    try:
        found = comparing.compare(open_ledger(name, storage), trials)
    except (LookupError, comparing.CompareError) as error:
        if type(error).__name__ == "StudyNotFound":
            raise
        raise UsageError(str(error)) from None
    if format_ is Format.json:
        print(json.dumps(asdict(found), indent=2))
        return
    import pyarrow as pa

    from orchestrator.ledger.text_columns import strings

    rows = _lines(found)
    write_table(pa.table({key: strings([row.get(key, "") for row in rows]) for key in rows[0]}), format_)
    if format_ is Format.table:
        say(f"each against {found.trials[0]}; 'cannot be told apart' is not 'the same': noise hides a difference")


def _lines(found: Comparison) -> list[dict[str, str]]:
    """Returns a row for each thing that differs in the recipes, each metric, how probably it is better, and the
    examples that only one has right."""
    from orchestrator.words.interval_text import metric_text

    heads = [f"{trial} against the first" for trial in found.trials[1:]]
    rows = [{"what": "recipe", **dict(zip(found.trials, found.labels, strict=True)), **dict.fromkeys(heads, "")}]
    for what, values in found.recipe.items():
        rows.append({"what": f"  {what}", **{t: _shown(v) for t, v in zip(found.trials, values, strict=True)}})
    for metric in found.metrics:
        line = {"what": metric.name}
        for trial, own, simulated in zip(found.trials, metric.values, found.simulated, strict=True):
            ends = {f"{metric.name}_{key}": own[key] for key in ("low", "high", "ratio")}
            line[trial] = metric_text(metric.name, {metric.name: own["value"], **ends, "simulated": simulated})
        line |= {head: _verdict(one) for head, one in zip(heads, metric.against, strict=True)}
        rows.append(line)
        if any(_chance(one) for one in metric.against):
            rows.append(
                {"what": "  probability of better", **dict(zip(heads, map(_chance, metric.against), strict=True))}
            )
        if any(one is not None and one.p_value is not None for one in metric.against):
            rows.append(
                {"what": "  right in one only", **dict(zip(heads, map(_examples, metric.against), strict=True))}
            )
    return rows


def _verdict(one: Against | None) -> str:
    if one is None:
        return ""
    known = one.low is not None and one.high is not None
    if one.difference is not None:
        ends = f" ({one.low:+.1f}..{one.high:+.1f})" if known else ""
        return f"{one.difference:+.2f} points{ends}, {one.verdict}"
    ends = f" ({one.low:.3f}..{one.high:.3f})" if known else ""
    return (f"times {one.ratio:.3f}{ends}, " if one.ratio is not None else "") + one.verdict


def _chance(one: Against | None) -> str:
    return "" if one is None or one.probability is None else f"{one.probability:.3f}"


def _examples(one: Against | None) -> str:
    if one is None or one.p_value is None:
        return ""
    return f"{one.only_first} lost, {one.only_this} won, p {one.p_value:.2g} ({one.test})"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return "yes" if value is True else str(value)
