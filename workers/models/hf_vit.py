"""transformers' ViTForImageClassification and DeiTForImageClassification(WithTeacher) as timm's models, logits equal.

A folder of ``save_pretrained`` has ``config.json``, which says the structure, and weights, whose names follow the library's
version. What differs in the models: a DeiT without the teacher's head does not read its distillation token, which is
timm's register token then, with a position embedding like the others; LayerNorms have an eps of 1e-12, not 1e-6.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from workers.models.timm_vit import ModelError

NAMING = "hf_vit"

_ACTIVATIONS = {
    **{
        "gelu": "gelu",
        "gelu_python": "gelu",
        "quick_gelu": "quick_gelu",
        "relu": "relu",
        "silu": "silu",
        "swish": "silu",
    },
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"),
}
"""Activations of transformers to timm's; those of the second row calculate the same approximation in other ways."""

_DISTILLED = "deit_tiny_distilled_patch16_224"
"""Any of timm's two-headed models: all that it says besides is said by ``create``."""

_PLAIN = ("ViTForImageClassification", "DeiTForImageClassification", "ViTModel", "DeiTModel")
_TEACHER = "DeiTForImageClassificationWithTeacher"

_ENDS = "(weight|bias)"
_LAYER = r"(?:(?:vit|deit)\.)?(?:encoder\.layer|layers)\.(\d+)\."
_OUTER = r"(?:(?:vit|deit)\.)?"


def key_map(names: Iterable[str], *, teacher: bool) -> dict[str, str | None]:
    """Returns transformers' names, of versions before and after 5, to timm's: the rules that some of ``names`` need.

    Args:
        teacher: whether the model has a head for its distillation token.
    """
    layers = {
        r"attention\.attention\.(query|key|value)\.": r"attn.qkv{\2}.\3",
        r"attention\.(q|k|v)_proj\.": r"attn.qkv{\2}.\3",
        r"attention\.(?:output\.dense|o_proj)\.": r"attn.proj.\2",
        r"layernorm_before\.": r"norm1.\2",
        r"layernorm_after\.": r"norm2.\2",
        r"(?:intermediate\.dense|mlp\.fc1)\.": r"mlp.fc1.\2",
        r"(?:output\.dense|mlp\.fc2)\.": r"mlp.fc2.\2",
    }
    rules: dict[str, str | None] = {
        **{f"{_LAYER}{theirs}{_ENDS}": rf"blocks.\1.{ours}" for theirs, ours in layers.items()},
        rf"{_OUTER}embeddings\.cls_token": "cls_token",
        rf"{_OUTER}embeddings\.distillation_token": "dist_token" if teacher else "reg_token",
        rf"{_OUTER}embeddings\.position_embeddings": "pos_embed",
        rf"{_OUTER}embeddings\.patch_embeddings\.projection\.{_ENDS}": r"patch_embed.proj.\1",
        rf"{_OUTER}layernorm\.{_ENDS}": r"norm.\1",
        rf"(?:cls_)?classifier\.{_ENDS}": r"head.\1",
        rf"distillation_classifier\.{_ENDS}": r"head_dist.\1",
        rf"(?:{_OUTER}embeddings\.mask_token|{_OUTER}pooler\..+)": None,
    }
    listed = list(names)
    return {rule: ours for rule, ours in rules.items() if any(re.fullmatch(rule, name) for name in listed)}


def structure(config: Mapping[str, Any], where: str) -> tuple[str | None, dict[str, Any]]:
    """Returns timm's name, None for its plain ViT, and the settings of ``config.json``.

    Raises:
        ModelError: it is of another model, or of one that timm's cannot be.
    """
    found = config.get("architectures")
    kind = found[0] if isinstance(found, list) and found else None
    if config.get("model_type") not in ("vit", "deit") or kind not in (*_PLAIN, _TEACHER):
        raise ModelError(
            f"{where}: model.family hf_vit must be one of {', '.join((*_PLAIN[:2], _TEACHER))}, is {kind} of model_type "
            f"{config.get('model_type')!r}; for others see docs/your-model.md"
        )
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ModelError(f"{where}: hidden_act must be one of {', '.join(_ACTIVATIONS)}, is {activation!r}")
    width, hidden = config.get("hidden_size", 768), config.get("intermediate_size", 3072)
    patch = config.get("patch_size", 16)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (width, hidden, patch)):
        raise ModelError(f"{where}: hidden_size, intermediate_size and patch_size must be whole numbers above 0")
    distilled = config["model_type"] == "deit"
    settings = {
        "embed_dim": width,
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "mlp_ratio": hidden / width,
        "patch_size": patch,
        "qkv_bias": config.get("qkv_bias", True),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "act": _ACTIVATIONS[activation],
    }
    if kind == _TEACHER:
        return _DISTILLED, settings
    return None, {**settings, **({"reg_tokens": 1} if distilled else {})}
