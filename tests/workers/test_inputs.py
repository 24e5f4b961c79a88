"""Batches of several tensors behave along their examples like one tensor."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from workers.inputs import Inputs
from workers.measuring.made_inputs import make_inputs
from workers.tasks import TaskInfo, TextInfo


def inputs(count: int = 5) -> Inputs:
    ids = torch.arange(3 * count).view(count, 3)
    return Inputs({"pixel_values": torch.arange(2.0 * count).view(count, 2), "input_ids": ids})


def test_rows_names_and_length() -> None:
    batch = inputs()
    assert len(batch) == 5
    assert "input_ids" in batch
    assert batch.get("pixel_mask") is None
    assert batch[1:3]["input_ids"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert batch[torch.tensor([4, 0])]["pixel_values"].tolist() == [[8.0, 9.0], [0.0, 1.0]]
    assert [len(part) for part in batch.tensor_split(2)] == [3, 2]
    assert batch.replace(pixel_mask=torch.ones(5, 1))["pixel_mask"].sum() == 5
    assert "pixel_mask" not in batch


def test_another_number_type_is_for_what_is_no_index() -> None:
    half = inputs().to(torch.bfloat16)
    assert half["pixel_values"].dtype == torch.bfloat16
    assert half["input_ids"].dtype == torch.int64
    assert half.to("meta").device.type == "meta"


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one row an example, got \{'a': 2, 'b': 3\}"):
        Inputs({"a": torch.zeros(2), "b": torch.zeros(3)})


def test_a_compiled_model_takes_them() -> None:
    class Sum(nn.Module):
        def forward(self, batch: Inputs) -> Tensor:
            mask = batch.get("attention_mask")
            total = batch["pixel_values"].sum(dim=1) + batch["input_ids"].sum(dim=1)
            return total if mask is None else total * mask

    eager, compiled = Sum(), torch.compile(Sum(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs()), eager(inputs()))
    masked = inputs().replace(attention_mask=torch.zeros(5))
    assert torch.equal(compiled(masked), torch.zeros(5))


def test_made_up_inputs_have_the_shapes_of_the_task() -> None:
    text = TextInfo(vocab_size=40, max_tokens=7, pad_id=0)
    images = make_inputs(TaskInfo(10, 3, 16, ()), "cpu", 2)
    assert isinstance(images, Tensor)
    assert images.shape == (2, 3, 16, 16)
    pairs = make_inputs(TaskInfo(2, 3, 16, (), "nlvr2", text), "cpu", 2)
    assert isinstance(pairs, Inputs)
    assert {name: tuple(t.shape) for name, t in pairs.items()} == {
        "pixel_values": (2, 2, 3, 16, 16),
        "input_ids": (2, 7),
    }
    assert pairs["input_ids"].min() > 0
    assert pairs["input_ids"].max() < 40


def test_facts_of_a_task_survive_json() -> None:

    for text in (None, TextInfo(40, 7, 0)):
        info = TaskInfo(3, 3, 16, ("a", "b", "c"), "entailment", text)
        assert TaskInfo.from_dict(json.loads(json.dumps(asdict(info)))) == info
