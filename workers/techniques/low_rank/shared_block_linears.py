"""Which linear layers of a model's blocks a technique takes: those of the attentions, those of the MLPs, or both."""

from __future__ import annotations

from torch import nn

ATTENTION = frozenset({"attn", "attention", "self_attn"})
"""What timm, transformers' BERT and ViLT, and CLIP call the attention of a block."""

MLP = frozenset({"mlp", "intermediate", "output"})

CHOICES = ("all", "mlp", "attention")


def block_linears(model: nn.Module, layers: str) -> dict[str, nn.Linear]:
    """Returns linear layers of the blocks by name, in the order of the model.

    Heads, poolers, what lies between two encoders, and predictors that a token reduction put into blocks are in no attention and
    no MLP of a block, and are left out.

    Args:
        layers: one of :data:`CHOICES`.
    """
    wanted = ("attention", "mlp") if layers == "all" else (layers,)
    parts = model.named_modules()
    return {name: part for name, part in parts if isinstance(part, nn.Linear) and _place(name) in wanted}


def _place(name: str) -> str | None:
    """Returns ``attention`` or ``mlp``, None for a layer that is in neither."""
    parts = name.split(".")
    inside = set(parts[next((i for i, part in enumerate(parts) if part.isdigit()), len(parts)) :])
    if inside & ATTENTION:
        return "attention"
    return "mlp" if inside & MLP else None
