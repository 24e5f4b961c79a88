"""Smaller images in ViLT and METER: the same as a smaller model of smaller images, for one and two pictures and with masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.vision_language import batch, macs
from tests.workers.techniques.vlm import FAMILIES, apply, padded, vlm
from workers.inputs import Inputs
from workers.models import meter, model_info, vilt
from workers.models import vision_language as vl
from workers.techniques.tokens.resolution import TECHNIQUE, Config, resize
from workers.techniques.tokens.resolution_joint import shrink
from workers.techniques.tokens.shared_joint_tokens import family_module

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize("task", ["entailment", "nlvr2", "retrieval"])
def test_it_is_a_smaller_model_of_smaller_images(family: str, task: str) -> None:
    large = vlm(family, task)
    small: Any = {"vilt": vilt, "meter": meter}[family].create(
        {"name": f"{family}_tiny", "create": {"task": task, "img_size": 24}}
    )
    weights = large.state_dict()
    if family == "vilt":
        table = weights["embeddings.position_embeddings"][0]
        weights["embeddings.position_embeddings"] = vl.resample_positions(table, 10, mode="bilinear")[None]
    else:
        key = "image_encoder.embeddings.position_embedding.weight"
        weights[key] = vl.resample_positions(weights[key], 10, mode="bicubic")
    small.load_state_dict(weights)
    examples = padded(task)
    pixels = examples["pixel_values"]
    smaller = resize(pixels.flatten(0, -4), (24, 24)).view(*pixels.shape[:-2], 24, 24)
    expected = small.eval()({**examples, "pixel_values": smaller})
    model = apply(TECHNIQUE, large, ratio=0.75).model
    for given in (examples, Inputs(examples)):
        torch.testing.assert_close(model(given), expected, atol=1e-6, rtol=1e-6)
    facts = model_info(model)
    assert (facts.image_size, facts.num_tokens) == (24, 20 + 10)


@every_family
def test_less_is_computed(family: str) -> None:
    model, examples = vlm(family, img_size=64), batch("entailment", 1, side=64)
    whole = macs(model, examples)
    assert macs(apply(TECHNIQUE, model, ratio=0.5).model, examples) < 0.5 * whole


def test_masks_shrink_with_their_images() -> None:
    examples = {**batch("entailment"), "pixel_mask": torch.zeros(3, 32, 32, dtype=torch.int64)}
    for i, (height, width) in enumerate(((32, 32), (16, 32), (8, 16))):
        examples["pixel_mask"][i, :height, :width] = 1
    small = shrink(examples, 0.5, 8)
    assert small["pixel_values"].shape == (3, 3, 16, 16)
    assert small["pixel_mask"].flatten(1).sum(1).tolist() == [256, 128, 32]
    model = apply(TECHNIQUE, vlm("vilt"), ratio=0.5).model
    assert model(examples).shape == (3, 3)
    wide = {**batch("entailment"), "pixel_values": torch.zeros(3, 3, 16, 64)}  # ViLT takes other shapes too
    assert shrink(wide, 0.5, 8)["pixel_values"].shape == (3, 3, 8, 32)
    assert model(wide).shape == (3, 3)


@every_family
def test_what_makes_no_batch_is_still_refused_by_the_model(family: str) -> None:
    model = apply(TECHNIQUE, vlm(family), ratio=0.5).model
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model({"input_ids": torch.zeros(2, 5, dtype=torch.int64)})
    facts = model_info(vlm(family))
    assert "as many patches" in str(TECHNIQUE.check(facts, Config(ratio=1.0)))
    assert "leaves no whole patch" in str(TECHNIQUE.check(model_info(vlm(family, img_size=16)), Config(ratio=0.25)))


@every_family
def test_resampling_to_the_same_size_changes_nothing(family: str) -> None:
    model = vlm(family)
    expected = model(batch("entailment"))
    same = copy.deepcopy(model)
    family_module(same).resample_(same, 32)
    assert torch.equal(same(batch("entailment")), expected)
