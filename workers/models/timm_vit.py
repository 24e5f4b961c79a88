"""Vision transformers of timm: any that is a stack of attentions and MLPs by name (ViT, DeiT, SigLIP, DINOv2 and v3, EVA, BEiT),
or a plain one built from width, depth, heads and patch size.

``create`` holds keyword arguments of timm's model, those of :mod:`workers.model_settings` alone. Four are ours:
``pos_embed_std`` draws the position embeddings anew with that standard deviation (0.02 is too small for models of a few
pixels a side trained from scratch), ``norm_eps`` is added to the variance in every LayerNorm, ``act`` names the MLP's activation, and
``head_dim`` is the dimension of a head where that is not width over heads.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from timm.layers import Attention, GluMlp, Mlp, PatchDropout, PatchDropoutWithIndices, QuickGELU, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer, init_weights_vit_timm
from torch import nn

from workers import model_settings
from workers.model_info import ModelInfo

if TYPE_CHECKING:
    from workers.tasks import TaskInfo

_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)
"""Of a model and a tag of its weights; timm would also read a folder or a hub's repository, of ``local-dir:`` and ``hf-hub:``."""

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
"""Values of ``act``."""

_OURS = ("pos_embed_std", "norm_eps", "act", "head_dim")
_NORMS = ("q_norm", "k_norm", "norm")
"""Layers of an attention whose size is that of its heads."""

_FROM_DATA = {"num_classes": "num_classes", "in_chans": "in_chans", "img_size": "image_size"}


class ModelError(ValueError):
    """A model that cannot be built, or weights that do not fit it."""


def describe(model: Mapping[str, Any], data: TaskInfo) -> dict[str, Any]:
    """See :func:`workers.models.describe`."""
    create = dict(model.get("create") or {})
    for key, fact in _FROM_DATA.items():
        value = getattr(data, fact)
        if create.setdefault(key, value) != value:
            raise ModelError(f"model.create.{key} must be the data's {fact} {value}, got {create[key]}; leave it out")
    return {"family": "timm", "name": model.get("name"), "create": create}


def create(description: Mapping[str, Any], *, device: str = "cpu", pretrained: bool = False) -> nn.Module:
    """Builds a described model, randomly initialised from torch's global generator, or with timm's pretrained weights.

    Raises:
        ModelError: an unknown name or argument, no plain ViT, or pretrained weights that cannot be fetched.
    """
    name, kwargs = description["name"], dict(description["create"])
    if faults := model_settings.faults("timm", kwargs):
        raise ModelError("; ".join(faults))
    pos_embed_std, norm_eps, act, head_dim = (kwargs.pop(key, None) for key in _OURS)
    if name is None and pretrained:
        raise ModelError("model.pretrained needs model.name: only named timm models have pretrained weights")
    if name is not None and not (_NAME.fullmatch(name) and timm.is_model(name)):
        near = difflib.get_close_matches(
            name, [known for known in timm.list_models() if re.match("vit|deit|eva|beit", known)], n=1
        )
        raise ModelError(f"model.name: timm has no model {name!r}" + (f"; nearest: {near[0]}" if near else ""))
    try:
        with torch.device(device):
            module: Any = _construct(name, kwargs | ({"act_layer": ACTIVATIONS[act]} if act else {}), pretrained)
            if head_dim is not None and not pretrained:
                _set_head_dim(module, head_dim)
    except (TypeError, AssertionError, ValueError) as error:
        raise ModelError(f"model {name or 'VisionTransformer'}: create {kwargs} is refused: {error}") from error
    _require_plain(module, name)
    if pos_embed_std is not None and not pretrained and module.pos_embed is not None:
        nn.init.normal_(module.pos_embed, std=pos_embed_std)
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = True  # in every arm: a baseline without it flatters everything measured against it
        if norm_eps is not None and isinstance(part, nn.LayerNorm):
            part.eps = norm_eps
    return cast(nn.Module, module)


def _construct(name: str | None, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    if name is None:
        module: nn.Module = VisionTransformer(**kwargs)
        return module
    try:
        created: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
        return created
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ModelError(f"model {name}: timm cannot build it: {error}") from error
        raise ModelError(
            f"model {name}: its pretrained weights could not be loaded ({str(error).splitlines()[0]}); connect to the "
            "network, fill the Hugging Face cache (HF_HOME), or give model.checkpoint a local file"
        ) from error


_STACKS = (VisionTransformer, Eva, Beit)

POST_NORM = (ResPostBlock, EvaBlockPostNorm)
"""Blocks that normalise what their attention and MLP give, not what they get."""


def _set_head_dim(module: Any, head_dim: int) -> None:
    """Gives every attention heads of another size, which timm's constructor does not; drawn as timm draws them."""
    for block in getattr(module, "blocks", ()):
        attention: Any = getattr(block, "attn", None)
        if type(attention) is not Attention or any(hasattr(getattr(attention, norm), "weight") for norm in _NORMS):
            raise ModelError("model.create.head_dim must be left out of models whose attention is not plain")
        width, inner = attention.qkv.in_features, attention.num_heads * head_dim
        attention.qkv = nn.Linear(width, 3 * inner, bias=attention.qkv.bias is not None)
        attention.proj = nn.Linear(inner, width, bias=attention.proj.bias is not None)
        attention.head_dim, attention.attn_dim, attention.scale = head_dim, inner, head_dim**-0.5
        for layer in (attention.qkv, attention.proj):
            init_weights_vit_timm(layer)


def _require_plain(module: Any, name: str | None) -> None:
    """Refuses what is no stack of blocks, each an attention and an MLP, behind one embedding of patches."""
    if not isinstance(module, _STACKS) or not isinstance(module.patch_embed, PatchEmbed):
        found = (
            f"has a {type(module.patch_embed).__name__}"
            if isinstance(module, _STACKS)
            else f"is a {type(module).__name__}"
        )
        kinds = " or ".join(stack.__name__ for stack in _STACKS)
        raise ModelError(f"model {name} {found}; must be a plain timm {kinds}, with a PatchEmbed")
    for block in module.blocks:
        if not all(hasattr(block, part) for part in ("attn", "mlp")) or not hasattr(block.attn, "proj"):
            raise ModelError(f"model {name} has blocks of type {type(block).__name__}; must be plain attention + MLP")
        if hasattr(block.attn, "qkv_bias_separate"):
            block.attn.qkv_bias_separate = (
                True  # otherwise the weight is read past whatever a technique makes of the layer
            )
    embed = module.patch_embed
    if any(side % patch for side, patch in zip(embed.img_size, embed.patch_size, strict=True)):
        raise ModelError(f"image size {embed.img_size[0]} must be a multiple of the patch size {embed.patch_size[0]}")


def model_info(module: nn.Module, device: str) -> ModelInfo:
    """See :func:`workers.models.model_info`.

    ``mlp_hidden`` is the input width of each block's second MLP layer; ``params`` counts parameters, packed weights are
    buffers and do not count.
    """
    vit: Any = module  # timm is not typed
    attentions = [block.attn for block in vit.blocks]
    architecture = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture")
    dims = [getattr(attn, "head_dim", attn.proj.in_features // attn.num_heads) for attn in attentions]
    return ModelInfo(
        family="timm",
        name=architecture or "vit",
        depth=len(attentions),
        embed_dim=vit.embed_dim,
        head_dim=dims[0],
        num_heads=tuple(a.num_heads for a in attentions),
        mlp_hidden=tuple(block.mlp.fc2.in_features for block in vit.blocks),
        num_tokens=vit.patch_embed.num_patches + vit.num_prefix_tokens,
        num_prefix_tokens=vit.num_prefix_tokens,
        has_class_token=vit.cls_token is not None,
        has_distil_token=hasattr(vit, "dist_token"),
        image_size=vit.patch_embed.img_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        in_chans=vit.in_chans,
        num_classes=vit.num_classes,
        params=sum(p.numel() for p in vit.parameters()),
        device=device,
        has_qk_norm=_is_there(attentions[0], "q_norm"),
        block=_called(vit.blocks[0], Block),
        attention=_called(attentions[0], Attention),
        mlp=_called(vit.blocks[0].mlp, Mlp),
        has_attn_norm=_is_there(attentions[0], "norm"),
        has_mlp_norm=_is_there(vit.blocks[0].mlp, "norm"),
        post_norm=isinstance(vit.blocks[0], POST_NORM),
        pooling=vit.global_pool,
        norm_before_pool=_is_there(vit, "norm"),
        norm_after_pool=_is_there(vit, "fc_norm"),
        pools_prefix=bool(getattr(vit, "pool_include_prefix", False)),
        has_positions=vit.pos_embed is not None,
        rope_a_block=bool(getattr(vit, "rope_mixed", False)),
        drops_patches=isinstance(getattr(vit, "patch_drop", None), PatchDropout | PatchDropoutWithIndices),
    )


def _is_there(module: Any, part: str) -> bool:
    """Returns whether the model has a part that computes something; what a technique put in an empty place does not count."""
    found = getattr(module, part, None)
    return type(found).__module__.startswith(("timm.", "torch.")) and not isinstance(found, nn.Identity)


def _called(module: nn.Module, plain: type) -> str:
    """Returns the class of a part of a block as :class:`ModelInfo` names it."""
    kind = type(module)
    if not kind.__module__.startswith("timm.") or kind in (plain, GluMlp, SwiGLU):
        return kind.__name__ if kind in (GluMlp, SwiGLU) else plain.__name__
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
