"""How much a model minds each layer's quantisation, and widths a layer that cost least under a budget.

Source: Cai et al., ZeroQ, arXiv 2001.00281, section 3.2: the sensitivity of a layer at a width is the KL divergence of the
model's output with that layer alone quantised from its output without, and the sensitivities of layers add up.
Differs from the paper: training images take the place of distilled ones, and the allocation is the best one under the budget
(a multiple-choice knapsack, by dynamic programming) instead of a picked point of a frontier.

The table is measured on the baseline, once a study, and kept beside its artefact, under a name with the rounding's version, the number
of images and the widths: where one of them changes it is measured again. A model whose layers are not the baseline's, after pruning or
as a student, has a table of its own, measured where it is needed.
Costs: a pass over :data:`IMAGES` images for each layer and width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from workers.inputs import Inputs
from workers.techniques.quantisation.shared_affine import NotQuantisable, linears
from workers.techniques.record import Surroundings

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
"""Bits a weight that a table knows."""

IMAGES = 32
"""Training images that a table is measured on."""

UNITS = 100_000
"""Most units of size that an allocation reckons in."""

Round = Callable[[Tensor, int], Tensor]
"""(weight (O, I), bits) -> the weight as it is stored with that many bits, float32."""

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]

Table = dict[str, list[float]]
"""Layer to its sensitivities in nats an image, one a width of :data:`WIDTHS`."""


class TooFewBits(NotQuantisable):
    """No widths keep the budget."""


# --- table ------------------------------------------------------------------------------------------------------------


def table_for(model: nn.Module, surroundings: Surroundings, rounding: Round, *, name: str, version: int) -> Table:
    """Returns the table that holds for ``model``: the study's, or one of its own.

    Args:
        model: with linear layers that are not quantised.
        name: of the rounding; tables of different ones are kept apart.
        version: of the technique that rounds; tables of different ones are, too.
    """
    teacher = surroundings.teacher()
    if _shapes(model) != _shapes(teacher):
        return measure(model, surroundings.batches, rounding, surroundings.tick)

    def make(batches: Batches) -> bytes:
        return json.dumps(measure(teacher, batches, rounding, surroundings.tick)).encode()

    if surroundings.once_a_study is None:
        return dict(json.loads(make(surroundings.batches)))
    widths = "".join(map(str, WIDTHS))
    return dict(
        json.loads(surroundings.once_a_study(f"sensitivity_{name}_v{version}_images{IMAGES}_bits{widths}.json", make))
    )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(linear.weight.shape) for name, linear in linears(model, skip_head=False).items()}


@torch.no_grad()
def measure(model: nn.Module, batches: Batches, rounding: Round, tick: Callable[[], None] = lambda: None) -> Table:
    """Returns the sensitivity of every linear layer at every width; the model is left as it was.

    Args:
        batches: the first :data:`IMAGES` examples are taken.
    """
    examples = _first(batches)
    training = model.training
    model.eval()
    expected = _log_probabilities(model, examples)
    table: Table = {}
    try:
        for name, linear in linears(model, skip_head=False).items():
            table[name] = []
            whole = linear.weight.data
            for bits in WIDTHS:
                tick()
                try:
                    linear.weight.data = rounding(whole, bits).to(whole.dtype)
                    found = _log_probabilities(model, examples)
                finally:
                    linear.weight.data = whole
                divergence = (expected.exp() * (expected - found)).sum(dim=1).mean()
                if not torch.isfinite(divergence):
                    raise NotQuantisable(
                        f"the output with {name} at {bits} bits must be finite; it holds NaN or infinity"
                    )
                table[name].append(max(0.0, float(divergence)))  # rounding may make nothing a little less
    finally:
        model.train(training)
    return table


def _first(batches: Batches) -> list[Tensor | Inputs]:
    """Returns the first batches, at most IMAGES examples."""
    taken: list[Tensor | Inputs] = []
    for examples, _ in batches():
        taken.append(examples[: IMAGES - sum(map(len, taken))])
        if sum(map(len, taken)) >= IMAGES:
            break
    return taken


def _log_probabilities(model: nn.Module, examples: Sequence[Tensor | Inputs]) -> Tensor:
    """Returns (B, classes) float64; of a single score, as retrieval has for a pair, that it is one and that it is none."""
    logits = torch.cat([model(batch) for batch in examples]).double()
    if logits.shape[1] == 1:
        logits = torch.cat([logits, torch.zeros_like(logits)], dim=1)
    return logits.log_softmax(dim=1)


# --- allocation -------------------------------------------------------------------------------------------------------


def allocate(
    sizes: Sequence[int], costs: Sequence[Sequence[float]], mean_bits: float, widths: Sequence[int] = WIDTHS
) -> list[int]:
    """Returns the width of every layer that makes the sum of costs least under a budget of bits.

    The best of all allocations, wherever the greatest common divisor of the layers' sizes leaves at most :data:`UNITS` units
    (unpruned ViTs: a few hundred). Otherwise sizes are rounded up to units first: the budget is kept, and the result is the
    best for sizes that are up to one unit, 1/UNITS of the whole at 8 bits, larger. Of equal sums the one with fewer bits
    for later layers.

    Args:
        sizes: weights of each layer; costs: of each layer one a width, 0 or more.
        mean_bits: bits a weight, on average over all weights.

    Raises:
        TooFewBits: no width is small enough for the budget.
    """
    unit = max(math.gcd(*sizes), -(-sum(sizes) * max(widths) // UNITS))
    units = [-(-size // unit) for size in sizes]
    room = int(mean_bits * sum(sizes) / unit + 1e-9)
    least = torch.zeros(room + 1, dtype=torch.float64)
    choices: list[Tensor] = []
    for size, cost in zip(units, costs, strict=True):
        options = torch.full((len(widths), room + 1), torch.inf, dtype=torch.float64)
        for i, (width, more) in enumerate(zip(widths, cost, strict=True)):
            if size * width <= room:
                options[i, size * width :] = least[: room + 1 - size * width] + more
        least, chosen = options.min(dim=0)
        choices.append(chosen)
    if not math.isfinite(float(least[room])):
        raise TooFewBits(f"mean_bits={mean_bits:g} is too small: the narrowest width has {min(widths)} bits")
    found: list[int] = []
    for size, chosen in zip(reversed(units), reversed(choices), strict=True):
        width = widths[int(chosen[room])]
        found.append(width)
        room -= size * width
    return found[::-1]


def mean_width(sizes: Sequence[int], widths: Sequence[int]) -> float:
    """Returns the mean bits of a weight."""
    return sum(size * width for size, width in zip(sizes, widths, strict=True)) / sum(sizes)
