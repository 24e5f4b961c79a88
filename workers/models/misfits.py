"""What is said of weights that do not fit a timm ViT: both groups of names, where the structures differ, a key map that would fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from workers.models import guessing
from workers.models.key_map import rename
from workers.models.local_weights import some
from workers.models.timm_vit import ModelError

_SHOWN = 6

_KEYS = {
    "embed_dim": "width in model.create",
    "depth": "depth in model.create",
    "patch_size": "patch in model.create",
    "mlp_ratio": "mlp_ratio in model.create",
    "reg_tokens": "registers in model.create",
    "queries, keys and values (heads times head_dim)": "heads in model.create, head_dim in model.options",
    "num_classes": "model.train: true for a new head, or data of those classes",
}
"""Where a study says what is not in ``model.options``."""


_TIMM = re.compile(
    r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj|norm|[qk]_norm)|ls[12]|mlp\.(fc1|fc2|norm))\.\w+"
    r"|(cls|reg|dist)_token|pos_embed|(patch_embed\.proj|norm|norm_pre|fc_norm|head|head_dist)\.\w+"
)
"""Names that timm's ViTs have, though not each of them: one that is not the model's means another structure, not another name."""


def refusal(found: Mapping[str, Tensor], module: nn.Module, fault: str) -> str:
    """Returns the lines that refuse weights, after everything was done that is done without being asked.

    Args:
        found: the weights as far as they were brought to the model's names.
        module: the model.
        fault: what :func:`workers.models.local_weights.fit_` says.
    """
    own = module.state_dict()
    unexpected = {name: tensor for name, tensor in found.items() if name not in own}
    missing = {name: tensor for name, tensor in own.items() if name not in found}
    lines, named = [fault], dict(found)
    rules: dict[str, str] = {}
    if unexpected and missing:
        lines += ["names of the checkpoint that the model has not: " + _grouped(unexpected)]
        lines += ["names of the model that the checkpoint has not: " + _grouped(missing)]
        foreign = {name: tensor for name, tensor in unexpected.items() if not _TIMM.fullmatch(name)}
        rules = guessing.key_map(foreign, own["patch_embed.proj.weight"][0].numel())
        try:
            named = rename(found, rules, module)[0] if rules else named
        except ModelError:
            rules = {}
    theirs, ours = structure(named), structure(own)
    for key in [key for key in theirs if theirs[key] != ours.get(key)]:
        remedy = _KEYS.get(key, f"{key} in model.options")
        lines.append(f"by its shapes the checkpoint has {key} {theirs[key]}, the model {ours.get(key)}: {remedy}")
    lacking = [name for name in own if name not in named]
    if lacking and all(name.startswith(("head.", "head_dist.")) for name in lacking):
        lines.append("the checkpoint has no head that could be told: model.train: true trains a new one")
    if rules:
        rest = [name for name in named if name not in own] + [name for name in own if name not in named]
        but = f", but leaves {len(rest)} names open: {some(rest)}" if rest else ""
        lines.append(
            f"told from shapes and names, this would fit{but}; compare it with the model's code before you use it:"
        )
        lines += ["  key_map:", *(f"    '{expression}': '{target}'" for expression, target in rules.items())]
    return "\n".join(lines)


def _grouped(tensors: Mapping[str, Tensor]) -> str:
    """Returns names with their shapes, those of the same place in every block once."""
    shapes = {re.sub(r"\d+", "N", name, count=1): tuple(t.shape) for name, t in tensors.items()}
    return some([f"{name} {shape}" for name, shape in shapes.items()], _SHOWN)


def structure(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the settings of a timm ViT that shapes under its names tell."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    found: dict[str, Any] = {}
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))}
    patch, fc1 = shapes.get("patch_embed.proj.weight", ()), shapes.get("blocks.0.mlp.fc1.weight", ())
    qkv, head = shapes.get("blocks.0.attn.qkv.weight", ()), shapes.get("head.weight", ())
    if len(fc1) == 2:
        found |= {"embed_dim": fc1[1], "mlp_ratio": round(fc1[0] / fc1[1], 4)}
    if len(patch) == 4:
        found |= {"embed_dim": patch[0], "patch_size": patch[2], "in_chans": patch[1]}
    if blocks:
        found["depth"] = max(blocks) + 1
    if qkv:
        found["queries, keys and values (heads times head_dim)"] = qkv[0] // 3
        found |= {"qkv_bias": "blocks.0.attn.qkv.bias" in shapes, "qk_norm": "blocks.0.attn.q_norm.weight" in shapes}
        found["layer scale (init_values)"] = "blocks.0.ls1.gamma" in shapes
    if len(head) == 2:
        found["num_classes"] = head[0]
    if found:
        found |= {"class_token": "cls_token" in shapes, "pre_norm": "norm_pre.weight" in shapes}
        found["reg_tokens"] = shapes.get("reg_token", (1, 0))[1]
        if "fc_norm.weight" in shapes or "norm.weight" in shapes:
            found["norm after pooling (global_pool: avg)"] = "fc_norm.weight" in shapes
        found["distillation token (a name with distilled)"] = "dist_token" in shapes
    return found
