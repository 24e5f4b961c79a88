"""The paper's baselines can be set to PuMer's work, at full size."""

from __future__ import annotations

from typing import Any

import torch

from tests.vision_language import macs
from workers.models import meter
from workers.techniques.record import make_config
from workers.techniques.tokens import pumer, tome


def work_of_meter(technique: Any, **config: Any) -> float:
    """G MACs of one text of 32 tokens with an image of 384 px."""
    model = meter.create({"name": "meter_b16", "create": {"task": "retrieval"}}, device="meta").eval()
    technique.apply(model, make_config(technique.Config, config), None)  # nothing is drawn and nothing is trained
    ids = torch.zeros(1, 32, dtype=torch.int64, device="meta")
    return macs(model, {"pixel_values": torch.zeros(1, 3, 384, 384, device="meta"), "input_ids": ids}) / 1e9


def test_tome_in_meters_fusion_layers_reaches_the_work_of_pumer() -> None:
    """That of the mild ratios; at most half of the image merges in a layer, so the strong ones are out of its reach."""
    mild = work_of_meter(pumer.TECHNIQUE, layers="0,2,4,6", prune=0.2, image_merge=0.2)
    strong = work_of_meter(pumer.TECHNIQUE, layers="0,2,4,6", prune=0.3, image_merge=0.5)
    assert [round(mild, 1), round(strong, 1)] == [64.6, 59.0]
    assert abs(work_of_meter(tome.TECHNIQUE, r=100, schedule="decreasing") - mild) < 0.1
    most = work_of_meter(tome.TECHNIQUE, r=288)  # half of the patches in the first layer, then half of what is left
    assert strong < 62.1 < most < mild
