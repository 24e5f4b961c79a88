"""ToMe in vision-language models: image tokens merge with image tokens, in every joint layer or in METER's image encoder.

The first is the baseline of PuMer's paper (arXiv 2305.17530, section 4): image tokens alone, text is not asked. The second
goes together with PuMer in the fusion layers, which then start with fewer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.record import Applied, Surroundings
from workers.techniques.tokens.shared_joint_tokens import HIDDEN, Change, Reducer, Reduction, Seen, Stream, put_reducers
from workers.techniques.tokens.shared_merging import Matching, merge
from workers.techniques.tokens.tome import IMAGE_TOWER, SHAPES, Config, match, reductions


class MergingReducer(Reducer):
    """Merges image tokens by their keys; the sizes are carried from layer to layer.

    Args:
        proportional: a merged token counts as often as it has sources, as an addition to the attention's logits.
    """

    def __init__(self, r: int, proportional: bool) -> None:
        super().__init__()
        self.r, self.proportional = r, proportional

    def reduce(self, text: Stream, image: Stream, seen: Seen, carried: Any) -> Reduction:
        """Returns the change of the image; the text stays. Carried are the sizes, and whether some are 0, of padding."""
        size, padded = (image.weight(), image.mask is not None) if carried is None else carried
        matching = match(seen.image_metric(), self.r, prefix=1, valid=size[..., 0] > 0 if padded else None)
        if matching is None:
            return Reduction(carried=(size, padded))
        return Reduction(image=self._change(matching, size, padded), carried=(matching.sums(size), padded))

    def _change(self, matching: Matching, size: Tensor, padded: bool) -> Change:
        after = matching.sums(size)[..., 0]
        if self.proportional:
            return Change(matching, size, after.log().masked_fill(after == 0, HIDDEN))
        return Change(matching, size, after > 0 if padded else None)


class MergingEncoder(nn.Module):
    """METER's image encoder with merging in each layer, between attention and MLP: the same children under the same names.

    Args:
        merged: tokens to merge, one number a layer.

    Attributes:
        tokens_left: of a whole image after the last layer.
    """

    def __init__(self, encoder: nn.Module, merged: Sequence[int], proportional: bool) -> None:
        super().__init__()
        for name, part in encoder.named_children():
            self.add_module(name, part)
        self.merged, self.proportional = tuple(merged), proportional
        self.training = encoder.training  # a new module would be in training mode

    @property
    def tokens_left(self) -> int:
        tokens: int = self.get_submodule("embeddings").num_positions  # type: ignore[assignment]
        for r in self.merged:
            tokens -= min(r, (tokens - 1) // 2)
        return tokens

    def forward(self, pixels: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (B, I', image_dim) of ``pixels`` (B, 3, H, W).

        Raises:
            ValueError: a mask, which would have to become another one.
        """
        if mask is not None:
            raise ValueError(
                f"tome: where={IMAGE_TOWER} takes images without pixel_mask; make them square, or fill them"
            )
        parts: Any = self
        hidden: Tensor = parts.norm_before(parts.embeddings(pixels))
        size = torch.ones(*hidden.shape[:2], 1, device=hidden.device)
        for layer, r in zip(parts.layers, self.merged, strict=True):
            bias = size if self.proportional and hidden.shape[1] < parts.embeddings.num_positions else None
            out, keys = _attend(layer.self_attn, layer.layer_norm1(hidden), bias)
            hidden = hidden + out
            matching = match(keys, r, prefix=1)
            if matching is not None:
                hidden, size = merge(hidden, size, matching)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        normed: Tensor = parts.norm_after(hidden)
        return normed


def _attend(attention: Any, hidden: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes transformers' ``CLIPAttention`` with keys that count as often as their size (B, N, 1) says.

    Returns:
        output (B, N, C), keys averaged over the heads (B, N, D).
    """
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (part(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
    mask = None if size is None else size.log().transpose(1, 2)[:, None].to(q.dtype)
    dropout = attention.dropout if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=attention.scale)
    return attention.out_proj(out.transpose(1, 2).flatten(2)), k.mean(dim=1)


def apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Puts the merging in, in place."""
    layers = merging_layers(model, config.where)
    merged = reductions(config.r, SHAPES[config.schedule], len(layers))
    resolved = {"merged": merged, "proportional": config.proportional_attention, "where": config.where}
    return Applied(rebuild(model, resolved), resolved, [name for name, r in zip(layers, merged, strict=True) if r])


def merging_layers(model: Any, where: str) -> list[str]:
    """Returns the names of the layers that merge.

    Raises:
        ValueError: an image encoder is asked for where there is none.
    """
    if where != IMAGE_TOWER:
        return [f"layers.{i}" for i in range(len(model.layers))]
    if not hasattr(model, "image_encoder"):
        raise ValueError(f"tome: where={IMAGE_TOWER} needs an image encoder of its own; {model.family} has none")
    return [f"image_encoder.layers.{i}" for i in range(len(model.image_encoder.layers))]


def rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Puts the merging in, in place."""
    vlm: Any = model
    merged, proportional = resolved["merged"], resolved["proportional"]
    if resolved["where"] == IMAGE_TOWER:
        vlm.image_encoder = MergingEncoder(vlm.image_encoder, merged, proportional)
    elif any(merged):
        put_reducers(model, {i: MergingReducer(r, proportional) for i, r in enumerate(merged)})
    return model
