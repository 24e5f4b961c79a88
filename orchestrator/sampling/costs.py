"""Expected seconds of a recipe: what training takes, and whether it has been trained already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.sampling.outcomes import Outcomes
from orchestrator.sampling.recipes import Key

LEAST_S = 1e-3


class Costs:
    """Learns from what ended recipes took.

    A recipe that needs no training, or whose surgery has been trained for another one, costs what such recipes took in the
    mean: their conversion, their evaluation, their measurement. Another one also costs the mean training.

    Args:
        trains: says whether a recipe's surgery is followed by training.
    """

    def __init__(self, trains: Callable[[Key], bool]) -> None:
        self._trains = trains
        self._known: dict[Key, bool] = {}

    def trains(self, surgery: Key) -> bool:
        """Says whether a surgery is followed by training; asked once for each."""
        if surgery not in self._known:
            self._known[surgery] = self._trains(surgery)
        return self._known[surgery]

    def of(self, keys: Sequence[Key], outcomes: Outcomes) -> NDArray[np.float64]:
        """Returns expected seconds, (len(keys),); ones where no recipe's seconds are known."""
        spent = outcomes.spent
        if not spent.recipes:
            return np.ones(len(keys))
        training = spent.training_s / spent.trainings if spent.trainings else 0.0
        others = max(spent.others_s / spent.recipes, LEAST_S)
        surgeries = [outcomes.keys.surgery(key) for key in keys]
        new = np.array([s not in outcomes.trained and self.trains(s) for s in surgeries])
        return others + training * new
