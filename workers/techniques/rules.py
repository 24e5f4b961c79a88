"""Decides which techniques go together and in which order, by what their records and their families' records say.

A rule speaks of the one who holds it and of others; it holds whichever of the two comes first. Of several that speak of a pair
the most specific decides: one that names both techniques before one that names a technique and a family, that before one of two
families; and at the same level one that is limited to some families of models before one that is not. Nothing depends on the
order in which rules are listed: two that disagree at the same level are an error. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import combinations

from workers.techniques.families import FAMILIES, Family
from workers.techniques.record import Technique


@dataclass(frozen=True)
class Verdict:
    """Whether two techniques may be in one recipe, and why (or why not)."""

    kind: str
    reason: str

    @property
    def allowed(self) -> bool:
        """``experimental`` is not allowed."""
        return self.kind == "allowed"


@dataclass(frozen=True)
class Said:
    """One rule that speaks of a pair.

    Attributes:
        weight: how specific it is; see the module.
        holder: technique or family whose rule it is; side: technique of the pair that it stands for.
    """

    weight: tuple[int, bool]
    holder: str
    side: str
    verdict: Verdict


class Table:
    """What may be composed of these techniques.

    Args:
        techniques: by name, in canonical order within a family.

    Attributes:
        families: by name, in the order in which a recipe has them.

    Raises:
        ValueError: a family that no record describes, or two describe differently; families whose order goes in a circle; a
            name that is a technique's and another one's family; rules that contradict one another.
    """

    def __init__(self, techniques: Mapping[str, Technique]) -> None:
        self.techniques = techniques
        self.families = _in_order(_described(techniques))
        places, listed = list(self.families), list(techniques)
        self._ranks = {n: (places.index(t.family), listed.index(n)) for n, t in techniques.items()}
        self._verdicts: dict[tuple[str, str, str], Verdict] = {}
        limits = {family for t in self._holders() for rule in t.rules for family in rule.only_on}
        for a, b in combinations(techniques, 2):
            for model_family in ("", *sorted(limits)):
                self.verdict(a, b, model_family)

    def _holders(self) -> list[Technique | Family]:
        return [*self.techniques.values(), *self.families.values()]

    # --- pairs ---

    def verdict(self, a: str, b: str, model_family: str) -> Verdict:
        """Returns whether ``a`` and ``b`` may be in one recipe; the order of the two does not matter."""
        if a == b:
            return Verdict("forbidden", f"{a} twice in one recipe")
        key = (min(a, b), max(a, b), model_family)
        if key not in self._verdicts:
            self._verdicts[key] = self._decide(a, b, model_family)
        return self._verdicts[key]

    def _decide(self, a: str, b: str, model_family: str) -> Verdict:
        found = [*self._said(a, b, model_family), *self._said(b, a, model_family)]
        if not found:
            return Verdict("allowed", "no rule against it")
        weight = max(said.weight for said in found)
        # Where several agree, the technique that would be applied last says why.
        deciding = sorted(
            (said for said in found if said.weight == weight),
            key=lambda said: (self._ranks[said.side], said.holder == said.side, said.verdict.reason),
        )
        for one, other in combinations(deciding, 2):
            if one.verdict.kind != other.verdict.kind:
                raise ValueError(
                    f"rules that contradict one another, and neither is more specific: {one.holder} says that "
                    f"{a} + {b} is {one.verdict.kind} ({one.verdict.reason}), {other.holder} that it is "
                    f"{other.verdict.kind} ({other.verdict.reason})"
                )
        return deciding[-1].verdict

    def _said(self, side: str, other: str, model_family: str) -> Iterator[Said]:
        """Yields what ``side``, or its family, says of ``other``."""
        family, others = self.families[self.family_of(side)], self.family_of(other)
        if family.exclusive and family.name == others:
            yield Said((0, False), family.name, side, Verdict("forbidden", family.exclusive))
        for holder, own in ((self.techniques[side], 1), (family, 0)):
            for rule in holder.rules:
                if rule.only_on and model_family not in rule.only_on:
                    continue
                if other in rule.others or others in rule.others:
                    weight = (own + (other in rule.others), bool(rule.only_on))
                    yield Said(weight, holder.name, side, Verdict(rule.kind, rule.reason))

    def family_of(self, name: str) -> str:
        """Returns the family of a technique; KeyError if there is none of that name."""
        return self.techniques[name].family

    # --- orders ---

    def must_precede(self, a: str, b: str) -> bool:
        """Whether ``a`` stands before ``b`` in every recipe with both."""
        return self._ranks[a] < self._ranks[b] and not self.free(a, b)

    def free(self, a: str, b: str) -> str | None:
        """Returns what differs between the two orders, where both are legal; None where one is."""
        for one, other in ((a, b), (b, a)):
            either = self.techniques[one].either_order
            if reason := either.get(other) or either.get(self.family_of(other)):
                return reason
        return None

    def order_reason(self, first: str, then: str) -> str:
        """Returns why ``first`` comes before ``then``."""
        one, other = (self.families[self.family_of(name)] for name in (first, then))
        if one is other:
            return "canonical order of the family"
        return other.after.get(one.name) or one.before.get(other.name) or "canonical order of the families"

    def orders(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns every order of ``names`` in which each pair stands as it must, the canonical one first."""
        return self._extensions(tuple(sorted(names, key=lambda name: self._ranks[name])))

    def _extensions(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        if not names:
            return [()]
        found = []
        for i, head in enumerate(names):
            rest = names[:i] + names[i + 1 :]
            if not any(self.must_precede(other, head) for other in rest):
                found += [(head, *tail) for tail in self._extensions(rest)]
        return found


def _described(techniques: Mapping[str, Technique]) -> dict[str, Family]:
    """Returns the records of all families, the built-in ones first, the others by name."""
    found, described_by = dict(FAMILIES), dict[str, str]()
    for technique in sorted(techniques.values(), key=lambda t: (t.new_family is not None, t.family, t.name)):
        new = technique.new_family
        if new is not None and found.setdefault(new.name, new) != new:
            by = described_by.get(new.name, "a built-in family")
            raise ValueError(f"technique {technique.name}: its new_family {new.name!r} differs from that of {by}")
        if new is not None:
            described_by.setdefault(new.name, technique.name)
    for technique in techniques.values():
        if technique.family not in found:
            raise ValueError(
                f"technique {technique.name}: family must be one of {', '.join(found)}, or described by its new_family; "
                f"got {technique.family!r}"
            )
        if technique.name in found and technique.name != technique.family:
            raise ValueError(f"technique {technique.name}: its name must not be that of another family")
    return found


def _in_order(families: Mapping[str, Family]) -> dict[str, Family]:
    """Sorts families as they say; of two that may come next the one named earlier in ``families`` does."""
    earlier: dict[str, set[str]] = {
        name: {f for f in family.after if f in families} for name, family in families.items()
    }
    for name, family in families.items():
        for later in family.before:
            if later in families:
                earlier[later].add(name)
    sorter, listed = TopologicalSorter(earlier), list(families)
    try:
        sorter.prepare()
    except CycleError as error:
        raise ValueError(f"families whose order goes in a circle: {' -> '.join(error.args[1])}") from None
    order, ready = [], set[str]()
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        chosen = min(ready, key=listed.index)
        ready.remove(chosen)
        order.append(chosen)
        sorter.done(chosen)
    return {name: families[name] for name in order}
