"""METER's fusion layer with a reduction of tokens: the text layer's attentions decide, and its MLP and the whole image
layer see what is left.

The image layer attends, as before, to what the text was before this layer, reduced in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workers.models import meter
from workers.models import vision_language as vl
from workers.techniques.tokens.shared_joint_tokens import ReducingLayer, Seen, Stream, attend


@dataclass(frozen=True)
class CarriedTokens(meter.CrossTokens):
    """Both streams with what the reducer of one layer tells that of the next."""

    carried: Any = None


class ReducedLayer(ReducingLayer, meter.FusionLayer):
    """A fusion layer that passes on fewer tokens."""

    def forward(self, tokens: meter.CrossTokens) -> meter.CrossTokens:
        """See :meth:`workers.models.meter.FusionLayer.forward`."""
        text = Stream(tokens.text, tokens.text_mask)
        image, carried = self.reducer.enter(Stream(tokens.image, tokens.image_mask), getattr(tokens, "carried", None))
        attended, seen = self._ask(text, image)
        found = self.reducer.reduce(text, image, seen, carried)
        if found.text is not None:
            text, attended = found.text.stream(text), found.text.of(attended)
        if found.image is not None:
            image = found.image.stream(image)
        new_text = self.text.transform(attended)
        new_image = self.image(image.x, image.mask, text.x, text.mask)
        self.reducer.leave(new_image, found.carried)
        return CarriedTokens(new_text, new_image, text.mask, image.mask, found.carried)

    def _ask(self, text: Stream, image: Stream) -> tuple[Tensor, Seen]:
        """Returns the text (B, T, C) after both its attentions, and what they compared."""
        own, cross = self.text.self_attention, self.text.cross_attention
        q, text_keys, v = own.attention.project(text.x)
        hidden = own.output(own.attention.attend(q, text_keys, v, text.mask), text.x)
        q, k, v = cross.attention.project(hidden, image.x)
        asking = q.shape[2] if self.reducer.asks else 0
        out, shares = attend(cross.attention, q, k, v, image.mask, asking, k.shape[2])
        return cross.output(out, hidden), Seen(k, text_keys, shares)


def image_features(model: Any, batch: vl.Batch) -> list[Tensor]:
    """Returns the image tokens (B, I, C) of an untouched model after its last layer, for each picture of an example."""
    text, text_mask = model.encode_text(batch)
    found = []
    for image in range(model.images):
        features, mask = model.encode_image(batch, image)
        features, mask = vl.for_each_text(features, mask, len(text))
        found.append(model.encode(meter.CrossTokens(text, features, text_mask, mask)).image)
    return found


def last_norm(model: Any, image: Tensor) -> Tensor:
    """Returns the last layer's image tokens as :func:`image_features` has them: each layer ends in a norm."""
    return image


def resample_(model: Any, size: int) -> None:
    """Makes the model one for images of ``size`` pixels a side, in place; on the meta device too."""
    embeddings = model.image_encoder.embeddings
    grid = size // model.shape.patch_size
    weight = embeddings.position_embedding.weight.detach()
    if weight.is_meta:
        table = torch.empty(grid**2 + 1, weight.shape[1], device="meta")
    else:
        table = vl.resample_positions(weight, grid**2 + 1, mode="bicubic")
    embeddings.position_embedding = nn.Embedding(len(table), table.shape[1], _weight=table.contiguous().clone())
    embeddings.position_embedding.train(embeddings.training)
    embeddings.position_ids = torch.arange(grid**2 + 1, device=weight.device)[None]
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = size, grid**2, grid**2 + 1
    model.shape = replace(model.shape, img_size=size)


def width(model: Any) -> int:
    """Returns C of the tokens between two layers."""
    found: int = model.image_pooler.dense.in_features
    return found
