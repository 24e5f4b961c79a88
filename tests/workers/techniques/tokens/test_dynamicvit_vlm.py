"""DynamicViT in ViLT and METER: what stays, masked as removed, padding, and the losses of one and of two pictures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.vision_language import batch
from tests.workers.techniques.vlm import FAMILIES, apply, padded, vlm
from workers.models import model_info
from workers.techniques.record import LossInputs
from workers.techniques.tokens.dynamicvit import TECHNIQUE, Config
from workers.techniques.tokens.dynamicvit_joint import distance, take_traces
from workers.techniques.tokens.dynamicvit_predictors import kept_counts

every_family = pytest.mark.parametrize("family", FAMILIES)


class Fixed(nn.Module):
    """A predictor that is sure, by a number in each token that no layer before it has changed."""

    def __init__(self, chances: Tensor) -> None:
        super().__init__()
        self.chances = chances

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        keep = self.chances[: x.shape[0], : x.shape[1]]
        return torch.stack([keep, -keep], dim=-1).log_softmax(-1)


def thinned(family: str, task: str = "entailment", **config: Any) -> Any:
    """A model whose predictors have opinions: their weights are larger than at the start of a training."""
    model = apply(TECHNIQUE, vlm(family, task), **config).model
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".predictor." in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@every_family
def test_shares_of_the_first_patches_stay(family: str) -> None:
    model = thinned(family, layers="0,2" if family == "vilt" else "0,4", keep=0.7)
    seen: list[int] = []
    for layer in model.layers:
        if hasattr(layer, "reducer"):
            original = layer.reducer.enter

            def spy(*args: Any, original: Any = original) -> Any:
                image, carried = original(*args)
                seen.append(image.x.shape[1])
                return image, carried

            layer.reducer.enter = spy
    model(padded())
    assert kept_counts(16, 0.7, 2) == [11, 7]
    assert seen == [12, 8, 8]  # with the class token; the last layer only looks
    assert [hasattr(layer, "reducer") for layer in model.layers] == [True, False, True, True]


@every_family
def test_masked_in_training_is_removed_at_rest(family: str) -> None:
    model = thinned(family, layers="0", keep=0.5)
    sure = torch.where(torch.rand(3, 16, generator=torch.Generator().manual_seed(1)).argsort(1) < 8, 40.0, -40.0)
    model.layers[0].reducer.predictor = Fixed(sure)
    for examples in (batch("entailment"), padded()):
        masked = model.train()(examples)
        torch.testing.assert_close(model.eval()(examples), masked, atol=1e-4, rtol=1e-4)
    model.layers[0].reducer.predictor = Fixed(-sure)
    assert (model(padded()) - masked).abs().max() > 1e-3


def test_padded_patches_go_first_and_have_no_part() -> None:
    examples = padded()
    mask = torch.ones(3, 32, 32, dtype=torch.int64)
    mask[1, 24:], mask[2, 16:] = 0, 0
    other = examples["pixel_values"].clone()
    other[~mask.bool()[:, None].expand_as(other)] = 5.0
    model = thinned("vilt", layers="0,2", keep=0.6)
    found = [model({**examples, "pixel_values": p, "pixel_mask": mask}) for p in (examples["pixel_values"], other)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    model.layers[0].reducer.predictor = Fixed(torch.full((3, 16), 40.0))
    model.layers[2].reducer.predictor = Fixed(torch.full((3, 16), 40.0))
    model.train()({**examples, "pixel_mask": mask})
    traces = take_traces(model)
    assert traces is not None
    assert traces[0].valid.sum(dim=1).flatten().tolist() == [16, 12, 8]
    for share in traces[0].shares():
        torch.testing.assert_close(share.mean(dim=1).flatten(), torch.ones(3))  # everything that is valid was kept


@every_family
@pytest.mark.parametrize("task", ["entailment", "nlvr2"])
def test_losses_by_hand(family: str, task: str) -> None:
    teacher = vlm(family, task)
    config = Config(layers="0,2", keep=0.6, logit_weight=0.0)
    model = thinned(family, task, layers="0,2", keep=0.6, logit_weight=0.0).train()
    examples: Any = padded(task)
    model(examples)  # a pass whose traces nobody takes
    logits = model(examples)
    traces = model.layers[-1].reducer.traces
    assert len(traces) == (2 if task == "nlvr2" else 1)
    assert copy.deepcopy(model).layers[-1].reducer.traces == []
    expected = torch.zeros(())
    for picture, trace in enumerate(traces):
        one, two = trace.decided
        assert (two <= one).all()
        for kept, share in ((one, 0.6), (two, 0.36)):
            expected = expected + 2.0 * (kept.mean(dim=(1, 2)) - share).square().mean() / 2 / len(traces)
        theirs = final_tokens(teacher, examples, picture)
        ours = model.layernorm(trace.features) if family == "vilt" else trace.features
        apart = ((ours - theirs).square().mean(dim=-1, keepdim=True) * two).sum() / two.sum()
        expected = expected + 0.5 * apart / len(traces)
    assert TECHNIQUE.loss is not None
    inputs = LossInputs(model, examples, logits, torch.zeros(3, dtype=torch.int64), None, 0.0, teacher=teacher)
    term = TECHNIQUE.loss(inputs, config)
    torch.testing.assert_close(term.extra, expected)
    term.extra.backward()  # type: ignore[no-untyped-call]
    for i in (0, 2) if family == "vilt" else (0, 1):
        gradients = [p.grad for p in model.layers[i].reducer.predictor.parameters()]
        assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
        assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0
    with pytest.raises(ValueError, match="forward pass in training mode"):
        TECHNIQUE.loss(inputs, config)


def final_tokens(teacher: Any, examples: Any, picture: int) -> Tensor:
    """The teacher's patch tokens of one picture after its last norm."""
    with torch.no_grad():
        if teacher.family == "vilt":
            tokens = teacher.encode(teacher.tokens(examples, picture))
            patches: Tensor = tokens.hidden[:, tokens.num_text + 1 :]
            return patches
        from workers.models.meter import CrossTokens

        text, mask = teacher.encode_text(examples)
        image, _ = teacher.encode_image(examples, picture)
        return teacher.encode(CrossTokens(text, image, mask)).image[:, 1:]  # type: ignore[no-any-return]


def test_tokens_of_another_teacher_are_not_compared() -> None:
    model = thinned("vilt", layers="0,2", keep=0.6).train()
    examples: Any = batch("entailment")
    logits = model(examples)
    inputs = LossInputs(model, examples, logits, torch.zeros(3), None, 0.0, teacher=vlm("vilt", embed_dim=32))
    traces = take_traces(model)
    assert traces is not None
    assert distance(inputs, traces) is None
    inputs.teacher = vlm("vilt", img_size=64)
    assert distance(inputs, traces) is None
    inputs.teacher = vlm("vilt")
    assert distance(inputs, traces) is not None


def test_layers_are_those_of_pumer_or_by_start() -> None:
    facts = model_info(vlm("meter"))
    assert TECHNIQUE.check(facts, Config(layers="0,2,4,6")) is None
    assert "even numbers" in str(TECHNIQUE.check(facts, Config(layers="1,2")))
    assert "drops none of 16 patch tokens" in str(TECHNIQUE.check(facts, Config(keep=1.0)))
    assert apply(TECHNIQUE, vlm("meter"), layers="0,2,4,6").resolved["layers"] == [0, 1, 2, 3]
    assert apply(TECHNIQUE, vlm("vilt"), start=0.25, stages=3).resolved["layers"] == [1, 2, 3]
