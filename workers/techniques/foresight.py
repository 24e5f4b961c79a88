"""What a technique leaves of a model, told before the model is trained: by applying it to one that has no values.

On the meta device a tensor has a shape and a type, and whoever asks for a number of it gets an error. What a technique resolves there
can therefore depend on no weight, no image and no training, and holds for every model of that shape; where it asks for a number,
nothing is told. So nobody has to say of a technique whether its structure is known beforehand, and nobody can be wrong about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from workers.techniques.record import Surroundings, Technique


class NotForeseen(Exception):
    """Weights, images or a training decide what the technique leaves; the message names it and what it asked for."""


def foresee(
    technique: Technique, model: nn.Module, config: Any, surroundings: Surroundings
) -> tuple[nn.Module, dict[str, Any]]:
    """Applies a technique to a model without values.

    Args:
        model: on the meta device; it is used up.
        surroundings: whose device, batches and teacher are without values too.

    Returns:
        the model that the technique leaves, before a training, and what it resolved.

    Raises:
        NotForeseen: the technique asked for a value, or the model is none that it can work on.
    """
    try:
        if technique.foresee is not None:
            resolved = technique.foresee(model, config, surroundings)
            return technique.rebuild(model, resolved), resolved
        applied = technique.apply(model, config, surroundings)
    except Exception as error:  # a technique meets the missing value wherever it looks first
        raise NotForeseen(f"{technique.name}: {type(error).__name__}: {error}") from error
    if not applied.changed:
        raise NotForeseen(f"{technique.name}: changed nothing in this model with {config}")
    return applied.model, applied.resolved


def finish(
    model: nn.Module, steps: Sequence[tuple[Technique, Any]], resolved: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns what is resolved once a training is over, as ``finalise`` tells of a model without values.

    Args:
        model: as ``rebuild`` makes it of what is resolved before the training; it is used up.
        resolved: of each step.

    Raises:
        NotForeseen: what was learned decides.
    """
    found = []
    for (technique, config), before in zip(steps, resolved, strict=True):
        try:
            more = {} if technique.finalise is None else technique.finalise(model, config)
        except Exception as error:  # as in foresee
            raise NotForeseen(f"{technique.name}: {type(error).__name__}: {error}") from error
        found.append({**before, **more})
    return found
