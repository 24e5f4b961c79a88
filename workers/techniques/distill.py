"""Knowledge distillation into a student of the same or of a smaller size.

Source: Hinton et al., arXiv 1503.02531, section 2 (soft); Touvron et al., DeiT, arXiv 2012.12877, section 4 (hard).
Differs from the paper: the teacher is the study's fine-tuned baseline; a smaller student is cut out of it (evenly spaced
blocks, strongest channels, heads and MLP dimensions) or starts anew. The loss acts on the logits that the model returns:
for a model with a distillation token that is the mean of both heads, not the distillation head alone.
A smaller student saves bytes, MACs and time; a student of full size saves nothing by itself, the loss then helps the
recovery of the other techniques of a recipe. Teacher logits are computed once for a study.
Not covered: feature and attention losses; attention pooling in narrower students.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.record import (
    Applied,
    LossInputs,
    LossTerm,
    ModelInfo,
    Surroundings,
    Technique,
    choice,
    number,
)
from workers.techniques.slicing import (
    channel_magnitudes,
    head_magnitudes,
    hidden_magnitudes,
    keep_channels,
    keep_heads,
    keep_hidden,
    largest,
    require_plain,
)


@dataclass(frozen=True)
class Config:
    """Weight and softness of the teacher's word, and size and start of the student."""

    alpha: float = number(0.5, 0.1, 0.9, 0.1, doc="weight of the distillation loss; the task loss has 1 - alpha")
    temperature: int = number(2, 1, 20, 1, search=(1, 8, 1), doc="softens both sides; hard distillation ignores it")
    kind: str = choice("soft", ("soft", "hard"), doc="teacher's distribution or its most likely class")
    depth: float = choice(1.0, (1.0, 0.75, 0.5), doc="share of blocks in the student")
    width: float = choice(1.0, (1.0, 0.75, 0.5), doc="share of heads, hence of channels and MLP dimensions")
    init: str = choice(
        "from_teacher", ("from_teacher", "random"), search=("from_teacher",), doc="student's first weights"
    )


# --- loss -------------------------------------------------------------------------------------------------------------


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns T^2 KL(teacher || student) of distributions softened by T, mean over the batch.

    Args:
        student, teacher: (B, classes) logits.
    """
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def hard_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the cross-entropy of the student against the teacher's most likely class, mean over the batch."""
    return F.cross_entropy(student, teacher.argmax(dim=-1))


def _loss(inputs: LossInputs, config: Config) -> LossTerm:
    if inputs.teacher_logits is None:
        raise ValueError("distill: the training must supply teacher logits")
    teacher = inputs.teacher_logits.detach().to(inputs.logits)
    soft = config.kind == "soft"
    kd = soft_loss(inputs.logits, teacher, config.temperature) if soft else hard_loss(inputs.logits, teacher)
    return LossTerm(task_weight=1 - config.alpha, extra=config.alpha * kd)


# --- student ----------------------------------------------------------------------------------------------------------


def student_layers(depth: int, fraction: float) -> list[int]:
    """Returns the evenly spaced blocks of the teacher that the student takes over, the first and the last among them."""
    count = max(1, int(depth * fraction))
    return [round(i * (depth - 1) / max(1, count - 1)) for i in range(count)]


def student_info(info: ModelInfo, config: Config) -> ModelInfo:
    """Returns the facts of the student; its width is a whole number of heads of the teacher's head_dim."""
    layers = student_layers(info.depth, config.depth)
    heads = max(1, int(info.num_heads[0] * config.width))
    hidden = info.mlp_hidden[0] * heads // info.num_heads[0]
    C, c, D = info.embed_dim, heads * info.head_dim, len(layers)
    prefix_and_patches = info.num_tokens + info.num_prefix_tokens

    def block(width: int, mlp: int) -> int:
        return 4 * width * width + 4 * width + 2 * width * mlp + mlp + width + 4 * width

    def outside(width: int) -> int:
        per_channel = info.patch_size**2 * info.in_chans + 1 + prefix_and_patches + 2
        return width * (per_channel + info.num_classes * (1 + info.has_distil_token))

    # A plain block has biases and two norms; what else a model has (LayerScale, q/k norms) is small and left out.
    lost = outside(C) - outside(c) + info.depth * block(C, info.mlp_hidden[0]) - D * block(c, hidden)
    return replace(
        info,
        depth=D,
        embed_dim=c,
        num_heads=(heads,) * D,
        mlp_hidden=(hidden,) * D,
        params=info.params - lost,
    )


def _shrink(model: nn.Module, layers: list[int], heads: int, hidden: int, *, by_magnitude: bool) -> None:
    """Cuts a model to the student's dimensions; leading indices where the weights do not matter."""
    vit: Any = model
    device = vit.patch_embed.proj.weight.device
    if len(layers) < len(vit.blocks):
        vit.blocks = nn.Sequential(*(vit.blocks[i] for i in layers))
        vit.feature_info = vit.feature_info[: len(layers)]
    if heads == vit.blocks[0].attn.num_heads:
        return

    def chosen(magnitudes: Tensor, count: int) -> Tensor:
        return largest(magnitudes, count) if by_magnitude else torch.arange(count, device=device)

    channels = chosen(channel_magnitudes(vit), heads * vit.blocks[0].attn.head_dim)
    for block in vit.blocks:
        keep_heads(block.attn, chosen(head_magnitudes(block.attn), heads))
        keep_hidden(block.mlp, chosen(hidden_magnitudes(block.mlp), hidden))
    keep_channels(vit, channels)


def _start_anew(model: nn.Module, generator: torch.Generator) -> None:
    """Draws all weights as timm does; position embeddings keep the teacher's spread.

    timm's 0.02 would undo a study's ``pos_embed_std``, without which models of few pixels do not learn.
    """
    vit: Any = model
    device = vit.patch_embed.proj.weight.device
    spread = None if vit.pos_embed is None else vit.pos_embed.detach().std().item()
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    vit.cpu()
    with torch.random.fork_rng(devices=[]):  # timm draws from the global generator
        torch.manual_seed(seed)
        vit.init_weights()
        if spread is not None:
            nn.init.normal_(vit.pos_embed, std=spread)
    vit.to(device)


def _check(info: ModelInfo, config: Config) -> str | None:
    if len(set(info.num_heads)) > 1 or info.embed_dim != info.num_heads[0] * info.head_dim:
        return "the student is cut from a model whose heads fill its width; this one is pruned already"
    if config.depth < 1 and len(student_layers(info.depth, config.depth)) == info.depth:
        return f"depth={config.depth:g} of {info.depth} blocks removes none"
    if config.width < 1 and int(info.num_heads[0] * config.width) in (0, info.num_heads[0]):
        return f"width={config.width:g} of {info.num_heads[0]} heads leaves no smaller whole number of heads"
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    vit: Any = model
    block = vit.blocks[0]
    layers = student_layers(len(vit.blocks), config.depth)
    heads = max(1, int(block.attn.num_heads * config.width))
    hidden = block.mlp.fc1.out_features * heads // block.attn.num_heads
    changed = ["loss"]
    student: Any = vit
    if config.width < 1:
        require_plain(vit, "distill")
        if vit.attn_pool is not None:
            raise ValueError("distill: width must be 1.0 for a model with attention pooling")
    if config.width < 1 or config.depth < 1:
        student = copy.deepcopy(vit)
        _shrink(student, layers, heads, hidden, by_magnitude=True)
        changed += ["blocks"] if config.width == 1 else _with_parameters(student)
    if config.init == "random":
        student = copy.deepcopy(vit) if student is vit else student
        _start_anew(student, surroundings.generator)
        changed += ["init"]
    return Applied(student, {"layers": layers, "heads": heads, "hidden": hidden}, changed)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    _shrink(model, resolved["layers"], resolved["heads"], resolved["hidden"], by_magnitude=False)
    return model


def _with_parameters(model: nn.Module) -> list[str]:
    return [name for name, child in model.named_children() if next(child.parameters(), None) is not None]


def _always(config: Config) -> bool:
    return True


TECHNIQUE = Technique(
    name="distill",
    family="distillation",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"depth": 1.0, "width": 1.0, "init": "from_teacher"},
    trains=_always,
    needs_teacher=_always,
    loss=_loss,
    info_after=student_info,
    source="arXiv 1503.02531, section 2; DeiT, arXiv 2012.12877, section 4",
)
