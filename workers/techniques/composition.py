"""Which of the installed techniques go together and in which order; docs/composition.md has the rules in words and as a table.

What the rules are stands in the techniques' records and in :mod:`workers.techniques.families`; :mod:`workers.techniques.rules`
decides by them. Asked when a search space is built, so no trial is spent on a combination that they forbid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

from workers.techniques import registry
from workers.techniques.record import ModelInfo
from workers.techniques.rules import Table, Verdict


@cache
def table() -> Table:
    """Returns the table of all installed techniques; the first call loads them, and torch with them."""
    return Table(registry())


def families() -> tuple[str, ...]:
    """Returns the names of all families in the order in which a recipe has them."""
    return tuple(table().families)


def family_of(name: str) -> str:
    """Returns the family of a technique.

    Raises:
        KeyError: there is no technique of that name.
    """
    return table().family_of(name)


def verdict(a: str, b: str, model_family: str = "timm") -> Verdict:
    """Returns whether ``a`` and ``b`` may be in one recipe; the order of the two does not matter."""
    return table().verdict(a, b, model_family)


def conflicts(names: Sequence[str], model_family: str = "timm") -> Iterator[tuple[str, str, Verdict]]:
    """Yields every pair of ``names`` that may not be together, with its verdict."""
    for a, b in combinations(names, 2):
        v = verdict(a, b, model_family)
        if not v.allowed:
            yield a, b, v


def legal_orders(names: Sequence[str], model_family: str = "timm") -> list[tuple[str, ...]]:
    """Returns every legal order of a set of techniques, no two of which compute the same; [] if the set is forbidden.

    The first is the canonical one. Pairs without ``either_order`` have one order, so two orders differ in a free pair.
    """
    return [] if any(conflicts(names, model_family)) else table().orders(names)


def fault(names: Sequence[str], model_family: str = "timm") -> str | None:
    """Returns why this ordered tuple of techniques is not legal, or None."""
    for a, b, v in conflicts(names, model_family):
        return f"{a} + {b}: {v.reason}" + (" (experimental)" if v.kind == "experimental" else "")
    for a, b in combinations(names, 2):
        if table().must_precede(b, a):
            return f"{b} must come before {a}: {table().order_reason(b, a)}"
    return None


def environment_fault(names: Sequence[str], info: ModelInfo) -> str | None:
    """Returns why a recipe cannot run on this device whatever its configs are, or None."""
    for name in names:
        if reason := registry()[name].not_on.get(info.device):
            return f"{name} on {info.device}: {reason}"
    return None
