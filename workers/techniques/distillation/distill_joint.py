"""Students of vision-language models: fewer layers that see both modalities, fewer heads and hidden dimensions in each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from workers.techniques.distillation.distill import BASELINE, Config
from workers.techniques.distillation.distill_students import anew, student_layers
from workers.techniques.pruning import shared_joint_slicing as joint
from workers.techniques.record import Applied, Surroundings


def apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Makes the student: the model itself, a smaller copy, or one that starts anew."""
    parts: Any = model
    attention, mlp = (find(parts.layers[0])[0][1] for find in (joint.attentions, joint.mlps))
    layers = student_layers(len(parts.layers), config.depth)
    heads = max(1, int(attention.attention.num_heads * config.width))
    hidden = mlp.intermediate.dense.out_features * heads // attention.attention.num_heads
    student: Any = model
    changed = ["loss"]
    if config.width < 1 or config.depth < 1 or config.init == "random":
        student = anew(model, surroundings.generator) if config.init == "random" else copy.deepcopy(model)
        changed += ["layers"] if config.width < 1 or config.depth < 1 else []
        changed += ["init"] if config.init == "random" else []
    joint.keep_layers(student, layers)
    for layer in student.layers:
        for _, block in joint.attentions(layer):
            joint.cut_attention(block, heads, block.attention.head_dim)
        for _, block in joint.mlps(layer):
            joint.cut_mlp(block, hidden)
    resolved = {"architecture": BASELINE, "token": False, "layers": layers, **joint.dimensions(student)}
    return Applied(student, resolved, changed)


def rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Leaves as many layers, heads and dimensions as the student has, in place."""
    return joint.shrink_to(model, resolved)
