"""How long a file will be, against the library that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from workers import artefact
from workers.artefact.foreseen_size import foreseen_bytes, safetensors_bytes

TYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
)


@pytest.mark.parametrize("seed", range(20))
def test_files_have_the_length_that_is_foreseen(seed: int) -> None:
    """Of every mixture of types, shapes, scalars and empty tensors, whose order and digits the header has."""
    draw = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=draw))

    tensors = {
        f"blocks.{number(1000)}.{'ä' * number(2)}x{i}": torch.zeros([number(40) for _ in range(number(4))]).to(
            TYPES[number(len(TYPES))]
        )
        for i in range(1 + number(30))
    }
    expected = len(safetensors.torch.save(tensors))
    assert safetensors_bytes(tensors) == expected
    assert safetensors_bytes({name: tensor.to("meta") for name, tensor in tensors.items()}) == expected


class Tied(nn.Module):
    """Two names of one weight, a slice of a larger buffer, one that is not saved with the state."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.register_buffer("part", torch.zeros(100)[:10])
        self.register_buffer("loose", torch.zeros(3), persistent=False)
        self.register_buffer("turned", torch.zeros(4, 5).t())


def test_what_is_tied_counts_once_whether_or_not_it_has_values(tmp_path: Path) -> None:
    said = {"model_description": {"family": "none"}, "steps": [{"technique": "t", "version": 1, "resolved": {}}]}
    artefact.save(Tied(), tmp_path, **said, extra={"a": 1.5})  # type: ignore[arg-type]
    assert artefact.manifest(tmp_path)["aliases"] == {"two.weight": "one.weight"}
    with torch.device("meta"):
        empty = Tied()
    for model in (Tied(), empty):
        assert foreseen_bytes(model, **said, extra={"a": 1.5}) == artefact.size_bytes(tmp_path)  # type: ignore[arg-type]
