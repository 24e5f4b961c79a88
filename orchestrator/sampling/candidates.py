"""Which recipes a sampler considers: around the frontier, what only converts a trained model, and some from anywhere."""

from __future__ import annotations

import random

from orchestrator.sampling.outcomes import Outcomes
from orchestrator.sampling.recipes import Key, RecipeKeys, pick

CANDIDATES = 100
RANDOM = 0.15
CROSSED = 0.15
CONVERTED = 0.2
"""Shares of the candidates; the others are neighbours of the frontier's recipes."""

RECENT = 3
"""Newest recipes whose other conversions are candidates, beside those of the frontier."""

TRIES = 2
"""Draws a candidate, most of which are of recipes that are known where little is left."""

RANDOM_TRIES = 300


class Candidates:
    """Draws candidates."""

    def __init__(self, keys: RecipeKeys) -> None:
        self.keys = keys
        families = [[t for t in names if t in keys.conversions] for _, names in keys.space.families]
        self._families = [names for names in families if names]

    def unseen(self, rng: random.Random, outcomes: Outcomes) -> Key:
        """Returns a random recipe, one that was not asked for where 300 draws find one."""
        for _ in range(RANDOM_TRIES):
            key = self.keys.draw(rng)
            if key not in outcomes.seen:
                return key
        return key

    def make(self, rng: random.Random, outcomes: Outcomes) -> list[Key]:
        """Returns recipes that were not asked for; none where none was found."""
        parents = [outcomes.ended[n].key for n in outcomes.front] or [o.key for o in outcomes.ended.values()]
        recent = [outcomes.ended[n].key for n in sorted(outcomes.ended)[-RECENT:]]
        trained = {self.keys.surgery(key): None for key in [*parents, *recent]}
        found: dict[Key, None] = {}
        for _ in range(TRIES * CANDIDATES):
            key = self._draw(rng, parents, list(trained))
            if key is not None and key not in outcomes.seen:
                found[key] = None
                if len(found) == CANDIDATES:
                    break
        return list(found)

    def _draw(self, rng: random.Random, parents: list[Key], trained: list[Key]) -> Key | None:
        luck = rng.random()
        if luck < RANDOM:
            return self.keys.draw(rng)
        if luck < RANDOM + CROSSED and len(parents) > 1:
            return self.keys.cross(rng, *rng.sample(parents, 2))
        if luck < RANDOM + CROSSED + CONVERTED and self._families:
            return self._converted(rng, pick(rng, trained))
        return self.keys.near(rng, pick(rng, parents))

    def _converted(self, rng: random.Random, surgery: Key) -> Key | None:
        """Returns another conversion of what is trained; None where the drawn one is not allowed."""
        room = self.keys.space.max_techniques - len(surgery)
        families = rng.sample(self._families, rng.randint(0, max(0, min(room, len(self._families)))))
        chosen = [pick(rng, names) for names in families]
        return self.keys.with_techniques(rng, surgery, chosen)
