"""Weights of METER's public release (Dou et al., arXiv 2111.02387) under this project's names.

The release keeps RoBERTa under ``text_transformer``, CLIP under ``vit_model`` with the names of OpenAI's release (queries,
keys and values in one matrix; the text tower's leftovers, which nothing uses), the fusion layers in two lists, and one
head a task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from workers.models import local_weights
from workers.models import vision_language as vl
from workers.models.meter import IMAGE_TYPE, Meter
from workers.models.timm_vit import ModelError

HEADS: Mapping[str, str] = {
    "vqa": "vqa_classifier",
    "nlvr2": "nlvr2_classifier",
    "entailment": "snli_classifier",
    "retrieval": "rank_output",
}
"""The release's name of each task's head."""

_MATCHING = "itm_score.fc"
"""Image-text matching, of pretraining: two logits; the one for a match starts retrieval's score."""

_RULES: tuple[tuple[str, str], ...] = (
    (r"text_transformer\.embeddings\.(.+)", r"text_encoder.embeddings.\1"),
    (r"text_transformer\.encoder\.layer\.(.+)", r"text_encoder.layers.\1"),
    (r"vit_model\.visual\.class_embedding", "image_encoder.embeddings.class_embedding"),
    (r"vit_model\.visual\.conv1\.weight", "image_encoder.embeddings.patch_embedding.weight"),
    (r"vit_model\.visual\.positional_embedding", "image_encoder.embeddings.position_embedding.weight"),
    (r"vit_model\.visual\.ln_pre\.(.+)", r"image_encoder.norm_before.\1"),
    (r"vit_model\.visual\.ln_post\.(.+)", r"image_encoder.norm_after.\1"),
    (r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(.+)", r"image_encoder.layers.\1.layer_norm\2.\3"),
    (
        r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)",
        r"image_encoder.layers.\1.self_attn.*.\2",
    ),
    (
        r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(.+)",
        r"image_encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.+)", r"image_encoder.layers.\1.mlp.fc1.\2"),
    (r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.+)", r"image_encoder.layers.\1.mlp.fc2.\2"),
    (r"cross_modal_(text|image)_transform\.(.+)", r"\1_transform.\2"),
    (r"cross_modal_(text|image)_pooler\.(.+)", r"\1_pooler.\2"),
    (r"cross_modal_(text|image)_layers\.(\d+)\.attention\.self\.(.+)", r"layers.\2.\1.self_attention.attention.\3"),
    (r"cross_modal_(text|image)_layers\.(\d+)\.attention\.output\.(.+)", r"layers.\2.\1.self_attention.output.\3"),
    (
        r"cross_modal_(text|image)_layers\.(\d+)\.crossattention\.self\.(.+)",
        r"layers.\2.\1.cross_attention.attention.\3",
    ),
    (
        r"cross_modal_(text|image)_layers\.(\d+)\.crossattention\.output\.(.+)",
        r"layers.\2.\1.cross_attention.output.\3",
    ),
    (r"cross_modal_(text|image)_layers\.(\d+)\.(intermediate|output)\.(.+)", r"layers.\2.\1.\3.\4"),
    (r"token_type_embeddings\.weight", "token_type_embeddings.weight"),
)
"""A release's name and ours; ``*`` stands for q_proj, k_proj and v_proj, the thirds of one tensor."""

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
        fresh_head: for weights from before fine-tuning on the task: keeps the model's head (retrieval's starts from image-text
            matching's, where that is there), and gives NLVR2's second image the modality embedding of the first.

    Raises:
        ModelError: names that are unknown, missing, or of another shape.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    head = HEADS[model.task]
    for name, tensor in release.items():
        if name.startswith(f"{head}."):
            found["head." + name.removeprefix(f"{head}.")] = tensor
            continue
        renamed = dict(_renamed(name, tensor))
        found |= renamed
        if not renamed and not _NO_USE.fullmatch(name):
            unknown.append(name)
    if unknown:
        raise ModelError(f"METER weights: {len(unknown)} unknown: {local_weights.some(unknown)}")
    _resample_positions_(found, model)
    if fresh_head:
        _start_task_(found, release, model)
    _require_fit(found, model, head)
    return found


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields our names for one tensor of the release; nothing where it is of no use or unknown."""
    if _NO_USE.fullmatch(name):
        return
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        renamed = match.expand(ours)
        if "*" in renamed:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                yield renamed.replace("*", f"{part}_proj"), third.clone()
        else:
            yield renamed, tensor
        return


def _resample_positions_(found: dict[str, Tensor], model: Meter) -> None:
    key = "image_encoder.embeddings.position_embedding.weight"
    if key in found:
        rows = len(model.image_encoder.embeddings.position_embedding.weight)
        found[key] = vl.resample_positions(found[key], rows, mode="bicubic")


def _start_task_(found: dict[str, Tensor], release: Mapping[str, Tensor], model: Meter) -> None:
    """Fills in what weights from before the task's fine-tuning lack, or have for another task."""
    found |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    if model.task == "retrieval" and {f"{_MATCHING}.weight", f"{_MATCHING}.bias"} <= set(release):
        found |= {f"head.{part}": release[f"{_MATCHING}.{part}"][1:] for part in ("weight", "bias")}
    types = found.get("token_type_embeddings.weight")
    if types is not None and model.images == 2 and len(types) == 2:
        found["token_type_embeddings.weight"] = torch.cat([types, types[IMAGE_TYPE:]])


def _require_fit(found: Mapping[str, Tensor], model: Meter, head: str) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {tuple(found[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {"missing (under our names)": missing, "not in the model": extra, "wrong shape": shapes}
    faults = [f"{len(names)} {kind}: {local_weights.some(names)}" for kind, names in kinds.items() if names]
    if any(name.startswith("head.") for name in missing):
        faults.append(
            f"the weights have no {head}: they are from before fine-tuning, or for another task; use fresh_head"
        )
    if faults:
        raise ModelError("METER weights: " + "; ".join(faults))


def load_local_(model: Meter, path: str | Path, *, fresh_head: bool = False) -> None:
    """Loads weights from a local file or folder in place, under our names or the release's. See :mod:`local_weights`.

    Raises:
        ModelError: unreadable, refused, or not of this model; it is unchanged then.
    """
    weights = local_weights.read_tensors(path)
    if any(name.startswith("cross_modal_") for name in weights):
        weights = from_release_state_dict(weights, model, fresh_head=fresh_head)
    local_weights.fit_(model, weights, f"weights {path}")


def fetch(task: str) -> Path:
    """Refuses: the release is no model of a hub, its files lie beside its code.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        "model meter: published weights are not fetched by name; download the paper's release and give model.checkpoint its file"
    )
