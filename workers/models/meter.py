"""METER: a text encoder and an image encoder, each of its own, and layers in which the two streams attend to each other.

Source: Dou, Xu, Gan, Wang, Wang, Wang, Zhu, Zhang, Yuan, Peng, Liu, Zeng, "An Empirical Study of Training End-to-End
Vision-and-Language Transformers", arXiv 2111.02387: RoBERTa-base, CLIP-ViT-B/16 and co-attention, which the paper finds best
(section 3, figure 1a), with six layers a stream. The image encoder stops before CLIP's last block, as in the paper's release.
PuMer (arXiv 2305.17530, section 3) reduces tokens in the fusion layers.

Differs from the paper: attention is fused; text positions count the attention mask, which for RoBERTa's own tokenizer is
what counting unpadded tokens gives; patches without pixels can be masked, where the paper only knows square images.

Encoders are transformers' parts. Weights of the paper's release: :mod:`workers.models.meter_release`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workers.model_info import ModelInfo
from workers.models import vision_language as vl
from workers.models.quiet_imports import quiet_registration
from workers.models.timm_vit import ModelError

with quiet_registration():
    from transformers import RobertaConfig
    from transformers.models.clip import modeling_clip
    from transformers.models.roberta import modeling_roberta

_clip: Any = modeling_clip  # their constructors are not typed, and their configurations not in full
_roberta: Any = modeling_roberta

NAMED: Mapping[str, Mapping[str, Any]] = {
    "meter_b16": {},
    "meter_tiny": {
        **{
            "embed_dim": 64,
            "cross_depth": 4,
            "num_heads": 4,
            "mlp_ratio": 2,
            "dropout": 0.0,
            "pos_embed_std": 0.2,
            "init_std": 0.15,
        },
        **{"text_dim": 64, "text_depth": 2, "text_heads": 4, "vocab_size": 256, "max_text_tokens": 20},
        **{"image_dim": 64, "image_depth": 2, "image_heads": 4, "img_size": 32, "patch_size": 8},
    },
}
"""Settings that differ from METER-CLIP-ViT-B/16 with RoBERTa-base."""

TEXT_TYPE, IMAGE_TYPE = 0, 1
"""Rows of the modality embedding; the second image of NLVR2 has row 2."""

_CROSS_EPS = 1e-12
_TEXT_EPS = 1e-5
_IMAGE_EPS = 1e-5
"""Of the layer norms: BERT's in the fusion layers, those of the two pretrained encoders in the encoders."""


@dataclass(frozen=True)
class MeterShape:
    """Settings of a METER; the defaults are the paper's, at 384 pixels.

    ``num_classes`` is for VQA alone, other tasks have theirs. ``pos_embed_std`` is of the image's
    position embeddings, None: as CLIP draws them; ``init_std`` of all other weights, None: BERT's
    0.02, and as RoBERTa and CLIP draw theirs. ``pad_id`` is the tokenizer's padding, whose embedding is zero.
    """

    task: str
    num_classes: int | None = None
    embed_dim: int = 768
    cross_depth: int = 6
    num_heads: int = 12
    mlp_ratio: int = 4
    text_dim: int = 768
    text_depth: int = 12
    text_heads: int = 12
    vocab_size: int = 50265
    max_text_tokens: int = 512
    pad_id: int = 1
    image_dim: int = 768
    image_depth: int = 11
    image_heads: int = 12
    img_size: int = 384
    patch_size: int = 16
    in_chans: int = 3
    dropout: float = 0.1
    pos_embed_std: float | None = None
    init_std: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", vl.num_classes(self.task, self.num_classes))
        pairs = {"embed_dim": "num_heads", "text_dim": "text_heads", "image_dim": "image_heads"}
        vl.require_multiples(vars(self), {**pairs, "img_size": "patch_size"})


def describe(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the complete description of a model from its ``name`` and ``create``; see :func:`vision_language.describe`."""
    return vl.describe("meter", MeterShape, NAMED, model)


def create(description: Mapping[str, Any], *, device: str = "cpu") -> Meter:
    """Builds a described model with random weights from torch's global generator, or on ``meta`` with none.

    Raises:
        ModelError: settings that are unknown or contradict each other.
    """
    with torch.device(device):
        return Meter(MeterShape(**describe(description)["create"]))


def model_info(module: nn.Module, device: str) -> ModelInfo:
    """See :func:`workers.models.model_info`: blocks are the fusion layers, by their image stream's cross-attention."""
    model: Any = module
    shape, encoder = model.shape, model.image_encoder
    image_tokens = getattr(encoder, "tokens_left", encoder.embeddings.num_positions)
    return vl.model_info(
        model,
        device,
        [layer.image.cross_attention.attention for layer in model.layers],
        embed_dim=model.text_pooler.dense.in_features,
        mlp_hidden=tuple(layer.image.output.dense.in_features for layer in model.layers),
        num_tokens=shape.max_text_tokens + image_tokens,
        image_size=encoder.embeddings.image_size,
        tower_depth=len(encoder.layers),
    )


# --- fusion -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossTokens:
    """Both streams between two fusion layers, class token first in each.

    Masks (B, L) and (B, I) are bool, true where valid, or float, added to the attention logits; None: nothing is padding.
    """

    text: Tensor  # (B, L, C)
    image: Tensor  # (B, I, C)
    text_mask: Tensor | None = None
    image_mask: Tensor | None = None


class AttentionBlock(nn.Module):
    """Fused attention to ``source`` (itself by default), projection, residual and norm after it, as in BERT."""

    def __init__(self, config: RobertaConfig, shape: MeterShape) -> None:
        super().__init__()
        self.attention = vl.FusedAttention(shape.embed_dim, shape.num_heads, shape.dropout)
        self.output = _roberta.RobertaSelfOutput(config)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        out: Tensor = self.output(self.attention(hidden, mask, source), hidden)
        return out


class CrossLayer(nn.Module):
    """One stream's layer in three steps: attention to itself, to the other stream, MLP; norms after each residual."""

    def __init__(self, config: RobertaConfig, shape: MeterShape) -> None:
        super().__init__()
        self.self_attention = AttentionBlock(config, shape)
        self.cross_attention = AttentionBlock(config, shape)
        self.intermediate = _roberta.RobertaIntermediate(config)
        self.output = _roberta.RobertaOutput(config)

    def attend(
        self,
        hidden: Tensor,  # (B, N, C)
        mask: Tensor | None,  # (B, N)
        other: Tensor,  # (B, S, C)
        other_mask: Tensor | None,  # (B, S)
    ) -> Tensor:
        """Returns ``hidden`` (B, N, C) after both attentions."""
        attended: Tensor = self.cross_attention(self.self_attention(hidden, mask), other_mask, other)
        return attended

    def transform(self, hidden: Tensor) -> Tensor:
        """Returns ``hidden`` (B, N, C) after the MLP."""
        out: Tensor = self.output(self.intermediate(hidden), hidden)
        return out

    def forward(self, hidden: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None) -> Tensor:
        return self.transform(self.attend(hidden, mask, other, other_mask))


class FusionLayer(nn.Module):
    """Co-attention: each stream attends to what the other was before this layer."""

    def __init__(self, config: RobertaConfig, shape: MeterShape) -> None:
        super().__init__()
        self.text = CrossLayer(config, shape)
        self.image = CrossLayer(config, shape)

    def forward(self, tokens: CrossTokens) -> CrossTokens:
        """Returns the next layer's tokens. A layer that reduces them overrides this."""
        text = self.text(tokens.text, tokens.text_mask, tokens.image, tokens.image_mask)
        image = self.image(tokens.image, tokens.image_mask, tokens.text, tokens.text_mask)
        return replace(tokens, text=text, image=image)


# --- encoders ---------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """RoBERTa without its pooler, transformers' parts under their names."""

    def __init__(self, shape: MeterShape) -> None:
        super().__init__()
        self.pad_id = shape.pad_id
        model = _roberta.RobertaModel(_text_config(shape), add_pooling_layer=False)
        self.embeddings, self.layers = model.embeddings, model.encoder.layer

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (B, L, text_dim) of ``ids`` (B, L); ``mask`` (B, L) bool says which are no padding."""
        valid = torch.ones_like(ids) if mask is None else mask.long()
        hidden: Tensor = self.embeddings(input_ids=ids, position_ids=valid.cumsum(1) * valid + self.pad_id)
        keys = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, keys)
        return hidden


class ImageEncoder(nn.Module):
    """CLIP's vision transformer up to ``image_depth`` blocks and its last norm on all tokens, transformers' parts."""

    def __init__(self, shape: MeterShape) -> None:
        super().__init__()
        model = _clip.CLIPVisionModel(_image_config(shape))
        self.embeddings, self.layers = model.embeddings, model.encoder.layers
        self.norm_before, self.norm_after = model.pre_layrnorm, model.post_layernorm

    def forward(self, pixels: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (B, I, image_dim) of ``pixels`` (B, 3, H, W); ``mask`` (B, I) bool says which patches have pixels."""
        hidden: Tensor = self.norm_before(self.embeddings(pixels))
        keys = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, keys)
        out: Tensor = self.norm_after(hidden)
        return out


def _text_config(shape: MeterShape) -> Any:
    return _roberta.RobertaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.text_dim,
        num_hidden_layers=shape.text_depth,
        num_attention_heads=shape.text_heads,
        intermediate_size=shape.mlp_ratio * shape.text_dim,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        max_position_embeddings=shape.max_text_tokens + shape.pad_id + 1,  # numbers start after the padding's
        type_vocab_size=1,
        pad_token_id=shape.pad_id,
        layer_norm_eps=_TEXT_EPS,
        attn_implementation="sdpa",
    )


def _image_config(shape: MeterShape) -> Any:
    return _clip.CLIPVisionConfig(
        hidden_size=shape.image_dim,
        intermediate_size=shape.mlp_ratio * shape.image_dim,
        num_hidden_layers=shape.image_depth,
        num_attention_heads=shape.image_heads,
        num_channels=shape.in_chans,
        image_size=shape.img_size,
        patch_size=shape.patch_size,
        hidden_act="quick_gelu",
        layer_norm_eps=_IMAGE_EPS,
        attn_implementation="sdpa",
    )


def _cross_config(shape: MeterShape) -> RobertaConfig:
    return RobertaConfig(
        hidden_size=shape.embed_dim,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.mlp_ratio * shape.embed_dim,
        hidden_dropout_prob=shape.dropout,
        layer_norm_eps=_CROSS_EPS,
    )


# --- model ------------------------------------------------------------------------------------------------------------


class Meter(nn.Module):
    """METER with one task's head: a batch to float32 logits (B, num_classes), or (B, T) for T texts with each image.

    The head sees the pooled text and image features side by side. NLVR2 fuses the text with each image, the second one
    under its own modality embedding, and classifies all four, left image first (section 4.1).
    """

    family = "meter"
    protected = (0, 0)
    """Positions of the class token in the text and in the image stream, which no reduction may remove."""

    def __init__(self, shape: MeterShape) -> None:
        super().__init__()
        if shape.num_classes is None:  # the shape has filled it in
            raise ModelError("model.create.num_classes is missing")
        width, config = shape.embed_dim, _cross_config(shape)
        self.shape = shape
        self.task = shape.task
        self.images = vl.TASKS[shape.task].images
        self.text_encoder = TextEncoder(shape)
        self.image_encoder = ImageEncoder(shape)
        self.text_transform = nn.Linear(shape.text_dim, width)
        self.image_transform = nn.Linear(shape.image_dim, width)
        self.token_type_embeddings = nn.Embedding(1 + self.images, width)
        self.layers = nn.ModuleList(FusionLayer(config, shape) for _ in range(shape.cross_depth))
        self.text_pooler = vl.Pooler(width)
        self.image_pooler = vl.Pooler(width)
        self.head = vl.task_head(shape.task, 2 * self.images * width, 2 * width, shape.num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """Draws what is ours like BERT; the encoders have transformers' initialisation for their kind unless a width is given."""
        std = self.shape.init_std
        for part in self.children():
            if std is not None or part not in (self.text_encoder, self.image_encoder):
                vl.init_weights_(part, std)
        if self.shape.pos_embed_std is not None:
            nn.init.normal_(self.image_encoder.embeddings.position_embedding.weight, std=self.shape.pos_embed_std)

    @property
    def cross_layers(self) -> list[nn.Module]:
        """The fusion layers; each is called as ``layer(tokens)`` with :class:`CrossTokens`."""
        return list(self.layers)

    def encode_text(self, batch: vl.Batch) -> tuple[Tensor, Tensor | None]:
        """Returns text features (B, L, C) before any fusion, and their mask; they do not depend on the image.

        A batch of texts to be scored may bring them: ``text_features`` (B, T, L, C), as this function once returned them.
        """
        mask, features = vl.text_mask(batch), batch.get("text_features")
        if features is not None:
            return features.flatten(0, 1), mask
        hidden = self.text_transform(self.text_encoder(vl.text_part(batch, "input_ids"), mask))
        return hidden + self.token_type_embeddings.weight[TEXT_TYPE], mask

    def encode_image(self, batch: vl.Batch, image: int = 0) -> tuple[Tensor, Tensor | None]:
        """Returns features (B, I, C) of the ``image``-th picture before any fusion, and their mask."""
        batch = vl.one_image(batch, image)
        pixels, mask = batch["pixel_values"], batch.get("pixel_mask")
        if pixels.shape[-2:] != (self.shape.img_size, self.shape.img_size):
            raise ValueError(
                f"batch: pixel_values must be {self.shape.img_size} pixels a side, got {tuple(pixels.shape)}"
            )
        if mask is not None:
            patches = mask[:, :: self.shape.patch_size, :: self.shape.patch_size].flatten(1).bool()
            mask = torch.cat([patches.new_ones(len(patches), 1), patches], dim=1)  # the class token is always valid
        hidden = self.image_transform(self.image_encoder(pixels, mask))
        return hidden + self.token_type_embeddings.weight[IMAGE_TYPE + image], mask

    def encode(self, tokens: CrossTokens) -> CrossTokens:
        """Returns the tokens after every fusion layer."""
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens

    def pool(self, tokens: CrossTokens) -> Tensor:
        """Returns the features (B, 2 C) of text and image."""
        return torch.cat([self.text_pooler(tokens.text), self.image_pooler(tokens.image)], dim=-1)

    def forward(self, batch: vl.Batch) -> Tensor:
        """Returns float32 logits (B, num_classes); the batch is described in :mod:`workers.models.vision_language`.

        Raises:
            ValueError: a batch whose shapes do not fit the model.
        """
        shape = self.shape
        vl.check_batch(batch, task=self.task, max_text_tokens=shape.max_text_tokens, patch_size=shape.patch_size)
        text, text_mask = self.encode_text(batch)
        pooled = []
        for image in range(self.images):
            features, image_mask = vl.for_each_text(*self.encode_image(batch, image), len(text))
            pooled.append(self.pool(self.encode(CrossTokens(text, features, text_mask, image_mask))))
        return vl.scores(self.head(torch.cat(pooled, dim=-1)), batch)
