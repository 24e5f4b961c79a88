"""Families of techniques: what each changes, in which order they are composed and why, and which exclude their own kind.

A technique names its family; a package of one's own may bring a family along (``Technique.new_family``). What is specific to
one technique stands in its record; :mod:`workers.techniques.rules` decides by both. docs/composition.md shows the outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("allowed", "experimental", "forbidden")
"""``experimental``: sound only with something that is not built; treated as forbidden until it is."""


@dataclass(frozen=True)
class Rule:
    """Whether whoever holds it, a technique or a family, may be in one recipe with each of ``others``, in whichever order.

    The most specific rule decides: docs/composition.md.

    Attributes:
        others: names of techniques and of families.
        kind: one of :data:`KINDS`.
        reason: what a person is told.
        only_on: model families that the rule holds for; empty for all.
    """

    others: tuple[str, ...]
    kind: str
    reason: str
    only_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rule with {', '.join(self.others)}: kind must be one of {KINDS}, got {self.kind!r}")
        sides: tuple[object, ...] = (self.others, self.only_on)
        if any(isinstance(side, str) for side in sides) or not self.others or not self.reason:
            raise ValueError(
                f"rule with {self.others!r}: others and only_on must be tuples of names, and it needs a reason"
            )


@dataclass(frozen=True)
class Family:
    """Techniques that change the same thing of a model.

    Attributes:
        doc: one line: what its techniques change.
        exclusive: why two techniques of it may not be in one recipe; empty where they may.
        after: family that comes earlier in a recipe -> why; families that are not installed may be named.
        before: family that comes later in a recipe -> why. A family goes as late as what is said allows.
        rules: between each of its techniques and others.
    """

    name: str
    doc: str
    exclusive: str = ""
    after: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()


_STUDENT = "the student is chosen first, everything else changes the student"
_CONVERTED = "weights are converted once their values and shapes are final"
_QUANTISED = "weights are quantised once their values and shapes are final"

_FAMILIES = (
    Family("distillation", "another, smaller model that learns from the uncompressed one"),
    Family(
        "pruning",
        "parts of the model are removed for good: heads, channels, blocks",
        after={"distillation": _STUDENT},
    ),
    Family(
        "token_reduction",
        "layers see fewer tokens",
        exclusive="two token reducers",
        after={"distillation": _STUDENT, "pruning": "prune first: tokens are matched by the keys that are left"},
    ),
    Family(
        "low_rank_attention",
        "attention is approximated without its map of N x N",
        exclusive="two low-rank attentions",
        after={
            "distillation": _STUDENT,
            "pruning": "either order computes the same; only this one is kept",
            "token_reduction": "attention is replaced in the block that reduces tokens",
        },
    ),
    Family(
        "low_rank_weights",
        "weights are products of smaller ones",
        after={
            "distillation": _STUDENT,
            "pruning": "what is removed need not be factorised, and factors cannot be cut",
            **dict.fromkeys(
                ("token_reduction", "low_rank_attention"), "either order computes the same; only this one is kept"
            ),
        },
    ),
    Family(
        "precision",
        "weights and activations in a shorter floating type",
        after={
            "distillation": _STUDENT,
            **dict.fromkeys(("pruning", "token_reduction", "low_rank_attention", "low_rank_weights"), _CONVERTED),
        },
    ),
    Family(
        "quantisation",
        "weights, and in some techniques activations, of few bits with scales",
        exclusive="two weight quantisers: training-aware replaces post-training",
        after={
            "distillation": _STUDENT,
            **dict.fromkeys(("pruning", "token_reduction", "low_rank_attention", "low_rank_weights"), _QUANTISED),
            "precision": "scales are calculated from the weights as they are stored",
        },
    ),
)

FAMILIES = {family.name: family for family in _FAMILIES}
"""The built-in families by name, in the order in which a recipe has them."""
