"""Which techniques go together and in which order: METHODS section 6 as data.

Rules are symmetric: they name two sides and hold whichever of the two comes first. Order is a second, separate table.
Both are read when a search space is built, so no trial is spent on a combination that they forbid. A side is a tuple of
technique names or family names; the first rule that matches a pair decides, so exceptions stand above the general rule.
Imports no torch: ``vitpareto plan`` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from workers.techniques.record import FAMILIES, ModelInfo

KINDS = ("allowed", "experimental", "forbidden")
"""``experimental``: sound only with something that is not built; treated as forbidden until it is."""

FAMILY_OF = {
    "distill": "distillation",
    "magnitude_prune": "pruning",
    "taylor_prune": "pruning",
    "importance_prune": "pruning",
    "semi_structured_prune": "pruning",
    "resolution": "token_reduction",
    "tome": "token_reduction",
    "pitome": "token_reduction",
    "evit": "token_reduction",
    "dynamicvit": "token_reduction",
    "diffrate": "token_reduction",
    "pumer": "token_reduction",
    "nystrom": "low_rank_attention",
    "performer": "low_rank_attention",
    "linformer": "low_rank_attention",
    "scatterbrain": "low_rank_attention",
    "svd": "low_rank_weights",
    "precision": "precision",
    "qat": "quantisation",
    "lsq": "quantisation",
    "diffq": "quantisation",
    "dynamic_int8": "quantisation",
    "weight_only": "quantisation",
    "static_int8": "quantisation",
    "fq_vit": "quantisation",
    "smoothquant": "quantisation",
    "gptq": "quantisation",
    "repq_vit": "quantisation",
    "fp8": "quantisation",
}
"""Family of each technique, in canonical order within a family. Techniques that are only named here have their rules
before they are built; those of other packages get their family from the registry."""


@dataclass(frozen=True)
class Rule:
    """``kind`` holds between every technique of ``one`` and every technique of ``other``.

    Attributes:
        only_on: model families that the rule holds for; empty for all.
    """

    one: tuple[str, ...]
    other: tuple[str, ...]
    kind: str
    reason: str
    only_on: tuple[str, ...] = ()

    def matches(self, a: str, b: str, model_family: str) -> bool:
        """Whether the rule speaks of the pair, in either order."""
        if self.only_on and model_family not in self.only_on:
            return False
        return (_on(self.one, a) and _on(self.other, b)) or (_on(self.one, b) and _on(self.other, a))


MERGERS = ("tome", "pitome")
TRAINED_QUANTISERS = ("qat", "lsq", "diffq")
NEED_ATTENTION_MAP = ("evit", "dynamicvit", "diffrate", "pumer")

RULES = (
    Rule(("tome",), ("pumer",), "allowed", "ToMe works in the image tower, PuMer in the fusion layers", ("meter",)),
    Rule(("linformer",), ("token_reduction",), "forbidden", "Linformer's projections are tied to token positions"),
    Rule(("resolution",), ("token_reduction",), "allowed", "a smaller image only makes the sequence shorter"),
    Rule(("token_reduction",), ("token_reduction",), "forbidden", "two token reducers"),
    Rule(("low_rank_attention",), ("low_rank_attention",), "forbidden", "two low-rank attentions"),
    Rule(
        ("quantisation",),
        ("quantisation",),
        "forbidden",
        "two weight quantisers: training-aware replaces post-training",
    ),
    Rule(
        ("low_rank_attention",), NEED_ATTENTION_MAP, "forbidden", "low-rank attention has no attention map to score by"
    ),
    Rule(("nystrom",), MERGERS, "experimental", "sound only with landmarks weighted by token size"),
    Rule(("performer",), MERGERS, "allowed", "exact when key features are multiplied by token size"),
    Rule(("scatterbrain",), MERGERS, "experimental", "its local window expects neighbouring tokens to be neighbours"),
    Rule(
        ("fq_vit",),
        MERGERS,
        "allowed",
        "log size is added before the logits are quantised, calibrated after the merging",
    ),
    Rule(
        ("importance_prune",),
        TRAINED_QUANTISERS,
        "forbidden",
        "both end with the same training: gates would be multiplied into weights whose levels are fixed",
    ),
    Rule(
        ("importance_prune",),
        ("svd", "semi_structured_prune"),
        "forbidden",
        "its gates are cut out of whole weights after the training, which the other no longer has",
    ),
    Rule(
        ("semi_structured_prune",),
        ("svd",),
        "experimental",
        "factors of a sparse weight are dense: sound only with the factors made first, and sparse",
    ),
    Rule(
        ("semi_structured_prune",),
        ("quantisation",),
        "experimental",
        "two formats of one weight: sound only with the values that are left of few bits, which no layer here stores",
    ),
    Rule(
        ("precision",),
        TRAINED_QUANTISERS,
        "forbidden",
        "the training fixes levels for float32, and packs the weights before they could be converted",
    ),
    Rule(("precision",), ("dynamic_int8",), "forbidden", "the dynamic int8 kernel takes float32 activations only"),
)
"""Pairs; those that no rule names are allowed."""


@dataclass(frozen=True)
class Precedence:
    """Every technique of a family in ``first`` comes before every one of a family in ``then``."""

    first: tuple[str, ...]
    then: tuple[str, ...]
    reason: str


PRECEDENCES = (
    Precedence(FAMILIES[:1], FAMILIES[1:], "the student is chosen first, everything else changes the student"),
    Precedence(("pruning",), ("token_reduction",), "prune first: tokens are matched by the keys that are left"),
    Precedence(("pruning",), ("low_rank_attention",), "either order computes the same; only this one is kept"),
    Precedence(("token_reduction",), ("low_rank_attention",), "attention is replaced in the block that reduces tokens"),
    Precedence(
        ("pruning",), ("low_rank_weights",), "what is removed need not be factorised, and factors cannot be cut"
    ),
    Precedence(
        ("token_reduction", "low_rank_attention"),
        ("low_rank_weights",),
        "either order computes the same; only this one is kept",
    ),
    Precedence(FAMILIES[:5], ("precision",), "weights are converted once their values and shapes are final"),
    Precedence(FAMILIES[:5], ("quantisation",), "weights are quantised once their values and shapes are final"),
    Precedence(("precision",), ("quantisation",), "scales are calculated from the weights as they are stored"),
)
"""Complete over the families; within one family the order of :data:`FAMILY_OF` holds."""

FREE = (
    (("precision",), ("weight_only",), "scales from rounded or from unrounded weights"),
    (("magnitude_prune",), ("taylor_prune",), "each ranks what the other left"),
)
"""Pairs that are legal in both orders and compute different things: the search space offers both."""

DEVICE_RULES = (("cuda", "dynamic_int8", "the dynamic int8 kernel runs on the CPU only"),)
"""(device kind, technique, reason): infeasible there."""


@dataclass(frozen=True)
class Verdict:
    """Whether two techniques may be in one recipe, and why (or why not)."""

    kind: str
    reason: str

    @property
    def allowed(self) -> bool:
        """``experimental`` is not allowed."""
        return self.kind == "allowed"


def family_of(name: str) -> str:
    """Returns the family of a technique.

    Raises:
        KeyError: if neither the table nor the registry knows it.
    """
    if name in FAMILY_OF:
        return FAMILY_OF[name]
    from workers.techniques import registry  # imports torch; only techniques of other packages need it

    return registry()[name].family


def verdict(a: str, b: str, model_family: str = "timm") -> Verdict:
    """Returns whether ``a`` and ``b`` may be in one recipe; the order of the two does not matter."""
    if a == b:
        return Verdict("forbidden", f"{a} twice in one recipe")
    for rule in RULES:
        if rule.matches(a, b, model_family):
            return Verdict(rule.kind, rule.reason)
    return Verdict("allowed", "no rule against it")


def conflicts(names: Sequence[str], model_family: str = "timm") -> Iterator[tuple[str, str, Verdict]]:
    """Yields every pair of ``names`` that may not be together, with its verdict."""
    for a, b in combinations(names, 2):
        v = verdict(a, b, model_family)
        if not v.allowed:
            yield a, b, v


def legal_orders(names: Sequence[str], model_family: str = "timm") -> list[tuple[str, ...]]:
    """Returns every legal order of a set of techniques, no two of which compute the same; [] if the set is forbidden.

    The first is the canonical one. Pairs outside :data:`FREE` have one order, so two orders differ in a free pair.
    """
    if any(conflicts(names, model_family)):
        return []
    return _extensions(tuple(sorted(names, key=_rank)))


def fault(names: Sequence[str], model_family: str = "timm") -> str | None:
    """Returns why this ordered tuple of techniques is not legal, or None."""
    for a, b, v in conflicts(names, model_family):
        return f"{a} + {b}: {v.reason}" + (" (experimental)" if v.kind == "experimental" else "")
    for a, b in combinations(names, 2):
        if _must_precede(b, a):
            return f"{b} must come before {a}: {_order_reason(b, a)}"
    return None


def environment_fault(names: Sequence[str], info: ModelInfo) -> str | None:
    """Returns why a recipe cannot run on this device whatever its configs are, or None."""
    for device, name, reason in DEVICE_RULES:
        if name in names and info.device == device:
            return f"{name} on {device}: {reason}"
    return None


def _on(side: tuple[str, ...], name: str) -> bool:
    return name in side or family_of(name) in side


def _rank(name: str) -> tuple[int, int, str]:
    known = list(FAMILY_OF)
    return FAMILIES.index(family_of(name)), known.index(name) if name in FAMILY_OF else len(known), name


def _is_free(a: str, b: str) -> bool:
    return any((_on(x, a) and _on(y, b)) or (_on(x, b) and _on(y, a)) for x, y, _ in FREE)


def _must_precede(a: str, b: str) -> bool:
    return not _is_free(a, b) and _rank(a) < _rank(b)


def _order_reason(first: str, then: str) -> str:
    one, other = family_of(first), family_of(then)
    return next((p.reason for p in PRECEDENCES if one in p.first and other in p.then), "canonical order of the family")


def _extensions(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every permutation that keeps each ordered pair in its order."""
    if not names:
        return [()]
    found = []
    for i, head in enumerate(names):
        rest = names[:i] + names[i + 1 :]
        if not any(_must_precede(other, head) for other in rest):
            found += [(head, *tail) for tail in _extensions(rest)]
    return found
