"""How many bytes an artefact will have, of a model whose tensors need no values: what is written is laid out, not calculated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from workers.artefact.folder import TENSORS, contents, manifest_bytes


def foreseen_bytes(
    model: nn.Module,
    *,
    model_description: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Returns the :func:`workers.artefact.size_bytes` of what :func:`workers.artefact.pack` would make.

    Args:
        model: the compressed model, or its structure on the meta device.
        model_description, steps, extra: see there.
    """
    stored, aliases = contents(model)
    size = safetensors_bytes(stored)
    file = {"file": TENSORS, "sha256": hashlib.sha256().hexdigest(), "bytes": size}
    return size + len(manifest_bytes(model_description, steps, file, aliases, extra))


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Returns the length of the safetensors file of ``tensors``, which need no values.

    The file is 8 bytes, a header in JSON padded to a multiple of 8, and the tensors (the format's specification,
    github.com/huggingface/safetensors, "Format"). Their order, on which the digits of the offsets depend, is the library's own.
    """
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    written = safetensors.torch.save(empty)
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    start = 0
    for name, entry in header.items():
        end = start + tensors[name].nbytes
        entry |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + start
