"""ViLT's joint layer with a reduction of tokens between its attention and its MLP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workers.models import vilt
from workers.models import vision_language as vl
from workers.techniques.tokens.shared_joint_tokens import ReducingLayer, Seen, Stream, attend, joined


@dataclass(frozen=True)
class CarriedTokens(vilt.JointTokens):
    """Tokens with what the reducer of one layer tells that of the next."""

    carried: Any = None


class ReducedLayer(ReducingLayer, vilt.JointLayer):
    """A joint layer that passes on fewer tokens."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        raise RuntimeError("this layer passes on fewer tokens: call advance, a plain call would pass by the reduction")

    def advance(self, tokens: vilt.JointTokens) -> vilt.JointTokens:
        """See :meth:`workers.models.vilt.JointLayer.advance`."""
        before = [Stream(x, mask) for x, mask in zip(tokens.split(), tokens.split_mask(), strict=True)]
        text, (image, carried) = before[0], self.reducer.enter(before[1], getattr(tokens, "carried", None))
        hidden, mask, length = tokens.hidden, tokens.mask, tokens.num_text
        if image is not before[1]:
            hidden, mask = joined(text, image)
        attention: vl.FusedAttention = self.attention.attention
        q, k, v = attention.project(self.layernorm_before(hidden))
        asking = length if self.reducer.asks else 0
        out, shares = attend(attention, q, k, v, mask, asking, k.shape[2] - length)
        hidden = hidden + self.attention.output(out, hidden)
        seen = Seen(k[:, :, length:], k[:, :, :length], shares)
        text, image = Stream(hidden[:, :length], text.mask), Stream(hidden[:, length:], image.mask)
        found = self.reducer.reduce(text, image, seen, carried)
        if found.text is not None or found.image is not None:
            text = text if found.text is None else found.text.stream(text)
            image = image if found.image is None else found.image.stream(image)
            hidden, mask = joined(text, image)
        hidden = self.transform(hidden)
        self.reducer.leave(hidden[:, text.x.shape[1] :], found.carried)
        return CarriedTokens(hidden, mask, text.x.shape[1], found.carried)


def image_features(model: Any, batch: vl.Batch) -> list[Tensor]:
    """Returns the image tokens (B, I, C) of an untouched model after its last norm, for each picture of an example."""
    found = [model.encode(model.tokens(batch, image)) for image in range(model.images)]
    return [tokens.hidden[:, tokens.num_text :] for tokens in found]


def last_norm(model: Any, image: Tensor) -> Tensor:
    """Returns the last layer's image tokens as :func:`image_features` has them."""
    normed: Tensor = model.layernorm(image)
    return normed


def resample_(model: Any, size: int) -> None:
    """Makes the model one for images of ``size`` pixels a side, in place; on the meta device too."""
    embeddings = model.embeddings
    grid = size // model.shape.patch_size
    if not embeddings.position_embeddings.is_meta:
        table = vl.resample_positions(embeddings.position_embeddings.detach()[0], grid**2 + 1, mode="bilinear")
    else:
        table = torch.empty(grid**2 + 1, embeddings.position_embeddings.shape[-1], device="meta")
    embeddings.position_embeddings = nn.Parameter(table[None].contiguous().clone())
    embeddings.grid = grid
    model.shape = replace(model.shape, img_size=size)


def width(model: Any) -> int:
    """Returns C of the tokens between two layers."""
    found: int = model.layernorm.normalized_shape[0]
    return found
