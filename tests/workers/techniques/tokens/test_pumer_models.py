"""PuMer in whole models: what must not change, padding, its three parts, training, artefacts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vision_language import CLASSES, batch
from tests.workers.techniques.vlm import FAMILIES, apply, describe, padded, surroundings, vlm
from workers import artefact
from workers.models import model_info
from workers.techniques.distillation.distill import soft_loss
from workers.techniques.record import LossInputs
from workers.techniques.tokens.pumer import TECHNIQUE, Config, Ratios, TextInformedReducer
from workers.techniques.tokens.shared_joint_tokens import Seen, Stream

every_family = pytest.mark.parametrize("family", FAMILIES)
NOTHING: dict[str, Any] = {"prune": 0.0, "image_merge": 0.0, "text_merge": 0.0}
STRONG: dict[str, Any] = {"layers": "0,2", "prune": 0.3, "image_merge": 0.3, "text_merge": 0.3}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- invariants -------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("examples", [batch("entailment"), padded()], ids=["whole", "padded"])
def test_ratios_of_zero_change_nothing(family: str, examples: dict[str, Tensor]) -> None:
    model = vlm(family)
    expected = model(examples)
    applied = TECHNIQUE.apply(copy.deepcopy(model), Config(**NOTHING), surroundings(model))
    assert applied.changed == []
    assert torch.equal(applied.model(examples), expected)
    whole = apply(TECHNIQUE, model, layers="0,2").model
    for layer in whole.layers:
        if hasattr(layer, "reducer"):  # the reducing layer's own forward pass, asking and keeping everything
            layer.reducer = TextInformedReducer(Ratios(0.0, 0.0, 0.0, False))
            layer.reducer.asks = True
    torch.testing.assert_close(whole(examples), expected, atol=1e-6, rtol=1e-6)


@every_family
def test_padding_has_no_vote_and_no_part_unless_as_published(family: str) -> None:
    examples = padded()
    other = {key: value.clone() for key, value in examples.items()}
    other["input_ids"][~other["attention_mask"].bool()] = 77
    model = apply(TECHNIQUE, vlm(family), **STRONG).model
    torch.testing.assert_close(model(other), model(examples), atol=1e-5, rtol=1e-5)
    published = apply(TECHNIQUE, vlm(family), **STRONG, paper_compatible=True).model
    assert (published(other) - published(examples)).abs().max() > 1e-4


def test_patches_without_pixels_go_first() -> None:
    examples = padded()
    mask = torch.ones(3, 32, 32, dtype=torch.int64)
    mask[1, 24:], mask[2, 8:] = 0, 0
    other = examples["pixel_values"].clone()
    other[~mask.bool()[:, None].expand_as(other)] = 5.0
    model = apply(TECHNIQUE, vlm("vilt"), **STRONG).model
    first, second = ({**examples, "pixel_values": p, "pixel_mask": mask} for p in (examples["pixel_values"], other))
    torch.testing.assert_close(model(first), model(second), atol=1e-5, rtol=1e-5)
    tokens = model.layers[0].advance(model.tokens(first))
    mask_after = tokens.split_mask()[1]
    assert mask_after.shape == (3, 7)  # of 17 tokens 12 stay, of which 5 merge
    assert mask_after.sum(1).tolist() == [7, 7, 3]  # the third image has 5 valid ones


def test_who_votes_and_whether_the_class_token_stays() -> None:
    """Three of five tokens stay. The third text token asks for token 1, and nobody for token 0, the class token."""
    shares = torch.tensor([[[0.0, 0.1, 0.45, 0.2, 0.25], [0.0, 0.1, 0.35, 0.2, 0.35], [0.0, 0.9, 0.0, 0.0, 0.1]]])

    def kept(paper: bool, texts: int, mask: Tensor | None) -> list[int]:
        what = Seen(random(1, 2, 5, 4), random(1, 2, texts, 4), shares[:, :texts])
        reducer = TextInformedReducer(Ratios(0.4, 0.0, 0.0, paper))
        found = reducer.reduce(Stream(random(1, texts, 8), mask), Stream(random(1, 5, 8), None), what, None)
        assert found.text is None
        assert found.image is not None
        rows: list[int] = found.image.matching.rest[0].tolist()
        return rows

    padding = torch.tensor([[True, True, False]])
    assert kept(False, 3, None) == [0, 1, 2]  # scores 0, .37, .27, .13, .23
    assert kept(False, 3, padding) == kept(False, 2, None) == [0, 2, 4]  # 0, .1, .4, .2, .3 without the third
    assert kept(True, 3, padding) == kept(True, 3, None) == [1, 2, 4]  # padding votes, and the class token goes
    assert kept(True, 2, None) == [2, 4, 3]  # by score


# --- the three parts, training, artefacts -----------------------------------------------------------------------------


@every_family
def test_each_part_has_its_own_switch(family: str) -> None:
    examples, found = padded(), {}
    for name, change in {
        "all": {},
        "no_prune": {"prune": 0.0},
        "no_image": {"image_merge": 0.0},
        "no_text": {"text_merge": 0.0},
    }.items():
        model = apply(TECHNIQUE, vlm(family), **{**STRONG, **change}).model
        found[name] = model(examples)
    values = list(found.values())
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(values) for b in values[:i])
    logits, teacher = random(4, 3, seed=1), random(4, 3, seed=2)
    inputs = LossInputs(vlm(family), torch.zeros(4), logits, torch.zeros(4, dtype=torch.int64), teacher, 0.0)
    assert TECHNIQUE.loss is not None
    term = TECHNIQUE.loss(inputs, Config())
    expected = (teacher.softmax(-1) * (teacher.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    assert term.task_weight == 1.0
    torch.testing.assert_close(term.extra, expected)
    torch.testing.assert_close(term.extra, soft_loss(logits, teacher, 1.0))
    assert TECHNIQUE.loss(inputs, Config(distil=False)).extra == 0
    assert TECHNIQUE.needs_teacher(Config())
    assert not TECHNIQUE.needs_teacher(Config(distil=False))
    assert not TECHNIQUE.trains(Config(**NOTHING))
    with pytest.raises(ValueError, match="teacher logits"):
        TECHNIQUE.loss(replace(inputs, teacher_logits=None), Config())


@every_family
@pytest.mark.parametrize("task", list(CLASSES))
def test_every_task_trains_through_the_reduction(family: str, task: str) -> None:
    model = apply(TECHNIQUE, vlm(family, task), **STRONG).model.train()
    examples = padded(task)
    logits = model(examples)
    assert logits.shape == (3, CLASSES[task])
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    layer = model.layers[0].attention if family == "vilt" else model.layers[0].text.cross_attention
    for part in ("query", "key", "value"):
        assert getattr(layer.attention, part).weight.grad.abs().sum() > 0
    assert torch.equal(model.eval()(examples), model(examples))


def test_several_texts_of_an_image_are_reduced_as_pairs() -> None:
    for family in FAMILIES:
        model = apply(TECHNIQUE, vlm(family, "retrieval"), **STRONG).model
        pairs = padded("retrieval", 6)
        several = {key: value.view(2, 3, -1) for key, value in pairs.items() if key != "pixel_values"}
        pixels = pairs["pixel_values"][:2]
        expected = model({**pairs, "pixel_values": pixels.repeat_interleave(3, dim=0)})
        assert torch.equal(model({**several, "pixel_values": pixels}).flatten(), expected[:, 0])


@every_family
def test_what_is_saved_comes_back_as_published_too(family: str, tmp_path: Path) -> None:
    applied = apply(TECHNIQUE, vlm(family), **STRONG, paper_compatible=True)
    step = {"technique": "pumer", "version": TECHNIQUE.version, "resolved": applied.resolved}
    artefact.save(applied.model, tmp_path / "a", model_description=describe(family), steps=[step])
    assert torch.equal(artefact.load(tmp_path / "a")(padded()), applied.model(padded()))
    assert set(applied.model.state_dict()) == set(vlm(family).state_dict())


def test_what_cannot_be_done_has_a_reason() -> None:
    facts = model_info(vlm("vilt"))
    assert TECHNIQUE.check(facts, Config(layers="0,2")) is None
    assert "change nothing in 20 text and 17 image tokens" in str(TECHNIQUE.check(facts, Config(**NOTHING)))
    published = Config(prune=0.0, paper_compatible=True)
    assert "prune=0 merges nothing" in str(TECHNIQUE.check(facts, published))
    assert "is number 3" in str(TECHNIQUE.check(facts, Config(layers="2,5,8")))
    reduced = model_info(apply(TECHNIQUE, vlm("meter"), **STRONG).model)
    assert "reduce tokens already" in str(TECHNIQUE.check(reduced, Config()))
    assert "timm" not in TECHNIQUE.models
    layer = apply(TECHNIQUE, vlm("vilt"), **STRONG).model.layers[0]
    with pytest.raises(RuntimeError, match="call advance"):
        layer(random(1, 5, 64))
