r"""How ``model.key_map`` leads a stranger's names of weights to timm's: what a rule may be. Standard library only.

A rule's expression must match a whole name as the file has it (after prefixes such as ``module.`` are gone); its target is the
name of timm's with ``\1`` for the first group, or None for a tensor that is left out. A name that no rule matches stays. Two
rules that match one name are a fault, so that the order of rules means nothing.

A target may hold one part in braces, which says how the tensor is laid out:

- ``{q}``, ``{k}``, ``{v}`` (or ``{query}``, ``{key}``, ``{value}``): a third of the tensor that the rest of the name is of;
  the three are concatenated in that order.
- ``{p1 p2 c}``: a linear layer over flattened patches, whose inputs are ordered by row, column, channel, which becomes the
  convolution that computes the same. Any order of the three.
- ``{h d qkv}``, ``{h qkv d}``: rows of a joint projection ordered by head first; timm's order is ``{qkv h d}``.
"""

from __future__ import annotations

import re

PART = re.compile(r"\{([^{}]*)\}")
THIRDS = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v"}
PATCH = ("c", "p1", "p2")
HEADS = ("qkv", "h", "d")
LAYOUTS = {frozenset(PATCH): PATCH, frozenset(HEADS): HEADS}
"""Axes of a layout in timm's order."""


def layout(part: str) -> tuple[str, ...] | None:
    """Returns timm's order of the axes that a part in braces names, None where it names no such layout."""
    axes = part.split()
    return LAYOUTS.get(frozenset(axes)) if len(axes) == 3 else None


def rule_fault(expression: str, target: object) -> tuple[str, str] | None:
    """Returns what a rule must be and what to do where it is not that, None where it is."""
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        return f"must be a regular expression: {error}", r"escape what is meant literally: \. for a dot"
    if target is None:
        return None
    if not isinstance(target, str) or not target:
        return "must lead to a name of timm's, or to null to be left out", r"for example blocks.\1.attn.qkv.\2"
    parts = PART.findall(target)
    literal = [part for part in parts if "\\" not in part]
    if len(parts) > 1 or any(part not in THIRDS and layout(part) is None for part in literal):
        return "must lead to a name with at most one of {q}, {k}, {v}, {p1 p2 c}, {h d qkv}", "see docs/your-model.md"
    try:
        compiled.sub(target, "")  # reads the target, whether or not anything matches
    except (re.error, IndexError) as error:
        return f"must lead to a name of groups that it has: {error}", r"write \1 for what its first ( ) matched"
    return None
