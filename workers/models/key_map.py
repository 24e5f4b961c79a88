"""A stranger's tensors under timm's names, as the rules of :mod:`workers.weight_names` lead them there."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from workers.models.timm_vit import ModelError
from workers.weight_names import PART, PATCH, THIRDS, layout, rule_fault

KeyMap = Mapping[str, str | None]


def rename(weights: Mapping[str, Tensor], key_map: KeyMap, module: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the weights under timm's names, and which were left out.

    Args:
        weights: by the names of their file.
        key_map: see :mod:`workers.weight_names`; every rule must match something.
        module: the model, whose shapes say how layouts are undone.

    Raises:
        ModelError: a rule that matches nothing, two that match one name, two tensors under one name, thirds that are not
            three, or a tensor that is not laid out as its rule says.
    """
    for expression, target in key_map.items():
        if fault := rule_fault(expression, target):
            raise ModelError(f"model.key_map: {expression!r} {fault[0]}; {fault[1]}")
    rules = {expression: re.compile(expression) for expression in key_map}
    used: set[str] = set()
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    left_out = []
    for name, tensor in weights.items():
        matches = [(e, m) for e, rule in rules.items() if (m := rule.fullmatch(name))]
        if len(matches) > 1:
            raise ModelError(
                f"model.key_map: {name} must match one expression, matches {matches[0][0]!r} and {matches[1][0]!r}"
            )
        target = name if not matches else key_map[matches[0][0]]
        used.update(e for e, _ in matches)
        if target is None:
            left_out.append(name)
            continue
        ours = matches[0][1].expand(target) if matches else name
        part = PART.search(ours) if matches else None
        ours = PART.sub("", ours) if part else ours
        if part and part[1] in THIRDS:
            third = thirds.setdefault(ours, {})
            if third.setdefault(THIRDS[part[1]], tensor) is not tensor:
                raise ModelError(
                    f"model.key_map: two tensors become the third {part[0]} of {ours}, {name} is the second"
                )
            continue
        if ours in found:
            raise ModelError(f"model.key_map: two tensors become {ours}, {name} is the second")
        found[ours] = _laid_out(tensor, part[1], ours, name, module) if part else tensor
    if unused := [e for e in rules if e not in used]:
        raise ModelError(
            f"model.key_map: every expression must match a whole name of the checkpoint, {unused[0]!r} matches none; its names are "
            + ", ".join(list(weights)[:4])
        )
    return found | {name: _joined(name, parts, found) for name, parts in thirds.items()}, left_out


def _joined(name: str, parts: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Tensor:
    if name in others:
        raise ModelError(f"model.key_map: {name} must come from three thirds or from one tensor, not both")
    if len(parts) < 3:
        lacking = ", ".join(f"{{{third}}}" for third in "qkv" if third not in parts)
        raise ModelError(f"model.key_map: {name} must have all of {{q}}, {{k}} and {{v}}, nothing becomes {lacking}")
    shapes = {tuple(part.shape) for part in parts.values()}
    if len(shapes) > 1:
        raise ModelError(
            f"model.key_map: the thirds of {name} must have one shape, have {', '.join(map(str, sorted(shapes)))}"
        )
    return torch.cat([parts[third] for third in "qkv"])


def _laid_out(tensor: Tensor, part: str, ours: str, name: str, module: nn.Module) -> Tensor:
    """Returns a tensor whose axes were in the order ``part`` in timm's order and shape."""
    axes = part.split()
    order = layout(part)
    if order is None:
        raise ModelError(
            f"model.key_map: {{{part}}} of {name} must be one of q, k, v, or an order of p1 p2 c, or of h d qkv"
        )
    own = module.state_dict().get(ours)
    if own is None or (order is PATCH and own.ndim == 1):
        return tensor  # a name that the model has not is judged with all others; a bias has no layout
    turn = [axes.index(axis) for axis in order]
    if order is PATCH:
        if own.ndim != 4 or tensor.ndim != 2 or tensor.shape != (own.shape[0], own[0].numel()):
            raise ModelError(
                f"model.key_map: {name} with {{{part}}} must be {(own.shape[0], own[0].numel())}, is {tuple(tensor.shape)}"
            )
        sides = dict(zip(order, own.shape[1:], strict=True))
        return tensor.reshape(-1, *(sides[axis] for axis in axes)).permute(0, *(1 + i for i in turn)).contiguous()
    heads = _attention(ours, module)
    if heads is None or tensor.shape[0] % (3 * heads):
        raise ModelError(
            f"model.key_map: {name} with {{{part}}} must be a joint projection of queries, keys and values"
        )
    sides = {"qkv": 3, "h": heads, "d": tensor.shape[0] // (3 * heads)}
    rest = tensor.shape[1:]
    rows = tensor.reshape(*(sides[axis] for axis in axes), *rest).permute(*turn, *range(3, 3 + len(rest)))
    return rows.reshape(tensor.shape).contiguous()


def _attention(name: str, module: nn.Module) -> int | None:
    """Returns the heads of the attention that a tensor belongs to."""
    owner = dict(module.named_modules()).get(name.rpartition(".qkv.")[0])
    heads = getattr(owner, "num_heads", None)
    return heads if isinstance(heads, int) else None
