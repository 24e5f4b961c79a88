"""A table of outcomes as a search space: what every configuration gives is known, so a sampler can be judged by what it finds.

A table becomes recipes of one made-up technique, :data:`TECHNIQUE`, whose parameters are the table's columns, so that samplers meet it as they meet a
study. A parameter of text or bool is one of its values in no order; one of numbers is asked for by the rank of its value (0, 1, ...), whatever the
distances between the values. The table need not hold every combination: what it lacks is infeasible, as a recipe that a model cannot take is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.study.axes import Axis, Choices, Grid, Suggest
from orchestrator.study.yaml_lines import nearest
from workers.trial import Recipe, Step

TECHNIQUE = "table"
"""Name of the technique that a configuration of a table passes for."""

Configuration = tuple[Any, ...]
"""A value of each axis, in the axes' order: of an ordered parameter its rank."""


class TableError(Exception):
    """A file is no table of outcomes, or not one of these columns."""


@dataclass(frozen=True)
class OutcomeTable:
    """Configurations and what each of them gives.

    Attributes:
        axes: parameter to its values, which are ranks where it is ordered.
        rows: configuration to its row in ``values``.
        objectives: name to direction, ``minimize`` or ``maximize``.
        values: (rows, objectives), in the table's own units.
    """

    axes: Mapping[str, Axis]
    rows: Mapping[Configuration, int]
    objectives: Mapping[str, str]
    values: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rows)

    def row_of(self, recipe: Recipe) -> int | None:
        """Returns the row of a recipe's configuration; None where the table does not have it."""
        config = recipe.steps[0].config
        return self.rows.get(tuple(config[name] for name in self.axes))

    def outcome(self, recipe: Recipe) -> dict[str, float]:
        """Returns what a recipe gives.

        Raises:
            KeyError: the table does not have it.
        """
        row = self.row_of(recipe)
        if row is None:
            raise KeyError(recipe.label())
        return dict(zip(self.objectives, self.values[row].tolist(), strict=True))


# --- the space --------------------------------------------------------------------------------------------------------


class TableSpace:
    """The configurations of a table as recipes, with what :class:`orchestrator.sweep.searcher.Proposer` and samplers ask of a space."""

    max_techniques = 1
    families: Sequence[tuple[str, tuple[str, ...]]] = [(TECHNIQUE, (TECHNIQUE,))]

    def __init__(self, table: OutcomeTable) -> None:
        self.table = table
        self.axes: Mapping[str, Mapping[str, Axis]] = {TECHNIQUE: table.axes}

    def legal_orders(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Returns the orders of a set of techniques: there is one technique."""
        return [(TECHNIQUE,)] if names == (TECHNIQUE,) else []

    def sample(self, suggest: Suggest) -> Recipe:
        """Draws a configuration, which :meth:`fault` may reject."""
        return _recipe({name: axis.ask(f"{TECHNIQUE}.{name}", suggest) for name, axis in self.table.axes.items()})

    def params_of(self, recipe: Recipe) -> dict[str, Any]:
        """Returns the answers that make :meth:`sample` yield ``recipe``."""
        config = recipe.steps[0].config
        return {f"{TECHNIQUE}.{name}": config[name] for name, axis in self.table.axes.items() if len(axis) > 1}

    def enumerate(self) -> Iterator[Recipe]:
        """Yields the recipe of every row once, lazily."""
        for configuration in self.table.rows:
            yield _recipe(dict(zip(self.table.axes, configuration, strict=True)))

    def size(self) -> int:
        """Returns the number of recipes that the table has."""
        return len(self.table)

    def fault(self, recipe: Recipe) -> str | None:
        """Returns why a recipe cannot be evaluated, or None."""
        return "the table has no row of this configuration" if self.table.row_of(recipe) is None else None


class TableFacts:
    """What is known of every configuration before it is evaluated: the columns ``names``."""

    def __init__(self, table: OutcomeTable, names: Sequence[str]) -> None:
        self.table = table
        self.names = frozenset(names)

    def of(self, recipe: Recipe) -> Mapping[str, float] | None:
        """Returns the known objectives of a recipe; None where the table does not have it."""
        if self.table.row_of(recipe) is None:
            return None
        return {name: value for name, value in self.table.outcome(recipe).items() if name in self.names}

    def ask_for(self, recipes: Sequence[Recipe]) -> None:
        """Does nothing: all that will be known is."""


def _recipe(config: Mapping[str, Any]) -> Recipe:
    return Recipe((Step(TECHNIQUE, dict(config)),))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_outcomes(
    file: Path, parameters: Sequence[str], objectives: Mapping[str, str], categorical: Sequence[str] = ()
) -> OutcomeTable:
    """Reads a Parquet file in which a row is a configuration and what it gives.

    Args:
        parameters: columns that make the configuration: text and bool are categorical, numbers ordered.
        objectives: columns of numbers, with the direction of each.
        categorical: parameters of numbers whose order means nothing.

    Raises:
        TableError: the file cannot be read, lacks a column, has one of another type or a value that is missing or not finite, or has two
            rows of one configuration: averaging them would hide a parameter that was left out.
    """
    wanted = [*parameters, *objectives]
    columns = _read_columns(file, wanted)
    axes: dict[str, Axis] = {}
    values: list[Sequence[Any]] = []
    for name in parameters:
        axes[name], coded = _axis(file, name, columns[name], name in categorical)
        values.append(coded)
    rows: dict[Configuration, int] = {}
    for row, configuration in enumerate(zip(*values, strict=True)):
        first = rows.setdefault(configuration, row)
        if first != row:
            raise TableError(
                f"{file}: a configuration must have one row, rows {first} and {row} are equal in {', '.join(parameters)}; "
                "name the parameter that tells them apart, or average them beforehand"
            )
    if not rows:
        raise TableError(f"{file}: must have a row a configuration, it has no rows")
    return OutcomeTable(axes, rows, dict(objectives), _outcomes(file, columns, list(objectives)))


def _read_columns(file: Path, wanted: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            missing = [name for name in wanted if name not in names]
            if missing:
                said = "; ".join(f"no {name} ({nearest(name, names)})" for name in missing)
                raise TableError(f"{file}: must have the columns {', '.join(wanted)}, it has {said}")
            table = parquet.read(columns=list(wanted))
    except FileNotFoundError:
        raise TableError(f"{file}: there is no such file; name the Parquet file of the table") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise TableError(f"{file}: must be a Parquet file, it cannot be read: {reason}") from None
    return {name: table[name] for name in wanted}


def _axis(file: Path, name: str, column: pa.ChunkedArray, categorical: bool) -> tuple[Axis, Sequence[Any]]:
    """Returns a parameter's axis, and the axis's value of every row."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)
    if not text and not _is_number(kind):
        raise TableError(f"{file}: a parameter must be text, bool or numbers, the column {name} is {kind}")
    _check_present(file, name, column)
    found = column.to_pylist()
    if categorical and not text:
        found = [str(value) for value in found]  # numbers that rise would be taken for a scale
    distinct = sorted(set(found))
    if text or categorical:
        return Choices(tuple(distinct)), found
    rank = {value: at for at, value in enumerate(distinct)}
    return Grid(0, len(distinct) - 1, 1), [rank[value] for value in found]


def _outcomes(file: Path, columns: Mapping[str, pa.ChunkedArray], objectives: Sequence[str]) -> npt.NDArray[np.float64]:
    for name in objectives:
        if not _is_number(columns[name].type):
            raise TableError(f"{file}: an objective must be numbers, the column {name} is {columns[name].type}")
        _check_present(file, name, columns[name])
    return np.column_stack([columns[name].to_numpy().astype(np.float64) for name in objectives])


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _check_present(file: Path, name: str, column: pa.ChunkedArray) -> None:
    """Refuses a column with a value that is missing, NaN or infinite."""
    known = ~column.is_null(nan_is_null=True).to_numpy()
    if pa.types.is_floating(column.type):
        known &= np.isfinite(column.fill_null(np.nan).to_numpy())
    if not known.all():
        row = int(np.argmin(known))
        raise TableError(
            f"{file}: every value must be there and finite, {name} is {column[row].as_py()} in row {row} "
            f"({int((~known).sum())} such rows); leave these rows out"
        )
