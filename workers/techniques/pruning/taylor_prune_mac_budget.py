"""What a ViT's dimensions cost in MACs, and which units go first until a budget is met."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Sizes:
    """The dimensions of a model, while it is decided what goes.

    Attributes:
        tokens: N; channels: C; heads, head_dims, hidden: one entry a block.
        matrices: weights that a hidden dimension has for each channel, 3 of a gated MLP.
    """

    tokens: int
    channels: int
    heads: list[int]
    head_dims: list[int]
    hidden: list[int]
    matrices: int = 2

    def macs(self) -> int:
        """Returns the multiply-accumulates of all blocks for one image: linear layers and attention products."""
        N, C, m = self.tokens, self.channels, self.matrices
        widths = [h * d for h, d in zip(self.heads, self.head_dims, strict=True)]
        return sum(4 * N * C * A + 2 * N * N * A + m * N * C * M for A, M in zip(widths, self.hidden, strict=True))

    def saved(self, kind: str, block: int) -> int:
        """Returns the MACs that one unit of a kind costs now: a head, a dimension of all heads of a block, a channel."""
        N, C, m = self.tokens, self.channels, self.matrices
        if kind == "channels":
            widths = (h * d for h, d in zip(self.heads, self.head_dims, strict=True))
            return sum(4 * N * A + m * N * M for A, M in zip(widths, self.hidden, strict=True))
        if kind == "hidden":
            return m * N * C
        return (4 * N * C + 2 * N * N) * (self.head_dims if kind == "heads" else self.heads)[block]

    def count(self, kind: str, block: int) -> int:
        """Returns how many units of a kind are left."""
        found: int = self.channels if kind == "channels" else getattr(self, kind)[block]
        return found

    def remove(self, kind: str, block: int, units: int) -> None:
        """Takes units away."""
        if kind == "channels":
            self.channels -= units
        else:
            getattr(self, kind)[block] -= units


@dataclass
class Queue:
    """The units of one kind in one block, least important first.

    Attributes:
        sums: [i] is the importance of the first i units; taken: how many of them are removed; unit: how many at a time.
    """

    kind: str
    block: int
    sums: list[float]
    unit: int
    taken: int = 0

    def next(self) -> int:
        """Returns how many units go next, so that a multiple is left; 0 where the last multiple stays."""
        left = len(self.sums) - 1 - self.taken
        return 0 if left <= self.unit else left % self.unit or self.unit

    def score(self, sizes: Sizes, cost_weight: float) -> float:
        """Returns the importance of the next units for each MAC that they save, to the power of ``cost_weight``."""
        units = self.next()
        worth = self.sums[self.taken + units] - self.sums[self.taken]
        cost: float = (units * sizes.saved(self.kind, self.block)) ** cost_weight
        return worth / cost


def spend(sizes: Sizes, waiting: list[Queue], target: float, cost_weight: float) -> None:
    """Removes units from ``sizes``, the least worth first, until its MACs are at most ``target`` or nothing is left."""
    while sizes.macs() > target:
        able = [queue for queue in waiting if queue.next()]
        if not able:
            return
        queue = min(able, key=lambda q: q.score(sizes, cost_weight))
        units = queue.next()
        sizes.remove(queue.kind, queue.block, units)
        queue.taken += units
