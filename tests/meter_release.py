"""METER's release, written down independently: its weights' names and shapes, and what it computes with them, slowly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from workers.models.meter import MeterShape

Weights = dict[str, Tensor]
HEADS = {
    "vqa": "vqa_classifier",
    "nlvr2": "nlvr2_classifier",
    "entailment": "snli_classifier",
    "retrieval": "rank_output",
}


def weights(shape: MeterShape, *, head: str | None, types: int = 2, seed: int = 0) -> Weights:
    """Random weights under the release's names, with everything that its checkpoints hold besides."""
    c, t, v = shape.embed_dim, shape.text_dim, shape.image_dim
    sizes: dict[str, tuple[int, ...]] = {}
    norms = set()

    def linear(name: str, out: int, inner: int) -> None:
        sizes[f"{name}.weight"], sizes[f"{name}.bias"] = (out, inner), (out,)

    def norm(name: str, width: int) -> None:
        sizes[f"{name}.weight"], sizes[f"{name}.bias"] = (width,), (width,)
        norms.add(f"{name}.weight")

    def block(name: str, width: int, *attentions: str) -> None:
        for attention in attentions:
            for part in ("query", "key", "value"):
                linear(f"{name}.{attention}.self.{part}", width, width)
            linear(f"{name}.{attention}.output.dense", width, width)
            norm(f"{name}.{attention}.output.LayerNorm", width)
        linear(f"{name}.intermediate.dense", shape.mlp_ratio * width, width)
        linear(f"{name}.output.dense", width, shape.mlp_ratio * width)
        norm(f"{name}.output.LayerNorm", width)

    embeddings = "text_transformer.embeddings"
    sizes[f"{embeddings}.word_embeddings.weight"] = (shape.vocab_size, t)
    sizes[f"{embeddings}.position_embeddings.weight"] = (shape.max_text_tokens + 2, t)
    sizes[f"{embeddings}.token_type_embeddings.weight"] = (1, t)
    sizes[f"{embeddings}.position_ids"] = (1, shape.max_text_tokens + 2)
    norm(f"{embeddings}.LayerNorm", t)
    for i in range(shape.text_depth):
        block(f"text_transformer.encoder.layer.{i}", t, "attention")
    linear("text_transformer.pooler.dense", t, t)
    visual = "vit_model.visual"
    sizes[f"{visual}.class_embedding"] = (v,)
    sizes[f"{visual}.positional_embedding"] = ((shape.img_size // shape.patch_size) ** 2 + 1, v)
    sizes[f"{visual}.conv1.weight"] = (v, 3, shape.patch_size, shape.patch_size)
    norm(f"{visual}.ln_pre", v)
    norm(f"{visual}.ln_post", v)
    for i in range(shape.image_depth):
        name = f"{visual}.transformer.resblocks.{i}"
        sizes[f"{name}.attn.in_proj_weight"], sizes[f"{name}.attn.in_proj_bias"] = (3 * v, v), (3 * v,)
        linear(f"{name}.attn.out_proj", v, v)
        linear(f"{name}.mlp.c_fc", shape.mlp_ratio * v, v)
        linear(f"{name}.mlp.c_proj", v, shape.mlp_ratio * v)
        norm(f"{name}.ln_1", v)
        norm(f"{name}.ln_2", v)
    sizes["vit_model.token_embedding.weight"], sizes["vit_model.positional_embedding"] = (9, 8), (7, 8)
    norm("vit_model.ln_final", 8)
    for stream, width in (("text", t), ("image", v)):
        linear(f"cross_modal_{stream}_transform", c, width)
        linear(f"cross_modal_{stream}_pooler.dense", c, c)
        for i in range(shape.cross_depth):
            block(f"cross_modal_{stream}_layers.{i}", c, "attention", "crossattention")
    sizes["token_type_embeddings.weight"] = (types, c)
    linear("mlm_score.transform.dense", c, c)
    linear("itm_score.fc", 2, 2 * c)
    if head == "retrieval":
        linear("rank_output", 1, 2 * c)
    elif head is not None:
        linear(f"{HEADS[head]}.0", 2 * c, 4 * c if head == "nlvr2" else 2 * c)
        norm(f"{HEADS[head]}.1", 2 * c)
        linear(f"{HEADS[head]}.3", shape.num_classes or 0, 2 * c)
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: 0.2 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {name: tensor + (name in norms) for name, tensor in drawn.items()}


# --- what it computes -------------------------------------------------------------------------------------------------


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    out = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        logits = a @ b.transpose(1, 2) / a.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, :], -torch.inf)
        out.append(logits.softmax(-1) @ c)
    return torch.cat(out, -1)


def _bert_attention(
    w: Weights, name: str, x: Tensor, source: Tensor, heads: int, mask: Tensor | None, eps: float
) -> Tensor:
    q, k, v = (_linear(w, f"{name}.self.{p}", s) for p, s in (("query", x), ("key", source), ("value", source)))
    out = _linear(w, f"{name}.output.dense", _attention(q, k, v, heads, mask))
    return _norm(w, f"{name}.output.LayerNorm", out + x, eps)


def _bert_mlp(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    out = _linear(w, f"{name}.output.dense", functional.gelu(_linear(w, f"{name}.intermediate.dense", x)))
    return _norm(w, f"{name}.output.LayerNorm", out + x, eps)


def _text(w: Weights, shape: MeterShape, ids: Tensor, mask: Tensor | None) -> Tensor:
    name = "text_transformer.embeddings"
    places = torch.arange(ids.shape[1]) + 2
    x = w[f"{name}.word_embeddings.weight"][ids] + w[f"{name}.position_embeddings.weight"][places]
    x = _norm(w, f"{name}.LayerNorm", x + w[f"{name}.token_type_embeddings.weight"][0], 1e-5)
    for i in range(shape.text_depth):
        name = f"text_transformer.encoder.layer.{i}"
        x = _bert_attention(w, f"{name}.attention", x, x, shape.text_heads, mask, 1e-5)
        x = _bert_mlp(w, name, x, 1e-5)
    return _linear(w, "cross_modal_text_transform", x)


def _image(w: Weights, shape: MeterShape, pixels: Tensor) -> Tensor:
    name = "vit_model.visual"
    p = shape.patch_size
    patches = pixels.unfold(2, p, p).unfold(3, p, p)  # (B, 3, h, w, p, p)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2) @ w[f"{name}.conv1.weight"].flatten(1).T
    x = torch.cat([w[f"{name}.class_embedding"].expand(len(patches), 1, -1), patches], 1)
    x = _norm(w, f"{name}.ln_pre", x + w[f"{name}.positional_embedding"], 1e-5)
    for i in range(shape.image_depth):
        block = f"{name}.transformer.resblocks.{i}"
        q, k, v = (
            _norm(w, f"{block}.ln_1", x, 1e-5) @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        ).chunk(3, -1)
        x = x + _linear(w, f"{block}.attn.out_proj", _attention(q, k, v, shape.image_heads, None))
        inner = _linear(w, f"{block}.mlp.c_fc", _norm(w, f"{block}.ln_2", x, 1e-5))
        x = x + _linear(w, f"{block}.mlp.c_proj", inner * torch.sigmoid(1.702 * inner))
    return _linear(w, "cross_modal_image_transform", _norm(w, f"{name}.ln_post", x, 1e-5))


def _cross(
    w: Weights, name: str, x: Tensor, mask: Tensor | None, y: Tensor, y_mask: Tensor | None, heads: int
) -> Tensor:
    x = _bert_attention(w, f"{name}.attention", x, x, heads, mask, 1e-12)
    x = _bert_attention(w, f"{name}.crossattention", x, y, heads, y_mask, 1e-12)
    return _bert_mlp(w, name, x, 1e-12)


def _pooled(w: Weights, shape: MeterShape, ids: Tensor, mask: Tensor | None, pixels: Tensor, row: int) -> Tensor:
    types = w["token_type_embeddings.weight"]
    x, y = _text(w, shape, ids, mask) + types[0], _image(w, shape, pixels) + types[row]
    for i in range(shape.cross_depth):
        x, y = (
            _cross(w, f"cross_modal_text_layers.{i}", x, mask, y, None, shape.num_heads),
            _cross(w, f"cross_modal_image_layers.{i}", y, None, x, mask, shape.num_heads),
        )
    return torch.cat(
        [_linear(w, f"cross_modal_{n}_pooler.dense", s[:, 0]).tanh() for n, s in (("text", x), ("image", y))], -1
    )


def logits(w: Weights, shape: MeterShape, batch: Weights) -> Tensor:
    """What the release's model with ``w`` answers to ``batch``, whose ids are padded at the end."""
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
    pixels = batch["pixel_values"]
    images = [pixels] if pixels.ndim == 4 else list(pixels.unbind(1))
    features = [_pooled(w, shape, batch["input_ids"], mask, image, 1 + i) for i, image in enumerate(images)]
    joined, head = torch.cat(features, -1), HEADS[shape.task]
    if shape.task == "retrieval":
        return _linear(w, head, joined)
    return _linear(w, f"{head}.3", functional.gelu(_norm(w, f"{head}.1", _linear(w, f"{head}.0", joined), 1e-5)))
