"""Knowledge distillation into a student of the same or of a smaller size.

Source: Hinton et al., arXiv 1503.02531, section 2 (soft); Touvron et al., DeiT, arXiv 2012.12877, section 4 (hard).
Differs from the papers: soft KD is the divergence, mean over images, where DeiT's code divides by the number of classes as well; the teacher is the study's fine-tuned baseline; a smaller student is cut out of it (evenly spaced
blocks, strongest channels, heads and MLP dimensions), is another architecture, or starts anew. With a distillation token
the distillation loss acts on its head alone, the task loss on the class token's, and evaluation takes the mean of
both, as in DeiT; a token that is added to a trained student starts as a copy of the class token and its head.
A smaller student saves bytes, MACs and time; a student of full size saves nothing by itself, the loss then helps the
recovery of the other techniques of a recipe.
A vision-language student has fewer layers that see both modalities (ViLT's all, METER's fusion layers) and in them fewer heads and MLP
dimensions; the width of its residual streams, its embeddings and METER's encoders are the teacher's.
Not covered: feature and attention losses; attention pooling in narrower students; a token beside register tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.models import ModelError
from workers.techniques.backbones import by_backbone
from workers.techniques.distillation.distill_students import (
    named,
    named_info,
    shrink,
    spread_of_positions,
    start_anew,
    student_layers,
    with_token,
)
from workers.techniques.pruning.shared_prunable import (
    Judge,
    channels_fault,
    depth_fault,
    fault,
    heads_fault,
    hidden_fault,
    require,
)
from workers.techniques.pruning.shared_slicing import stack_weights
from workers.techniques.record import Applied, LossInputs, LossTerm, ModelInfo, Surroundings, Technique, choice, number

BASELINE = "baseline"
ARCHITECTURES = (
    BASELINE,
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_small_patch16_224",
    "vit_base_patch32_224",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
)
"""What a student may be: the baseline's architecture, or one of timm's, built for the image size of the data."""


@dataclass(frozen=True)
class Config:
    """Weight and softness of the teacher's word, and kind, size and start of the student."""

    alpha: float = number(0.5, 0.1, 0.9, 0.1, doc="weight of the distillation loss; the task loss has 1 - alpha")
    temperature: int = number(2, 1, 20, 1, search=(1, 8, 1), doc="softens both sides; hard distillation ignores it")
    kind: str = choice("soft", ("soft", "hard"), doc="teacher's distribution or its most likely class")
    depth: float = choice(1.0, (1.0, 0.75, 0.5), doc="share of blocks in the student")
    width: float = choice(1.0, (1.0, 0.75, 0.5), doc="share of heads, hence of channels and MLP dimensions")
    architecture: str = choice(
        BASELINE, ARCHITECTURES, search=(BASELINE,), doc="of the student, before depth and width"
    )
    token: bool = choice(False, (False, True), search=(False,), doc="adds a distillation token with its own head")
    init: str = choice(
        "from_teacher",
        ("from_teacher", "random", "pretrained"),
        search=("from_teacher",),
        doc="student's first weights; another architecture has random ones or timm's",
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
    student = inputs.logits if inputs.distil_logits is None else inputs.distil_logits
    teacher = inputs.teacher_logits.detach().to(student)
    soft = config.kind == "soft"
    kd = soft_loss(student, teacher, config.temperature) if soft else hard_loss(student, teacher)
    return LossTerm(task_weight=1 - config.alpha, extra=config.alpha * kd)


def _train_both_heads(model: nn.Module, config: Config, progress: float) -> None:
    """A model with a distillation token returns the logits of both while it trains."""
    vit: Any = model
    if hasattr(vit, "set_distilled_training"):
        vit.set_distilled_training(True)


# --- student ----------------------------------------------------------------------------------------------------------


def student_info(info: ModelInfo, config: Config) -> ModelInfo:
    """Returns the facts of the student; its width is a whole number of heads of the head_dim that it is cut from."""
    if config.architecture != BASELINE:
        named = named_info(config.architecture, info.num_classes, info.in_chans, info.image_size)
        info = replace(named, device=info.device)
    layers = student_layers(info.depth, config.depth)
    heads = max(1, int(info.num_heads[0] * config.width))
    if (len(layers), heads) != (info.depth, info.num_heads[0]):
        info = _smaller(info, len(layers), heads)
    if config.token:
        added = 2 * info.embed_dim + (info.embed_dim + 1) * info.num_classes  # token, its position, its head
        info = replace(
            info,
            num_tokens=info.num_tokens + 1,
            num_prefix_tokens=info.num_prefix_tokens + 1,
            has_distil_token=True,
            params=info.params + added,
        )
    return info


def _smaller(info: ModelInfo, depth: int, heads: int) -> ModelInfo:
    hidden = info.mlp_hidden[0] * heads // info.num_heads[0]
    sizes: dict[str, Any] = {"depth": depth, "num_heads": (heads,) * depth, "mlp_hidden": (hidden,) * depth}
    if info.family != "timm":
        after = replace(info, **sizes)
        return replace(after, params=info.params - stack_weights(info) + stack_weights(after))
    C, c, matrices = info.embed_dim, heads * info.head_dim, info.mlp_matrices
    prefix_and_patches = info.num_tokens + info.num_prefix_tokens

    def block(width: int, mlp: int) -> int:
        return 4 * width * width + 4 * width + matrices * width * mlp + (matrices - 1) * mlp + width + 4 * width

    def outside(width: int) -> int:
        per_channel = info.patch_size**2 * info.in_chans + 1 + prefix_and_patches + 2
        return width * (per_channel + info.num_classes * (1 + info.has_distil_token))

    # A plain block has biases and two norms; what else a model has (LayerScale, q/k norms) is small and left out.
    lost = outside(C) - outside(c) + info.depth * block(C, info.mlp_hidden[0]) - depth * block(c, hidden)
    return replace(info, **sizes, embed_dim=c, params=info.params - lost)


def _wanted(config: Config) -> dict[str, Judge]:
    """Returns who judges how the student is cut."""
    narrower = (heads_fault, hidden_fault, channels_fault) if config.width < 1 else ()
    judges: dict[str, Judge] = {f"width={config.width:g}": lambda info: _first(judge(info) for judge in narrower)}
    return judges | ({f"depth={config.depth:g}": depth_fault} if config.depth < 1 else {})


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)


def token_fault(info: ModelInfo) -> str | None:
    """Returns why a model cannot get a distillation token, or None."""
    if not (info.has_class_token and info.num_prefix_tokens == 1):
        return "the model must have a class token and neither a distillation token yet nor registers"
    if info.pooling != "token" or info.norm_after_pool:
        after = " after its last norm" if info.norm_after_pool else ""
        return f"the head must read the class token, normalised with all others; here it reads {info.pooling!r}{after}"
    if not info.has_positions or info.block not in ("Block", "vision_transformer.ResPostBlock"):
        return f"the model must be a plain ViT with position embeddings; here the blocks are {info.block}"
    return None


def _check(info: ModelInfo, config: Config) -> str | None:
    other = config.architecture != BASELINE
    if info.family != "timm" and (other or config.token):
        what = f"architecture={config.architecture}" if other else "token=true"
        return (
            f"{what} is for vision transformers; a student of a {info.family} is a {info.family} without such a token"
        )
    if other == (config.init == "from_teacher") or (not other and config.init == "pretrained"):
        needed = "random or pretrained" if other else "from_teacher or random"
        return f"init={config.init} does not go with architecture={config.architecture}; must be {needed}"
    if other:
        try:
            info = student_info(info, Config(architecture=config.architecture))
        except ModelError as error:
            return f"architecture={config.architecture}: {error}"
    one_size = len(set(info.num_heads)) == 1 and info.embed_dim == info.num_heads[0] * info.head_dim
    if config.width < 1 and not one_size:
        return "a narrower student is cut from a model whose heads fill its width; this one is pruned already"
    if config.depth < 1 and len(student_layers(info.depth, config.depth)) == info.depth:
        return f"depth={config.depth:g} of {info.depth} blocks removes none"
    if config.width < 1 and int(info.num_heads[0] * config.width) in (0, info.num_heads[0]):
        return f"width={config.width:g} of {info.num_heads[0]} heads leaves no smaller whole number of heads"
    reason = fault(info, _wanted(config))
    if config.token and reason is None and (reason := token_fault(info)):
        reason = f"token: {reason}"
    return reason


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    vit: Any = model
    student: Any = vit
    changed = ["loss"]
    resolved: dict[str, Any] = {"architecture": config.architecture, "token": config.token}
    if config.architecture != BASELINE:
        student = _another(vit, config, surroundings)
        changed += ["architecture"]
    block = student.blocks[0]
    resolved["layers"] = layers = student_layers(len(student.blocks), config.depth)
    resolved["heads"] = heads = max(1, int(block.attn.num_heads * config.width))
    resolved["hidden"] = hidden = block.mlp.fc2.in_features * heads // block.attn.num_heads
    require(student, "distill", _wanted(config))
    if student is vit and (config.width < 1 or config.depth < 1 or config.token or config.init == "random"):
        student = copy.deepcopy(vit)
    if config.width < 1 or config.depth < 1:
        shrink(student, layers, heads, hidden, by_magnitude=True)
        changed += ["blocks"] if config.width == 1 else _with_parameters(student)
    if config.token:
        student = with_token(student)
        changed += ["dist_token"]
    if config.init == "random":
        start_anew(student, surroundings.generator, spread_of_positions(vit))
        changed += ["init"]
    return Applied(student, resolved, changed)


def _another(vit: Any, config: Config, surroundings: Surroundings) -> nn.Module:
    """Returns another architecture for the same data, on the model's device; random weights are drawn afterwards.

    Of a model without values neither has any, so that nothing is fetched.
    """
    facts = (config.architecture, vit.num_classes, vit.in_chans, vit.patch_embed.img_size[0])
    if vit.patch_embed.proj.weight.is_meta:
        return named(*facts, device="meta").train(vit.training)
    with torch.random.fork_rng(devices=[]):  # timm draws from the global generator
        torch.manual_seed(surroundings.seed)
        student = named(*facts, device="cpu", pretrained=config.init == "pretrained")
    return student.to(vit.patch_embed.proj.weight.device).train(vit.training)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    vit: Any = model
    if resolved["architecture"] != BASELINE:
        device = str(vit.patch_embed.proj.weight.device)
        vit = named(resolved["architecture"], vit.num_classes, vit.in_chans, vit.patch_embed.img_size[0], device=device)
    shrink(vit, resolved["layers"], resolved["heads"], resolved["hidden"], by_magnitude=False)
    return with_token(vit) if resolved["token"] else vit


def _with_parameters(model: nn.Module) -> list[str]:
    return [name for name, child in model.named_children() if next(child.parameters(), None) is not None]


def _always(config: Config) -> bool:
    return True


HALVES = dict.fromkeys(("vilt", "meter"), "workers.techniques.distillation.distill_joint")

TECHNIQUE = Technique(
    name="distill",
    family="distillation",
    version=2,
    Config=Config,
    stage="surgery",
    apply=by_backbone(_apply, HALVES),
    rebuild=by_backbone(_rebuild, HALVES),
    check=_check,
    identity={"depth": 1.0, "width": 1.0, "init": "from_teacher"},
    trains=_always,
    needs_teacher=_always,
    loss=_loss,
    on_progress=_train_both_heads,
    info_after=student_info,
    models=("timm", "vilt", "meter"),
    source="arXiv 1503.02531, section 2; DeiT, arXiv 2012.12877, section 4",
)
