"""Facts about a model that techniques judge themselves by: read from a model, told to techniques. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model that a technique can judge itself by before any device time is spent.

    Attributes:
        num_tokens: sequence length, prefix tokens included.
        num_prefix_tokens: class, distillation and register tokens (timm's name); they come first.
        has_distil_token: one of the prefix tokens is a distillation token with its own head.
        num_heads, mlp_hidden: one entry a block; they differ after pruning.
        device: device kind the trial runs on, ``cpu`` or ``cuda``.
        has_qk_norm: queries and keys are normalised over the dimensions of a head.
        num_text_tokens: of ``num_tokens`` those of the text, which come first; 0 for models of images alone.
        reduces_tokens: a layer of ``depth`` removes or merges tokens already (of vision-language models alone).
        tower_depth: layers of an image encoder that has its own before the layers of ``depth`` (METER), else 0.
    """

    family: str
    name: str
    depth: int
    embed_dim: int
    head_dim: int
    num_heads: tuple[int, ...]
    mlp_hidden: tuple[int, ...]
    num_tokens: int
    num_prefix_tokens: int
    has_class_token: bool
    has_distil_token: bool
    image_size: int
    patch_size: int
    in_chans: int
    num_classes: int
    params: int
    device: str = "cpu"
    has_qk_norm: bool = False
    num_text_tokens: int = 0
    reduces_tokens: bool = False
    tower_depth: int = 0
