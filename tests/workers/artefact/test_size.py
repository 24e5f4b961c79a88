"""The bytes of an artefact, counted by hand: n-bit weights packed, scales and zero points there, tied tensors once, manifest
included."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.workers.artefact.test_artefact import Chain, Odd, compress, one_thread, save  # noqa: F401 - a fixture
from workers import artefact

DEPTH, WIDTH, HIDDEN, TOKENS, CLASSES = 3, 64, 128, 64, 10

Weights = Callable[[int, int], float]
"""(out, in) -> bytes of a linear layer's weight with its scales."""


def counted(
    linear: Weights,
    other: int = 4,
    bias: int = 4,
    *,
    depth: int = DEPTH,
    width: int = WIDTH,
    attention: int = WIDTH,
    hidden: int = HIDDEN,
) -> int:
    """Returns the bytes of a ViT with class and register token, 1 px patches of one channel.

    Args:
        other, bias: bytes of a number that is no linear layer's weight; of a linear layer's bias.
    """
    shapes = [(3 * attention, width), (width, attention), (hidden, width), (width, hidden)]
    block = sum(linear(o, i) + bias * o for o, i in shapes) + other * 4 * width
    tokens = other * (2 * width + (TOKENS + 2) * width)
    patches = other * 2 * width
    return int(depth * block + tokens + patches + other * 2 * width + linear(CLASSES, width) + bias * CLASSES)


def floats(size: int) -> Weights:
    return lambda o, i: size * o * i


def int8(o: int, i: int) -> float:
    return o * i + 4 * o


def int8_per_tensor(o: int, i: int) -> float:
    return o * i + 4


def int4(group: int) -> Weights:
    """Half a byte a weight (a row ends at a byte), and 16 bits each of scale and zero point for every group of a row."""
    return lambda o, i: o * math.ceil(i / 2) + 2 * 2 * o * math.ceil(i / group)


FOUR: tuple[str, dict[str, Any]] = ("weight_only", {"bits": 4, "group_size": 32})
BF16: tuple[str, dict[str, Any]] = ("precision", {"dtype": "bf16"})
PRUNE: tuple[str, dict[str, Any]] = ("magnitude_prune", {"head_ratio": 0.25, "mlp_ratio": 0.35, "round_to": 1})
PRUNED = {"attention": 48, "hidden": 83}

CASES: list[tuple[Chain, int]] = [
    ((), counted(floats(4))),
    ((("tome", {"r": 3}),), counted(floats(4))),
    ((("nystrom", {"landmarks": 8}),), counted(floats(4))),
    ((BF16,), counted(floats(2), 2, 2)),
    ((("precision", {"dtype": "fp16"}),), counted(floats(2), 2, 2)),
    ((("dynamic_int8", {}),), counted(int8)),
    ((("dynamic_int8", {"granularity": "per_tensor"}),), counted(int8_per_tensor)),
    ((("weight_only", {"bits": 8}),), counted(int8)),
    ((("weight_only", {"bits": 8, "kernel": "packed"}),), counted(int8)),
    ((FOUR,), counted(int4(32))),
    ((("weight_only", {"bits": 4, "group_size": 128, "kernel": "packed"}),), counted(int4(128))),
    ((PRUNE,), counted(floats(4), **PRUNED)),
    ((("distill", {"depth": 0.5, "width": 0.5}),), counted(floats(4), depth=1, width=32, attention=32, hidden=64)),
    ((PRUNE, FOUR), counted(int4(32), **PRUNED)),
    ((BF16, FOUR), counted(int4(32), 2, 2)),
    ((FOUR, BF16), counted(int4(32), 2, 4)),  # a packed layer's bias is a buffer, which keeps its type
    ((PRUNE, ("tome", {"r": 3}), ("dynamic_int8", {})), counted(int8, **PRUNED)),
]


@pytest.mark.parametrize(("chain", "data"), CASES, ids=["+".join(n for n, _ in c) or "baseline" for c, _ in CASES])
def test_the_size_is_that_of_a_hand_count(chain: Chain, data: int, tmp_path: Path) -> None:
    model, steps = compress(*chain)
    save(model, tmp_path, steps)
    assert data_bytes(tmp_path) == data
    assert artefact.size_bytes(tmp_path) == sum(f.stat().st_size for f in tmp_path.iterdir())
    overhead = artefact.size_bytes(tmp_path) - data
    assert overhead > (tmp_path / artefact.MANIFEST).stat().st_size > 0


def data_bytes(folder: Path) -> int:
    """Returns the bytes of all values: a safetensors file is 8 bytes of length, a header of that length, and these."""
    file = (folder / artefact.TENSORS).read_bytes()
    return len(file) - 8 - int.from_bytes(file[:8], "little")


def test_four_bits_are_half_a_byte_each() -> None:
    """The parts of a layer, so that the sum above cannot be right by accident."""
    model, _ = compress(FOUR)
    layer: nn.Module = model.get_submodule("blocks.0.mlp.fc2")
    sizes = {name: tensor.nbytes for name, tensor in layer.state_dict().items()}
    assert sizes == {"weight": 64 * 128 // 2, "scale": 64 * 4 * 2, "zero": 64 * 4 * 2, "bias": 64 * 4}


def test_a_tied_tensor_counts_once(tmp_path: Path) -> None:
    artefact.save(Odd(), tmp_path, model_description={}, steps=[])
    tied, view, strided, scalar, constant = 9 * 4, 6 * 4, 12 * 4, 8, 2 * 4
    assert data_bytes(tmp_path) == tied + view + strided + scalar + constant
