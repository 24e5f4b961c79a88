"""Weights of published ViLTs (Kim et al., arXiv 2102.03334), as transformers names them, under this project's names.

Their order of NLVR2's classes is ours, false then true (``id2label`` of the published model); that of VQA's answers is
their own. Entailment has no published head, so the classes of one are taken to be in our order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from workers.models import local_weights, releases
from workers.models import vision_language as vl
from workers.models.timm_vit import ModelError
from workers.models.vilt import Vilt

PREFIX = "vilt."
"""Of names that only transformers' weights have."""

_LIBRARY_PREFIXES = {
    "vilt.embeddings.": "embeddings.",
    "vilt.encoder.layer.": "layers.",
    "vilt.layernorm.": "layernorm.",
    "vilt.pooler.": "pooler.",
    "classifier.": "head.",
    "rank_output.": "head.",
}
_NOT_OURS = ("mlm_score.", "itm_score.")
_BUFFERS = ("position_ids", "token_type_ids")
"""Pretraining heads and counters, which transformers' checkpoints may hold and no task needs."""


HUB = {
    "vqa": "dandelin/vilt-b32-finetuned-vqa",
    "nlvr2": "dandelin/vilt-b32-finetuned-nlvr2",
    "retrieval": "dandelin/vilt-b32-finetuned-flickr30k",
}
"""The authors' fine-tuned weights by task, with their heads."""

HUB_PRETRAINED = "dandelin/vilt-b32-mlm"
"""Their pretrained weights, from which each task's fine-tuning starts."""


def fetch(task: str, *, train: bool) -> Path:
    """Downloads the authors' weights from the Hugging Face hub, once; returns the folder in its cache.

    Args:
        train: whether the model is to be fine-tuned: then the pretrained weights, else those fine-tuned on ``task``.

    Raises:
        ModelError: none are published for the task, or the hub cannot be reached and the cache does not have them.
    """
    from huggingface_hub import snapshot_download

    name = HUB_PRETRAINED if train else HUB.get(task)
    if name is None:
        raise ModelError(
            f"model vilt: fine-tuned weights are published for {', '.join(HUB)}, not for {task}; set model.train: true, which "
            f"starts from {HUB_PRETRAINED}, or give model.checkpoint a local file or folder"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "pytorch_model.bin"]))
    except OSError as error:
        raise ModelError(
            f"model vilt: the weights {name} could not be fetched ({str(error).splitlines()[0]}); connect to the network, "
            "fill the Hugging Face cache (HF_HOME), or give model.checkpoint a local file or folder"
        ) from error


def from_release_state_dict(
    release: Mapping[str, Tensor], model: Vilt, *, fresh_head: bool = False
) -> dict[str, Tensor]:
    """Returns ``release``, weights under transformers' names (``vilt.*``, ``classifier.*``), under ours.

    Args:
        release: of any image size; position embeddings are interpolated to the model's grid.
        model: whose task and image size the weights are for.
        fresh_head: see :func:`workers.models.releases.start_task_`.

    Raises:
        ModelError: a name that is neither known nor known to be of no use.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in release.items():
        prefix = next((p for p in _LIBRARY_PREFIXES if name.startswith(p)), None)
        if prefix is not None and not name.endswith(_BUFFERS):
            found[_LIBRARY_PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
        elif not name.startswith(_NOT_OURS) and not name.endswith(_BUFFERS):
            unknown.append(name)
    if unknown:
        raise ModelError(f"ViLT weights: {len(unknown)} unknown: {local_weights.some(unknown)}")
    key = "embeddings.position_embeddings"
    if key in found:
        rows = model.embeddings.position_embeddings.shape[1]
        found[key] = vl.resample_positions(found[key][0], rows, mode="bilinear")[None]
    if fresh_head:
        releases.start_task_(found, release, model)
    return found
