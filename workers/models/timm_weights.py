"""A stranger's weights brought to a timm model: prefixes, other names, another image or patch size, other channels, a new head.

What of it changes what the model computes comes back as a note, a sentence each, which ``vitpareto plan`` shows. Nothing is
done by guessing: what is left after this either fits name by name and shape by shape, or is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from workers.models import key_map as maps
from workers.models.local_weights import some
from workers.models.timm_vit import ModelError

_AROUND = ("module.", "_orig_mod.")
"""Prefixes of torch's own wrappers, DataParallel's and compile's."""

_ANCHORS = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight")
"""Names of which one is in every file that has timm's names: what stands before it there is a prefix."""

_HEADS = ("head.", "head_dist.")
"""Prefixes of the classifiers' tensors, in every family."""


def bring(
    weights: Mapping[str, Tensor], module: nn.Module, *, key_map: maps.KeyMap | None, fresh_head: bool, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns ``weights`` as far as they can be brought to the names and shapes of ``module``, and what that changed.

    Args:
        weights: by the names of their file; may lie on the meta device.
        module: a timm ViT, which is not changed.
        key_map: see :mod:`workers.weight_names`.
        fresh_head: the weights are to be fine-tuned: heads of other classes are left out, the module keeps its own.
        where: the checkpoint, for errors.

    Raises:
        ModelError: a rule of the key map is not kept, or several models lie in the file.
    """
    expected = module.state_dict()
    found, notes = _without_prefix(dict(weights), expected, where)
    if key_map:
        found, left_out = maps.rename(found, key_map, module)
        if left_out:
            notes.append(f"left out: {some(left_out)}")
    found = {name: _reshaped(tensor, expected.get(name)) for name, tensor in found.items()}
    found = _resampled(found, module, expected, notes)
    if fresh_head:
        found = with_own_head(found, expected, notes)
    return found, notes


def _without_prefix(
    weights: dict[str, Tensor], expected: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    notes: list[str] = []
    while around := next((p for p in _AROUND if weights and all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(around): tensor for name, tensor in weights.items()}
    if any(anchor in weights for anchor in _ANCHORS):
        return weights, notes
    anchor = next((a for a in _ANCHORS if a in expected and any(n.endswith(f".{a}") for n in weights)), None)
    if anchor is None:
        return weights, notes
    prefixes = sorted(name.removesuffix(anchor) for name in weights if name.endswith(f".{anchor}"))
    if len(prefixes) > 1:
        raise ModelError(
            f"{where}: holds several models, under {', '.join(prefixes)}; set model.checkpoint_key to one of "
            + ", ".join(prefix.removesuffix(".") for prefix in prefixes)
        )
    prefix, found = prefixes[0], dict[str, Tensor]()
    for name, tensor in weights.items():
        short = name.removeprefix(prefix)
        found[short if short not in weights or short == name else name] = tensor
    notes.append(f"names are taken without their prefix {prefix}")
    return found, notes


def _reshaped(tensor: Tensor, own: Tensor | None) -> Tensor:
    """Returns a tensor with the model's sides of length one, such as a class token of shape (D,) as (1, 1, D)."""
    if own is None or tensor.shape == own.shape:
        return tensor
    return tensor.reshape(own.shape) if tensor.squeeze().shape == own.squeeze().shape else tensor


def _resampled(
    weights: dict[str, Tensor], module: Any, expected: Mapping[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """Applies timm's own conversion, which knows CLIP's, MAE's and DINO's names, and resamples to the model's sizes."""
    patch, own = weights.get("patch_embed.proj.weight"), expected["patch_embed.proj.weight"]
    if patch is not None and patch.ndim == 4 and patch.shape[1] == 3 != own.shape[1]:
        weights["patch_embed.proj.weight"] = adapt_input_conv(own.shape[1], patch)
        notes.append(f"patch embedding of 3 channels made one of {own.shape[1]}, as timm does")
    before = dict(weights)
    try:
        found: dict[str, Tensor] = checkpoint_filter_fn(weights, module)
    except (RuntimeError, AssertionError, AttributeError, KeyError, IndexError, ValueError):
        return before  # too far from the model for timm; what does not fit is told by name and shape
    if gone := [name for name in before if name not in found]:
        notes.append(f"left out or renamed as timm does: {some(gone)}")
    patch = before.get("patch_embed.proj.weight")
    if patch is not None and patch.ndim == 4 and patch.shape[-2:] != own.shape[-2:]:
        notes.append(f"patch embedding resampled from {_sides(patch)} to {_sides(own)} pixels, as timm does")
    key = "pos_embed"
    if key in before and key in found and before[key].shape != found[key].shape:
        prefix = 0 if module.no_embed_class else module.num_prefix_tokens
        side = math.isqrt(max(before[key].shape[1] - prefix, 0))
        now = "x".join(map(str, module.patch_embed.grid_size))
        notes.append(f"position embeddings resampled from {side}x{side} to {now} patches, bicubic, as timm does")
    return found


def _sides(kernel: Tensor) -> str:
    return "x".join(map(str, kernel.shape[-2:]))


def in_order(weights: dict[str, Tensor], rows: Sequence[int], notes: list[str]) -> dict[str, Tensor]:
    """Returns the weights with the rows of their heads in the order ``rows``, where they have as many."""
    heads = {n: t for n, t in weights.items() if n.startswith(_HEADS) and len(t) == len(rows)}
    if heads:
        notes.append(
            "the rows of its head are put in the order of the data's classes, whose names it has in another order"
        )
    return weights | {name: tensor[list(rows)] for name, tensor in heads.items()}


def with_own_head(weights: dict[str, Tensor], expected: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Returns the weights with the model's own heads where theirs are of other classes, which ``notes`` then say."""
    own, theirs = ({n: t for n, t in found.items() if n.startswith(_HEADS)} for found in (expected, weights))
    if {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in theirs.items()}:
        return weights
    notes.append("its head is not one of these classes; a new one is trained")
    return {n: t for n, t in weights.items() if n not in theirs} | own
