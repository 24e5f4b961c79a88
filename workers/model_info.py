"""Facts about a model that techniques judge themselves by: read from a model, told to techniques. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

GATED = frozenset({"GluMlp", "SwiGLU"})
"""timm's MLPs whose first layer gives two numbers a dimension, one of which gates the other."""


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
        block, attention, mlp: what the blocks of timm's models are and hold, by class; those of a plain ViT are ``Block``,
            ``Attention`` and ``Mlp``, others have their module's name in front unless they are :data:`GATED`. What a technique
            has put in such a place counts as what stood there.
        has_attn_norm: the outputs of all heads are normalised together. has_mlp_norm: the MLP's dimensions are.
        post_norm: a block normalises what its attention and MLP give, not what they get.
        pooling: what the head reads: ``token``, a mean or maximum of tokens, or ``map`` and ``prr``, attention over them.
        norm_before_pool, norm_after_pool: where the last norm stands; pools_prefix: prefix tokens are pooled too.
        has_positions: learned position embeddings are added to the tokens.
        rope_a_block: every block turns its queries and keys by angles of its own.
        drops_patches: training leaves out patch tokens at random.
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
    block: str = "Block"
    attention: str = "Attention"
    mlp: str = "Mlp"
    has_attn_norm: bool = False
    has_mlp_norm: bool = False
    post_norm: bool = False
    pooling: str = "token"
    norm_before_pool: bool = True
    norm_after_pool: bool = False
    pools_prefix: bool = False
    has_positions: bool = True
    rope_a_block: bool = False
    drops_patches: bool = False

    @property
    def mlp_matrices(self) -> int:
        """Weights that a dimension of an MLP has for every channel: 2, or 3 where it is gated."""
        return 3 if self.mlp in GATED else 2
