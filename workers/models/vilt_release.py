"""Weights of published ViLTs (Kim et al., arXiv 2102.03334), as transformers names them, under this project's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from workers.models import local_weights
from workers.models import vision_language as vl
from workers.models.timm_vit import ModelError
from workers.models.vilt import IMAGE_TYPE, Vilt

_LIBRARY_PREFIXES = {
    "vilt.embeddings.": "embeddings.",
    "vilt.encoder.layer.": "layers.",
    "vilt.layernorm.": "layernorm.",
    "vilt.pooler.": "pooler.",
    "classifier.": "head.",
    "rank_output.": "head.",
}
_NOT_OURS = ("mlm_score.",)
_BUFFERS = ("position_ids", "token_type_ids")
"""Pretraining heads and counters, which transformers' checkpoints may hold and no task needs."""


HUB = {"nlvr2": "dandelin/vilt-b32-finetuned-nlvr2", "retrieval": "dandelin/vilt-b32-finetuned-flickr30k"}
"""The authors' fine-tuned weights by task, where the head means the same for everybody."""

HUB_PRETRAINED = "dandelin/vilt-b32-mlm"
"""Their pretrained weights, to be fine-tuned on any other task."""


def fetch(task: str) -> Path:
    """Downloads the authors' weights for a task from the Hugging Face hub, once; returns the folder in its cache.

    Raises:
        ModelError: the hub cannot be reached and the cache does not have them.
    """
    from huggingface_hub import snapshot_download

    name = HUB.get(task, HUB_PRETRAINED)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "pytorch_model.bin"]))
    except OSError as error:
        raise ModelError(
            f"model vilt: the weights {name} could not be fetched ({str(error).splitlines()[0]}); connect to the network, "
            "fill the Hugging Face cache (HF_HOME), or give model.checkpoint a local file or folder"
        ) from error


def from_library_state_dict(
    library: Mapping[str, Tensor], model: Vilt, *, fresh_head: bool = False
) -> dict[str, Tensor]:
    """Returns ``library``, weights under transformers' names (``vilt.*``, ``classifier.*``), under ours.

    Args:
        library: of any image size; position embeddings are interpolated to the model's grid.
        model: whose task and image size the weights are for.
        fresh_head: keeps the model's head, and gives NLVR2's second image the embedding of the first, as fine-tuning from
            other weights does.

    Raises:
        ModelError: a name that is neither known nor known to be of no use.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in library.items():
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
        found = {name: tensor for name, tensor in found.items() if not name.startswith("head.")}
        found |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
        types = "embeddings.token_type_embeddings.weight"
        if model.images == 2 and types in found and len(found[types]) == 2:
            found[types] = torch.cat([found[types], found[types][IMAGE_TYPE:]])
    return found


def load_local_(model: Vilt, path: str | Path, *, fresh_head: bool = False) -> None:
    """Loads weights from a local file or folder in place, under our names or transformers'. See :mod:`local_weights`.

    Raises:
        ModelError: unreadable, refused, or not of this model; it is unchanged then.
    """
    weights = local_weights.read_tensors(path)
    if any(name.startswith("vilt.") for name in weights):
        weights = from_library_state_dict(weights, model, fresh_head=fresh_head)
    local_weights.fit_(model, weights, f"weights {path}")
