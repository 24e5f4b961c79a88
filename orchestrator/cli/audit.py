"""The command ``audit``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.io import Format, FormatOption, UsageError, reported, say, write_dicts

if TYPE_CHECKING:
    from orchestrator.study.sampler import SamplerSection
    from orchestrator.sweep.audit import Audit

DIRECTIONS = ("minimize", "maximize")


class Reference(StrEnum):
    """What a sampler is told of the reference point."""

    nadir = "nadir"
    unknown = "unknown"


@reported
def audit(
    table: Annotated[Path, typer.Option(help="Parquet file with a row a configuration and what it gives.")],
    parameters: Annotated[str, typer.Option(metavar="A,B", help="Columns that make a configuration.")],
    objectives: Annotated[str, typer.Option(metavar="A:minimize,B:maximize", help="Columns of what it gives.")],
    known: Annotated[str, typer.Option(metavar="B", help="Objectives that are known before an evaluation.")] = "",
    categorical: Annotated[str, typer.Option(metavar="A", help="Parameters of numbers without an order.")] = "",
    reference: Annotated[
        Reference, typer.Option(help="Whether samplers are told the reference point, as by a study, or assume one.")
    ] = Reference.nadir,
    sampler: Annotated[str | None, typer.Option(metavar="A,B", help="Samplers; default: all that ship.")] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Configurations that a sampler may look up.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each sampler, under the seeds 0, 1, ...")] = 10,
    format_: FormatOption = Format.table,
) -> None:
    """Runs samplers on a table of outcomes and says how much of its exact frontier each of them finds."""
    named = _names(parameters, "parameters")
    directions = _directions(objectives)
    _check_apart(named, directions)
    unordered = _subset(categorical, "categorical", named, "parameters")
    told = _subset(known, "known", list(directions), "objectives")
    if len(told) == len(directions):
        raise UsageError("--known: must leave an objective to be found out; name fewer")
    sections = _sections(sampler, seeds)
    from orchestrator.sampling.tables import read_outcomes
    from orchestrator.sweep.audit import Yardstick
    from orchestrator.sweep.audit import audit as run

    outcomes = read_outcomes(table, named, directions, unordered)
    if evaluations > len(outcomes):
        raise UsageError(f"--evaluations: must be at most the table's {len(outcomes):,} rows, got {evaluations:,}")
    yardstick = Yardstick(outcomes)
    rows: list[Audit] = []
    for same in sections:
        is_told = reference is Reference.nadir
        found = [run(outcomes, yardstick, one, evaluations, told, told_reference=is_told) for one in same]
        say(_summary(found))
        rows += found
    write_dicts([_row(one, nested=format_ is Format.json) for one in rows], format_)


# --- options ----------------------------------------------------------------------------------------------------------


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    repeated = [name for at, name in enumerate(names) if name in names[:at]]
    if not all(names) or repeated:
        raise UsageError(f"--{option}: must be different names with commas between them, got {text!r}")
    return names


def _subset(text: str, option: str, known: list[str], of: str) -> list[str]:
    from orchestrator.study.yaml_lines import nearest

    names = _names(text, option) if text else []
    for name in names:
        if name not in known:
            raise UsageError(f"--{option}: must be among --{of}, got {name!r}; {nearest(name, known)}")
    return names


def _directions(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in _names(text, "objectives"):
        name, colon, direction = part.rpartition(":")
        if not colon or not name or direction not in DIRECTIONS:
            raise UsageError(
                f"--objectives: each must have a direction, NAME:minimize or NAME:maximize, got {part!r}; "
                f"for example {part.partition(':')[0] or 'latency'}:minimize"
            )
        if name in found:
            raise UsageError(f"--objectives: must be different names, {name!r} is there twice; remove one")
        found[name] = direction
    return found


def _check_apart(parameters: list[str], objectives: dict[str, str]) -> None:
    both = [name for name in parameters if name in objectives]
    if both:
        raise UsageError(f"--objectives: must not be parameters too, got {', '.join(both)}; remove it from one of them")


def _sections(text: str | None, seeds: int) -> list[list[SamplerSection]]:
    """Returns a section a seed for every sampler."""
    from orchestrator.study.sampler import SamplerSection
    from orchestrator.study.scalars import SAMPLERS, sampler_name

    names = list(SAMPLERS) if text is None else _names(text, "sampler")
    for name in names:
        try:
            sampler_name(name)
        except ValueError as error:
            remedy = (getattr(error, "context", None) or {}).get("remedy", "")
            raise UsageError(f"--sampler: {error}, got {name!r}; {remedy}") from None
    return [[SamplerSection(name=name, seed=seed) for seed in range(seeds)] for name in names]


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(audit: Audit, nested: bool) -> dict[str, Any]:
    """Returns a row; a curve is one value of JSON, and a column a point elsewhere."""
    row = vars(audit)
    if nested:
        return row
    return {name: value for name, value in row.items() if name != "curve"} | {
        f"hypervolume_share_{count}": share for count, share in audit.curve.items()
    }


def _summary(found: list[Audit]) -> str:
    from statistics import mean, median

    shares = sorted(one.hypervolume_share for one in found)
    return (
        f"{found[0].sampler}: {mean(shares):.3f} of the exact hypervolume after {found[0].evaluations} evaluations "
        f"(mean of {len(found)} seeds, {shares[0]:.3f} to {shares[-1]:.3f}), {sum(one.duplicates for one in found)} duplicates, "
        f"{median(one.ask_ms_p50 for one in found):.1f} ms an ask"
    )
