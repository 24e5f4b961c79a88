"""What the vision-language models share: the batch, the four tasks with their heads, attention, and reading a shape.

A batch is a mapping of tensors, as a loader collates it:

==================  ================================  =================================================================
key                 shape and type                    meaning
==================  ================================  =================================================================
``pixel_values``    (B, 3, H, W) float32              normalised images; (B, 2, 3, H, W) for NLVR2, left image first
``pixel_mask``      (B, [2,] H, W) bool or int        1 where an image has pixels, at its top left; absent: everywhere
``input_ids``       (B, L) int64                      tokens, the class token first; for retrieval also (B, T, L):
                                                      T texts to be scored with each image
``attention_mask``  as ``input_ids``, bool or int     1 where a token is no padding; absent: everywhere
``token_type_ids``  as ``input_ids``, int64           BERT's sentence number; absent: 0
==================  ================================  =================================================================

A mask that is absent costs nothing and keeps the fastest attention kernels; one that is there is only used, so that no
value has to travel from the device. ViLT alone reads its ``pixel_mask``: an image's size decides its position embeddings.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers import model_settings
from workers.inputs import Inputs
from workers.model_info import ModelInfo
from workers.models.timm_vit import ModelError

if TYPE_CHECKING:
    from workers.tasks import TaskInfo

Batch = Mapping[str, Tensor] | Inputs
Shape = TypeVar("Shape")


@dataclass(frozen=True)
class Task:
    """What a task asks of a model: how many images an example has, and how many logits (None: the data says)."""

    images: int
    num_classes: int | None


BERT_STD = 0.02
"""Standard deviation of BERT's first weights, and ViLT's and METER's."""

TASKS: Mapping[str, Task] = {
    "vqa": Task(images=1, num_classes=None),
    "nlvr2": Task(images=2, num_classes=2),
    "nlvr1": Task(images=1, num_classes=2),
    "entailment": Task(images=1, num_classes=3),
    "retrieval": Task(images=1, num_classes=1),
}
"""Retrieval has one score a pair of image and text."""


# --- descriptions -----------------------------------------------------------------------------------------------------


def describe(
    family: str, shape: type[Shape], named: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the complete plain description of a model: ``family``, ``name`` and every value of ``create``.

    Args:
        family: the model family's name.
        shape: its frozen dataclass of settings, where the defaults are.
        named: settings of each known name that differ from the defaults.
        model: ``name`` (None: the defaults) and ``create``, which overrides what the name sets.

    Raises:
        ModelError: every unknown name or setting, with the nearest known one, and every value that is refused.
    """
    name, create = model.get("name"), dict(model.get("create") or {})
    faults = model_settings.faults(family, create)
    if name is not None and name not in named:
        faults.append(f"model.name {name!r} is no {family}, known: {', '.join(named)}" + _near(name, list(named)))
    if faults:
        raise ModelError("; ".join(faults))
    values = {**(named[name] if name is not None else {}), **create}
    return {"family": family, "name": name, "create": asdict(shape(**values))}  # type: ignore[call-overload]


def with_facts(
    model: Mapping[str, Any], data: TaskInfo, describe_family: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Returns a model section whose ``create`` holds what the data says: task, logits, image size, vocabulary.

    The model's ``max_text_tokens`` may be more than the data's, as that of published weights is; so may ``vocab_size``.

    Args:
        describe_family: ``describe`` of the family's module.

    Raises:
        ModelError: ``create`` values that are refused, or contradict the data.
    """
    if data.text is None:
        raise ModelError(f"{data.task} has no texts, which the model needs")
    create = dict(model.get("create") or {})
    facts = {"task": data.task, "img_size": data.image_size, "in_chans": data.in_chans}
    if TASKS[data.task].num_classes is None:
        facts["num_classes"] = data.num_classes
    faults = [
        f"model.create.{key} must be the data's {value}, got {create[key]}; leave it out"
        for key, value in facts.items()
        if create.get(key, value) != value
    ]
    least = {"vocab_size": data.text.vocab_size, "max_text_tokens": data.text.max_tokens}
    faults += [
        f"model.create.{key} must be at least the data's {value}, got {create[key]}"
        for key, value in least.items()
        if create.get(key, value) < value
    ]
    if faults:
        raise ModelError("; ".join(faults))
    whole = describe_family({"name": model.get("name"), "create": {**create, **facts}})["create"]
    facts["vocab_size"] = create.get("vocab_size", data.text.vocab_size)
    facts["max_text_tokens"] = max(whole["max_text_tokens"], data.text.max_tokens)
    if "pad_id" in whole:
        facts["pad_id"] = data.text.pad_id
    return {**model, "create": {**create, **facts}}


def model_info(model: Any, device: str, attentions: Sequence[Any], **own: Any) -> ModelInfo:
    """Returns the facts about a model of either family; ``own`` are those that each finds elsewhere in itself.

    Args:
        attentions: a layer's :class:`FusedAttention` each.
    """
    shape = model.shape
    return ModelInfo(
        family=model.family,
        name=model.family,
        depth=len(attentions),
        head_dim=attentions[0].head_dim,
        num_heads=tuple(a.num_heads for a in attentions),
        num_prefix_tokens=1,
        has_class_token=True,
        has_distil_token=False,
        patch_size=shape.patch_size,
        in_chans=shape.in_chans,
        num_classes=shape.num_classes,
        params=sum(p.numel() for p in model.parameters()),
        device=device,
        num_text_tokens=shape.max_text_tokens,
        reduces_tokens=any(getattr(layer, "reduces_tokens", False) for layer in model.layers),
        **own,
    )


def _near(word: object, known: list[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"; nearest: {near[0]}" if near else ""


def num_classes(task: str, given: int | None) -> int:
    """Returns the number of logits of ``task``.

    Raises:
        ModelError: an unknown task, a VQA model without the size of its answer vocabulary, or a number that contradicts
            the task.
    """
    if task not in TASKS:
        raise ModelError(
            f"model.create.task must be one of {', '.join(TASKS)}, got {task!r}" + _near(task, list(TASKS))
        )
    fixed = TASKS[task].num_classes
    if fixed is None and given is None:
        raise ModelError(f"model.create.num_classes: {task} needs the size of its answer vocabulary")
    if fixed is not None and given not in (None, fixed):
        raise ModelError(f"model.create.num_classes must be {fixed} for {task}, got {given}; leave it out")
    found = given if fixed is None else fixed
    if found is None or found < 1:
        raise ModelError(f"model.create.num_classes must be at least 1, got {found}")
    return found


def require_multiples(settings: Mapping[str, int], pairs: Mapping[str, str]) -> None:
    """Refuses settings of which one must be a multiple of another: ``{"embed_dim": "num_heads"}``.

    Raises:
        ModelError: names every pair that is not.
    """
    faults = [
        f"model.create.{whole} must be a multiple of {part} {settings[part]}, got {settings[whole]}"
        for whole, part in pairs.items()
        if settings[part] < 1 or settings[whole] < 1 or settings[whole] % settings[part]
    ]
    if faults:
        raise ModelError("; ".join(faults))


# --- batches ----------------------------------------------------------------------------------------------------------


def check_batch(batch: Batch, *, task: str, max_text_tokens: int, patch_size: int) -> None:
    """Refuses a batch whose shapes the model cannot take; reads no values, so it costs nothing on a device.

    Raises:
        ValueError: names the key, the rule and the shape.
    """
    absent = [key for key in ("pixel_values", "input_ids") if key not in batch]
    if absent:
        raise ValueError(f"batch: {', '.join(absent)} is missing: an example is a text with its image")
    pixels, ids, images = batch["pixel_values"], batch["input_ids"], TASKS[task].images
    faults = []
    if pixels.ndim != (4 if images == 1 else 5) or (images > 1 and pixels.shape[1] != images):
        wanted = "(B, 3, H, W)" if images == 1 else f"(B, {images}, 3, H, W)"
        faults.append(f"pixel_values must be {wanted} for this task, got {tuple(pixels.shape)}")
    elif any(side % patch_size for side in pixels.shape[-2:]):
        faults.append(f"pixel_values must have sides that are multiples of {patch_size}, got {tuple(pixels.shape)}")
    if ids.ndim not in ((2, 3) if task == "retrieval" else (2,)) or ids.shape[0] != pixels.shape[0]:
        wanted = "(B, L) or (B, T, L)" if task == "retrieval" else "(B, L)"
        faults.append(f"input_ids must be {wanted} with B {pixels.shape[0]} as pixel_values, got {tuple(ids.shape)}")
    elif not 1 <= ids.shape[-1] <= max_text_tokens:
        faults.append(f"input_ids must have 1 to {max_text_tokens} tokens, got {ids.shape[-1]}; truncate the texts")
    like = {
        "attention_mask": ids.shape,
        "token_type_ids": ids.shape,
        "pixel_mask": (*pixels.shape[:-3], *pixels.shape[-2:]),
    }
    faults += [
        f"{key} must have shape {tuple(shape)}, got {tuple(batch[key].shape)}"
        for key, shape in like.items()
        if key in batch and batch[key].shape != shape
    ]
    if faults:
        raise ValueError("batch: " + "; ".join(faults))


def text_part(batch: Batch, name: str) -> Tensor | None:
    """Returns a tensor of the texts, (B, L), or (B * T, L) where T of them are scored with each image; None where absent."""
    found = batch.get(name)
    return found if found is None else found.flatten(0, -2)


def for_each_text(image: Tensor, mask: Tensor | None, texts: int) -> tuple[Tensor, Tensor | None]:
    """Returns (texts, I, C) and (texts, I): each image's tokens (B, I, C) and mask in a row for its T = texts / B texts."""
    if len(image) == texts:
        return image, mask
    each = texts // len(image)
    image = image.repeat_interleave(each, dim=0, output_size=texts)
    return image, None if mask is None else mask.repeat_interleave(each, dim=0, output_size=texts)


def scores(logits: Tensor, batch: Batch) -> Tensor:
    """Returns the float32 logits of a batch, (B, classes), or (B, T) where T texts were scored with each image."""
    return (logits if batch["input_ids"].ndim == 2 else logits.view(batch["input_ids"].shape[:2])).float()


def one_image(batch: Batch, image: int) -> Batch:
    """Returns the batch with the ``image``-th picture of each example alone, for examples that have several."""
    if batch["pixel_values"].ndim == 4:
        return batch
    return {key: value[:, image] if key in ("pixel_values", "pixel_mask") else value for key, value in batch.items()}


def joined_mask(
    text_mask: Tensor | None,  # (B, L)
    image_mask: Tensor | None,  # (B, I)
    text: Tensor,  # (B, L, C)
    image: Tensor,  # (B, I, C)
) -> Tensor | None:
    """Returns the mask (B, L + I) of both modalities, None where neither has padding."""
    if text_mask is None and image_mask is None:
        return None
    text_mask = text.new_ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
    image_mask = image.new_ones(image.shape[:2], dtype=torch.bool) if image_mask is None else image_mask
    return torch.cat([text_mask, image_mask], dim=1)


def text_mask(batch: Batch) -> Tensor | None:
    """Returns where the text has tokens, (B, L) bool, None where it has no padding."""
    mask = text_part(batch, "attention_mask")
    return None if mask is None else mask.bool()


# --- modules ----------------------------------------------------------------------------------------------------------


class FusedAttention(nn.Module):
    """Multi-head attention of ``hidden`` to ``source`` (itself by default), always through PyTorch's fused kernel.

    Transformers' ViLT computes it as two products and a softmax, which is slower and would flatter everything that is
    measured against it. Parameter names are transformers'. ``scale`` is kept when dimensions are removed.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.dropout = dropout

    def project(
        self,
        hidden: Tensor,  # (B, N, C)
        source: Tensor | None = None,  # (B, S, C)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries (B, H, N, D), keys and values (B, H, S, D)."""
        source = hidden if source is None else source
        pairs = ((self.query, hidden), (self.key, source), (self.value, source))
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for layer, x in pairs)
        return q, k, v

    def attend(
        self,
        q: Tensor,  # (B, H, N, D)
        k: Tensor,  # (B, H, S, D)
        v: Tensor,  # (B, H, S, D)
        mask: Tensor | None,  # (B, S) of the keys: bool, true where valid; or float, added to the logits
    ) -> Tensor:
        """Returns (B, N, H * D), heads side by side."""
        if mask is not None:
            mask = (mask if mask.dtype == torch.bool else mask.to(q.dtype))[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        return out.transpose(1, 2).flatten(2)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        return self.attend(*self.project(hidden, source), mask)


class Pooler(nn.Module):
    """tanh(W x + b) of the first token: (B, N, C) to (B, C). Transformers' ViltPooler has the same names."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        pooled: Tensor = torch.tanh(self.dense(hidden[:, 0]))
        return pooled


def task_head(task: str, pooled_dim: int, hidden_dim: int, classes: int) -> nn.Module:
    """Returns the head on pooled features: one linear layer that scores a pair, else a classifier with one hidden layer.

    Args:
        pooled_dim: width of the pooled features of all images of an example together.
        hidden_dim: width of the hidden layer, twice the model's width in both papers' releases.
    """
    if task == "retrieval":
        return nn.Linear(pooled_dim, classes)
    return nn.Sequential(
        nn.Linear(pooled_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, classes)
    )


def init_weights_(module: nn.Module, std: float | None = None) -> None:
    """Draws linear, convolution and embedding weights from N(0, std^2), None: BERT's 0.02; biases 0, norms 1."""
    std = BERT_STD if std is None else std
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
            if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
                nn.init.zeros_(part.bias)
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                with torch.no_grad():
                    part.weight[part.padding_idx].zero_()


def resample_positions(
    table: Tensor,  # (1 + g * g, C): the class token's row, then a square grid of patches in raster order
    num_tokens: int,
    *,
    mode: str,  # "bilinear" (corners aligned, ViLT) or "bicubic" (METER)
) -> Tensor:
    """Returns the position embeddings (num_tokens, C) for another square grid of patches.

    Raises:
        ModelError: one of the two is no class token and a square.
    """
    old, new = (round((n - 1) ** 0.5) for n in (table.shape[0], num_tokens))
    if old * old + 1 != table.shape[0] or new * new + 1 != num_tokens:
        raise ModelError(f"position embeddings: {table.shape[0]} or {num_tokens} rows are no class token and a square")
    if old == new:
        return table
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = functional.interpolate(grid, size=(new, new), mode=mode, align_corners=mode == "bilinear")
    return torch.cat([table[:1], grid.flatten(2)[0].T])
