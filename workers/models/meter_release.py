"""Weights of METER's public release (Dou et al., arXiv 2111.02387) under this project's names, and back.

The release keeps RoBERTa under ``text_transformer``, CLIP under ``vit_model`` with the names of OpenAI's release (queries,
keys and values in one matrix; the text tower's leftovers, which nothing uses), the fusion layers in two lists, and one
head a task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from workers.models import local_weights, releases
from workers.models import vision_language as vl
from workers.models.meter import Meter
from workers.models.timm_vit import ModelError
from workers.tasks import corpus

PREFIX = "cross_modal_"
"""Of names that only the release's weights have."""

HEADS: Mapping[str, str] = {
    "vqa": "vqa_classifier",
    "nlvr2": "nlvr2_classifier",
    "entailment": "snli_classifier",
    "retrieval": "rank_output",
}
"""The release's name of each task's head."""

CLASSES: Mapping[str, tuple[str, ...]] = {
    "entailment": ("contradiction", "neutral", "entailment"),
    "nlvr2": ("false", "true"),
}
"""The release's order of classes: SNLI-VE's by ``label2id`` in its ``meter/utils/write_snli.py``, NLVR2's by whether the
answer is "True" in its NLVR2 data set. Its order of VQA's answers is that in which its preparation met them."""

_LAST = "head.3."
"""Of a classifier: the layer with a row a class."""

_NAMES: tuple[tuple[str, str], ...] = (
    ("text_transformer.embeddings.{rest}", "text_encoder.embeddings.{rest}"),
    ("text_transformer.encoder.layer.{rest}", "text_encoder.layers.{rest}"),
    ("vit_model.visual.class_embedding", "image_encoder.embeddings.class_embedding"),
    ("vit_model.visual.conv1.weight", "image_encoder.embeddings.patch_embedding.weight"),
    ("vit_model.visual.positional_embedding", "image_encoder.embeddings.position_embedding.weight"),
    ("vit_model.visual.ln_pre.{rest}", "image_encoder.norm_before.{rest}"),
    ("vit_model.visual.ln_post.{rest}", "image_encoder.norm_after.{rest}"),
    ("vit_model.visual.transformer.resblocks.{i}.ln_{j}.{rest}", "image_encoder.layers.{i}.layer_norm{j}.{rest}"),
    (
        "vit_model.visual.transformer.resblocks.{i}.attn.in_proj_{part}",
        "image_encoder.layers.{i}.self_attn.{third}_proj.{part}",
    ),
    (
        "vit_model.visual.transformer.resblocks.{i}.attn.out_proj.{part}",
        "image_encoder.layers.{i}.self_attn.out_proj.{part}",
    ),
    ("vit_model.visual.transformer.resblocks.{i}.mlp.c_fc.{part}", "image_encoder.layers.{i}.mlp.fc1.{part}"),
    ("vit_model.visual.transformer.resblocks.{i}.mlp.c_proj.{part}", "image_encoder.layers.{i}.mlp.fc2.{part}"),
    ("cross_modal_{stream}_transform.{part}", "{stream}_transform.{part}"),
    ("cross_modal_{stream}_pooler.{rest}", "{stream}_pooler.{rest}"),
    ("cross_modal_{stream}_layers.{i}.attention.self.{rest}", "layers.{i}.{stream}.self_attention.attention.{rest}"),
    ("cross_modal_{stream}_layers.{i}.attention.output.{rest}", "layers.{i}.{stream}.self_attention.output.{rest}"),
    (
        "cross_modal_{stream}_layers.{i}.crossattention.self.{rest}",
        "layers.{i}.{stream}.cross_attention.attention.{rest}",
    ),
    (
        "cross_modal_{stream}_layers.{i}.crossattention.output.{rest}",
        "layers.{i}.{stream}.cross_attention.output.{rest}",
    ),
    ("cross_modal_{stream}_layers.{i}.{step}.{rest}", "layers.{i}.{stream}.{step}.{rest}"),
    (releases.TYPES, releases.TYPES),
)
"""A release's name and ours, for both directions; a tensor whose name of ours has a third is in three parts with us."""

_FIELDS = {
    **{"i": r"\d+", "j": "[12]", "part": "weight|bias", "rest": ".+", "third": "[qkv]"},
    **{"stream": "text|image", "step": "intermediate|output"},
}

_NO_USE = re.compile(
    r"text_transformer\.pooler\..+|text_transformer\.embeddings\.(position|token_type)_ids|mlm_score\..+|itm_score\..+"
    r"|vit_model\.(token_embedding\.weight|positional_embedding|ln_final\.(weight|bias))"
    rf"|({'|'.join(HEADS.values())})\..+"
)
"""Pretraining heads, other tasks' heads, unused poolers, and the leftovers of CLIP's text tower."""


def from_release_state_dict(
    release: Mapping[str, Tensor], model: Meter, *, fresh_head: bool = False
) -> dict[str, Tensor]:
    """Returns the release's weights as a state dict of ``model``, which is not changed.

    Args:
        release: the ``state_dict`` of a checkpoint; of any image size, position embeddings are interpolated (bicubic, as
            in the paper's section 4.1).
        model: its task says which head is taken, its image size where the interpolation goes.
        fresh_head: see :func:`workers.models.releases.start_task_`.

    Raises:
        ModelError: a name that is neither known nor known to be of no use.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    head = f"{HEADS.get(model.task, '')}."
    for name, tensor in release.items():
        if name.startswith(head):
            ours = "head." + name.removeprefix(head)
            found[ours] = tensor[_rows(model.task)] if _has_classes(ours, tensor, model.task) else tensor
        elif not _NO_USE.fullmatch(name):
            renamed, fields = _renamed(name, theirs=True)
            if renamed is None:
                unknown.append(name)
            elif "{third}" in renamed:
                for third, part in zip("qkv", tensor.chunk(3), strict=True):
                    found[renamed.format(**fields, third=third)] = part.clone()
            else:
                found[renamed.format(**fields)] = tensor
    if unknown:
        raise ModelError(f"METER weights: {len(unknown)} unknown: {local_weights.some(unknown)}")
    key = "image_encoder.embeddings.position_embedding.weight"
    if key in found:
        rows = len(model.image_encoder.embeddings.position_embedding.weight)
        found[key] = vl.resample_positions(found[key], rows, mode="bicubic")
    if fresh_head:
        releases.start_task_(found, release, model)
    return found


def to_release_state_dict(model: Meter) -> dict[str, Tensor]:
    """Returns the weights of ``model`` under the release's names, in its shapes and its order of classes.

    What the release holds besides and no task uses is left out. The inverse of :func:`from_release_state_dict`.

    Raises:
        ModelError: the release has no head for the model's task.
    """
    if model.task not in HEADS:
        raise ModelError(f"METER weights: the release has heads for {', '.join(HEADS)}, not for {model.task}")
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("head."):
            classes = _has_classes(name, tensor, model.task)
            found[f"{HEADS[model.task]}.{name.removeprefix('head.')}"] = (
                tensor[torch.argsort(torch.tensor(_rows(model.task)))] if classes else tensor
            )
            continue
        renamed, fields = _renamed(name, theirs=False)
        if renamed is None:
            raise ModelError(f"METER weights: the release has no {name}")
        if "third" in fields:
            thirds.setdefault(renamed.format(**fields), {})[fields["third"]] = tensor
        else:
            found[renamed.format(**fields)] = tensor
    return found | {name: torch.cat([parts[third] for third in "qkv"]) for name, parts in thirds.items()}


def _renamed(name: str, *, theirs: bool) -> tuple[str | None, dict[str, Any]]:
    """Returns the other side's name as a template and its fields; None for a name that neither side knows."""
    for release, ours in _NAMES:
        source, target = (release, ours) if theirs else (ours, release)
        match = _pattern(source).fullmatch(name)
        if match is not None:
            return target, match.groupdict()
    return None, {}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = Formatter().parse(template)
    return re.compile("".join(re.escape(text) + (f"(?P<{f}>{_FIELDS[f]})" if f else "") for text, f, _, _ in parts))


def _has_classes(name: str, tensor: Tensor, task: str) -> bool:
    """Returns whether a tensor of the head, under our name, has a row for each class that the release orders in its way."""
    return name.startswith(_LAST) and len(tensor) == len(CLASSES.get(task, ()))


def _rows(task: str) -> list[int]:
    """Returns the release's row of each of our classes."""
    return [CLASSES[task].index(name) for name in corpus.CLASSES[task]]


def fetch(task: str, *, train: bool) -> Path:
    """Refuses: the release is no model of a hub, its files lie beside its code.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        "model meter: published weights are not fetched by name; download the paper's release and give model.checkpoint its file"
    )
