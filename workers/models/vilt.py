"""ViLT: one transformer over the tokens of a text and the linearly projected patches of its image.

Source: Kim, Son, Kim, "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", arXiv
2102.03334, section 3; the task heads are its section 4's. PuMer (arXiv 2305.17530, section 3) reduces tokens in its layers.

Differs from the paper: patches stay in raster order, and a subset is drawn only where an image has more than
``max_image_length``, from a seed and the image's size alone, so that an image's result depends neither on the call nor on
the rest of its batch. The release permutes the patches anew in each call; without token reduction their order means
nothing. ``shuffle_patches`` permutes them, under the seed. Attention is fused.

Parts are transformers', and so are the names of the weights below ``embeddings`` and in each layer. Weights of published
models: :mod:`workers.models.vilt_release`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.model_info import ModelInfo
from workers.models import vision_language as vl
from workers.models.quiet_imports import quiet_registration
from workers.models.timm_vit import ModelError

with quiet_registration():
    from transformers import ViltConfig
    from transformers.models.vilt import modeling_vilt

_parts: Any = modeling_vilt  # its constructors are not typed

NAMED: Mapping[str, Mapping[str, Any]] = {
    "vilt_b32": {},
    "vilt_tiny": {
        **{"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2, "img_size": 32, "patch_size": 8},
        **{"vocab_size": 256, "max_text_tokens": 20, "dropout": 0.0, "pos_embed_std": 0.2, "init_std": 0.15},
    },
}
"""Settings that differ from ViLT-B/32's."""

TEXT_TYPE, IMAGE_TYPE = 0, 1
"""Rows of the modality embedding; the second image of NLVR2 has row 2."""


@dataclass(frozen=True)
class ViltShape:
    """Settings of a ViLT; the defaults are ViLT-B/32's (section 4.2), the vocabulary BERT's.

    ``num_classes`` is for VQA alone, other tasks have theirs. ``max_image_length`` None takes every patch. ``init_std`` is
    of new weights, BERT's 0.02, with which models of width 64 do not learn. Words are timm's where it has one.
    """

    task: str
    num_classes: int | None = None
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: int = 4
    img_size: int = 384
    patch_size: int = 32
    in_chans: int = 3
    vocab_size: int = 30522
    max_text_tokens: int = 40
    max_image_length: int | None = None
    patch_seed: int = 0
    shuffle_patches: bool = False
    dropout: float = 0.1
    pos_embed_std: float = 0.02
    init_std: float = 0.02

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", vl.num_classes(self.task, self.num_classes))
        vl.require_multiples(vars(self), {"embed_dim": "num_heads", "img_size": "patch_size"})
        if self.max_image_length is not None and self.max_image_length < 1:
            raise ModelError(
                f"model.create.max_image_length must be at least 1, got {self.max_image_length}; leave it out for every patch"
            )


def describe(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the complete description of a model from its ``name`` and ``create``; see :func:`vision_language.describe`."""
    return vl.describe("vilt", ViltShape, NAMED, model)


def create(description: Mapping[str, Any], *, device: str = "cpu") -> Vilt:
    """Builds a described model with random weights from torch's global generator, or on ``meta`` with none.

    Raises:
        ModelError: settings that are unknown or contradict each other.
    """
    with torch.device(device):
        return Vilt(ViltShape(**describe(description)["create"]))


def model_info(module: nn.Module, device: str) -> ModelInfo:
    """See :func:`workers.models.model_info`: blocks are the layers, tokens those of the longest text and of a square image."""
    model: Any = module
    shape, patches = model.shape, model.embeddings.grid**2
    if model.embeddings.max_image_length is not None:
        patches = min(patches, model.embeddings.max_image_length)
    return vl.model_info(
        model,
        device,
        [layer.attention.attention for layer in model.layers],
        embed_dim=model.layernorm.normalized_shape[0],
        mlp_hidden=tuple(layer.output.dense.in_features for layer in model.layers),
        num_tokens=shape.max_text_tokens + 1 + patches,
        image_size=model.embeddings.grid * shape.patch_size,
    )


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointTokens:
    """The sequence between two layers: text tokens, then the image's, class token first in each.

    The modalities never mix: whatever removes or merges tokens does so within ``hidden[:, :num_text]`` or within
    ``hidden[:, num_text:]`` and writes the new ``mask`` and ``num_text``.
    """

    hidden: Tensor  # (B, num_text + I, C)
    mask: Tensor | None  # (B, num_text + I): bool, true where valid; or float, added to the attention logits
    num_text: int

    @property
    def protected(self) -> tuple[int, int]:
        """Positions of the text's and the image's class token, which no reduction may remove."""
        return (0, self.num_text)

    def split(self) -> tuple[Tensor, Tensor]:
        """Returns the text tokens (B, num_text, C) and the image tokens (B, I, C)."""
        return self.hidden[:, : self.num_text], self.hidden[:, self.num_text :]

    def split_mask(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the masks of both, in the same order."""
        return (None, None) if self.mask is None else (self.mask[:, : self.num_text], self.mask[:, self.num_text :])


def chosen_patches(rows: int, columns: int, *, limit: int | None, seed: int, shuffle: bool) -> Tensor:
    """Returns which patches of a (rows, columns) image are taken: raster positions (min(limit, rows * columns),), int64.

    All of them in raster order, unless there are more than ``limit`` or ``shuffle`` is set. Depends on the arguments alone.
    """
    count = rows * columns
    if not shuffle and (limit is None or count <= limit):
        return torch.arange(count, device="cpu")
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:limit]
    return order if shuffle else order.sort().values


# --- modules ----------------------------------------------------------------------------------------------------------


class JointEmbeddings(nn.Module):
    """Tokens of both modalities from a batch; section 3.1, with transformers' text and patch embeddings.

    Position embeddings belong to a grid of ``img_size``; an image of R x S patches has them interpolated to (R, S).
    """

    def __init__(self, config: ViltConfig, shape: ViltShape, modalities: int) -> None:
        super().__init__()
        width = shape.embed_dim
        self.text_embeddings = _parts.TextEmbeddings(config)
        self.patch_embeddings = _parts.ViltPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.grid = shape.img_size // shape.patch_size
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.grid**2 + 1, width))
        self.token_type_embeddings = nn.Embedding(modalities, width)
        self.dropout = nn.Dropout(shape.dropout)
        self.patch_size = shape.patch_size
        self.max_image_length = shape.max_image_length
        self.patch_seed = shape.patch_seed  # a training loop that wants another subset each epoch sets it
        self.shuffle_patches = shape.shuffle_patches

    def forward(self, batch: vl.Batch, image_type: int) -> JointTokens:
        """Returns the tokens of one-image examples; see :mod:`workers.models.vision_language` for the batch."""
        ids, types = vl.text_part(batch, "input_ids"), vl.text_part(batch, "token_type_ids")
        text = self.text_embeddings(input_ids=ids, token_type_ids=types)
        image, image_mask = self.image(batch["pixel_values"], batch.get("pixel_mask"))
        image, image_mask = vl.for_each_text(image, image_mask, len(text))
        mask = vl.joined_mask(vl.text_mask(batch), image_mask, text, image)
        kinds = self.token_type_embeddings.weight
        hidden = torch.cat([text + kinds[TEXT_TYPE], image + kinds[image_type]], dim=1)
        return JointTokens(hidden, mask, text.shape[1])

    def image(
        self,
        pixels: Tensor,  # (B, 3, H, W)
        pixel_mask: Tensor | None,  # (B, H, W)
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the class token and the chosen patches (B, 1 + I, C), and which of them are valid (B, 1 + I).

        Raises:
            ValueError: a pixel mask that leaves no patch of an image; the message has its number in the batch.
        """
        patches = self.patch_embeddings(pixels)  # (B, C, h, w)
        height, width = patches.shape[-2:]
        sizes = [(height, width)] * len(patches) if pixel_mask is None else self._sizes(pixel_mask)
        positions = {size: self._positions(size, (height, width)) for size in set(sizes)}  # (h * w, C) each
        chosen = {size: self._chosen(size, width) for size in set(sizes)}
        count = max(len(index) for index in chosen.values())
        patches = patches.flatten(2).transpose(1, 2)
        if len(chosen) == 1:  # every image has the same patches: no padding
            mask, index = None, chosen[sizes[0]].to(patches.device)
            patches = patches + positions[sizes[0]]
            whole = count == height * width and not self.shuffle_patches
            patches = patches if whole else patches[:, index]
        else:
            patches = patches + torch.stack([positions[size] for size in sizes])
            indices = torch.stack([functional.pad(chosen[size], (0, count - len(chosen[size]))) for size in sizes])
            lengths = torch.tensor([1 + len(chosen[size]) for size in sizes], device="cpu")
            mask = (torch.arange(1 + count, device="cpu") < lengths[:, None]).to(patches.device)
            indices = indices.to(patches.device)[..., None].expand(-1, -1, patches.shape[-1])
            patches = patches.gather(1, indices)
        first = (self.cls_token[0] + self.position_embeddings[0, :1]).expand(len(patches), 1, -1)
        return self.dropout(torch.cat([first, patches], dim=1)), mask

    def _sizes(self, pixel_mask: Tensor) -> list[tuple[int, int]]:
        """Returns each image's (rows, columns) of valid patches: those whose first pixel is one of the image's."""
        first = pixel_mask[:, :: self.patch_size, :: self.patch_size].bool()
        counts = torch.stack([first[:, :, 0].sum(1), first[:, 0].sum(1)], dim=1).tolist()
        for example, (rows, columns) in enumerate(counts):
            if not rows or not columns:
                raise ValueError(
                    f"batch: example {example}: pixel_mask has no pixel at its top left; no patch is valid"
                )
        return [(rows, columns) for rows, columns in counts]

    def _positions(self, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
        """Returns the position embeddings of an image of ``size`` patches inside ``padded`` ones: (h * w, C)."""
        grid = self.position_embeddings[0, 1:].T.reshape(1, -1, self.grid, self.grid)
        if size != (self.grid, self.grid):
            grid = functional.interpolate(grid, size=size, mode="bilinear", align_corners=True)
        grid = functional.pad(grid, (0, padded[1] - size[1], 0, padded[0] - size[0]))
        return grid.flatten(2)[0].T

    def _chosen(self, size: tuple[int, int], width: int) -> Tensor:
        """Returns the chosen patches' raster positions in the padded grid, which is ``width`` patches wide."""
        rows, columns = size
        index = chosen_patches(
            rows, columns, limit=self.max_image_length, seed=self.patch_seed, shuffle=self.shuffle_patches
        )
        return index // columns * width + index % columns


class JointAttention(nn.Module):
    """Fused self-attention over both modalities, with transformers' output projection."""

    def __init__(self, config: ViltConfig, shape: ViltShape) -> None:
        super().__init__()
        self.attention = vl.FusedAttention(shape.embed_dim, shape.num_heads, shape.dropout)
        self.output = _parts.ViltSelfOutput(config)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.output(self.attention(hidden, mask), hidden)  # adds no residual; the layer does
        return out


class JointLayer(nn.Module):
    """A pre-norm transformer layer in two steps, between which tokens can be reduced."""

    def __init__(self, config: ViltConfig, shape: ViltShape) -> None:
        super().__init__()
        self.attention = JointAttention(config, shape)
        self.intermediate = _parts.ViltIntermediate(config)
        self.output = _parts.ViltOutput(config)
        self.layernorm_before = nn.LayerNorm(shape.embed_dim, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(shape.embed_dim, eps=config.layer_norm_eps)

    def attend(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns ``hidden`` (B, N, C) after the attention and its residual."""
        attended: Tensor = hidden + self.attention(self.layernorm_before(hidden), mask)
        return attended

    def transform(self, hidden: Tensor) -> Tensor:
        """Returns ``hidden`` (B, N, C) after the MLP and its residual."""
        out: Tensor = self.output(self.intermediate(self.layernorm_after(hidden)), hidden)
        return out

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.transform(self.attend(hidden, mask))

    def advance(self, tokens: JointTokens) -> JointTokens:
        """Returns the next layer's tokens. A layer that reduces them overrides this."""
        return replace(tokens, hidden=self(tokens.hidden, tokens.mask))


class Vilt(nn.Module):
    """ViLT with one task's head: a batch to float32 logits (B, num_classes), or (B, T) for T texts with each image.

    NLVR2 runs the text with each image, the second one under its own modality embedding, and classifies both pooled
    features side by side, left image first (section 4.3).
    """

    family = "vilt"

    def __init__(self, shape: ViltShape) -> None:
        super().__init__()
        if shape.num_classes is None:  # the shape has filled it in
            raise ModelError("model.create.num_classes is missing")
        config = _library_config(shape)
        self.shape = shape
        self.task = shape.task
        self.images = vl.TASKS[shape.task].images
        self.embeddings = JointEmbeddings(config, shape, modalities=1 + self.images)
        self.layers = nn.ModuleList(JointLayer(config, shape) for _ in range(shape.depth))
        self.layernorm = nn.LayerNorm(shape.embed_dim, eps=config.layer_norm_eps)
        self.pooler = vl.Pooler(shape.embed_dim)
        self.head = vl.task_head(shape.task, self.images * shape.embed_dim, 2 * shape.embed_dim, shape.num_classes)
        vl.init_weights_(self, shape.init_std)
        for table in (self.embeddings.cls_token, self.embeddings.position_embeddings):
            nn.init.normal_(table, std=shape.pos_embed_std)

    @property
    def joint_layers(self) -> list[nn.Module]:
        """The layers that see both modalities, all of them; each is called as ``layer(hidden, mask)``."""
        return list(self.layers)

    def tokens(self, batch: vl.Batch, image: int = 0) -> JointTokens:
        """Returns what the first layer sees of each example's text and its ``image``-th picture."""
        found: JointTokens = self.embeddings(vl.one_image(batch, image), IMAGE_TYPE + image)
        return found

    def encode(self, tokens: JointTokens) -> JointTokens:
        """Returns the tokens after every layer and the last norm."""
        for layer in self.layers:
            tokens = layer.advance(tokens)  # type: ignore[operator]
        return replace(tokens, hidden=self.layernorm(tokens.hidden))

    def forward(self, batch: vl.Batch) -> Tensor:
        """Returns float32 logits (B, num_classes); the batch is described in :mod:`workers.models.vision_language`.

        Raises:
            ValueError: a batch whose shapes do not fit the model.
        """
        shape = self.shape
        vl.check_batch(batch, task=self.task, max_text_tokens=shape.max_text_tokens, patch_size=shape.patch_size)
        pooled = [self.pooler(self.encode(self.tokens(batch, image)).hidden) for image in range(self.images)]
        return vl.scores(self.head(torch.cat(pooled, dim=-1)), batch)


def _library_config(shape: ViltShape) -> ViltConfig:
    return ViltConfig(
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_text_tokens,
        hidden_size=shape.embed_dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.mlp_ratio * shape.embed_dim,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        image_size=shape.img_size,
        patch_size=shape.patch_size,
        num_channels=shape.in_chans,
    )
