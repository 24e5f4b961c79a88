"""What one parameter of a technique may be: listed values or a grid; and who chooses among them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

Key = TypeVar("Key")


class Suggest(Protocol):
    """Who answers: a sampler, a random source, or a recipe that is already known."""

    def categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Returns one of ``choices``."""

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        """Returns ``low`` plus a multiple of ``step``, at most ``high``."""

    def floating(self, name: str, low: float, high: float, step: float) -> float:
        """Returns ``low`` plus a multiple of ``step``, at most ``high``."""


@dataclass(frozen=True)
class Choices:
    """One of ``values``; a single one is fixed and never asked for."""

    values: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def ask(self, name: str, suggest: Suggest) -> Any:
        return self.values[0] if len(self) == 1 else suggest.categorical(name, self.values)


@dataclass(frozen=True)
class Grid:
    """``low``, ``low + step``, ... ``high``; of integers where all three are."""

    low: float
    high: float
    step: float

    @property
    def integral(self) -> bool:
        return all(isinstance(x, int) for x in (self.low, self.high, self.step))

    def __len__(self) -> int:
        return math.floor((self.high - self.low) / self.step + 1e-6) + 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        value = self.low + index * self.step
        return value if self.integral else round(float(value), 10)  # one float for each point: equal recipes are equal

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def ask(self, name: str, suggest: Suggest) -> Any:
        last = self[len(self) - 1]
        if len(self) == 1:
            return last
        if self.integral:
            return suggest.integer(name, int(self.low), int(last), int(self.step))
        value = suggest.floating(name, float(self.low), last, float(self.step))
        return self[min(max(round((value - self.low) / self.step), 0), len(self) - 1)]


Axis = Choices | Grid


def axis(spec: Any) -> Axis:
    """Returns what a resolved study says of one parameter: a list of values, or ``{"low", "high", "step"}``."""
    return Grid(**spec) if isinstance(spec, Mapping) else Choices(tuple(spec))


def config_at(axes: Mapping[Key, Axis], index: int) -> dict[Key, Any]:
    """Returns the config with this number, counting through the axes."""
    config = {}
    for name, values in axes.items():
        index, here = divmod(index, len(values))
        config[name] = values[here]
    return config


def count(axes: Mapping[Any, Axis]) -> int:
    """Returns how many configs there are."""
    return math.prod(map(len, axes.values()))
