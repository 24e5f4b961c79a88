"""Random answers to what a search space asks: anywhere in it, or near a recipe that is known."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

KEEP = 0.8
"""Share of a repeated recipe's parameters that its replacement keeps."""


class RandomSuggest:
    """Uniform draws, for recipes the sampler did not think of."""

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator

    def categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.generator.choice(choices)

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return low + step * self.generator.randint(0, (high - low) // step)

    def floating(self, name: str, low: float, high: float, step: float) -> float:
        return low + step * self.generator.randint(0, math.floor((high - low) / step + 1e-9))


class NearSuggest(RandomSuggest):
    """Draws near a recipe: each of its answers is kept with probability :data:`KEEP` where it is still a choice."""

    def __init__(self, generator: random.Random, params: Mapping[str, Any]) -> None:
        super().__init__(generator)
        self.params = params

    def _kept(self, name: str) -> bool:
        return name in self.params and self.generator.random() < KEEP

    def categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.params[name] if self._kept(name) else super().categorical(name, choices)

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return int(self.params[name]) if self._kept(name) else super().integer(name, low, high, step)

    def floating(self, name: str, low: float, high: float, step: float) -> float:
        return float(self.params[name]) if self._kept(name) else super().floating(name, low, high, step)


class GivenSuggest:
    """Answers as a trial did; KeyError for what it was not asked."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params

    def categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.params[name]

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return int(self.params[name])

    def floating(self, name: str, low: float, high: float, step: float) -> float:
        return float(self.params[name])
