"""Image and text never mix in what a technique does to joint layers' tokens: gradients through whole reducing layers.

Attention is the one place where the modalities meet. With its outputs to the other modality set to 0 whatever still reaches
the other modality's tokens came there by the reduction. What is alike is judged within a modality, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.workers.techniques.vlm import FAMILIES, apply, padded, vlm
from workers.models import meter, vilt
from workers.techniques.tokens import dynamicvit, pumer, tome
from workers.techniques.tokens.pumer import Ratios, TextInformedReducer
from workers.techniques.tokens.shared_joint_tokens import Stream

every_family = pytest.mark.parametrize("family", FAMILIES)

RATIOS: dict[str, Any] = {"prune": 0.3, "image_merge": 0.3, "text_merge": 0.3}
REDUCERS = {
    "pumer": (pumer.TECHNIQUE, RATIOS),
    "pumer_as_published": (pumer.TECHNIQUE, {**RATIOS, "paper_compatible": True}),
    "tome": (tome.TECHNIQUE, {"r": 3}),
    "tome_plain": (tome.TECHNIQUE, {"r": 3, "proportional_attention": False}),
    "dynamicvit": (dynamicvit.TECHNIQUE, {"keep": 0.6}),
}
every_reducer = pytest.mark.parametrize("name", list(REDUCERS))


def reducing(family: str, name: str) -> Any:
    technique, config = REDUCERS[name]
    layers = {} if technique is tome.TECHNIQUE else {"layers": "0,2"}
    return apply(technique, vlm(family), **config, **layers).model


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(model: Any, text: Tensor, image: Tensor) -> dict[str, Tensor]:
    """The tokens of both modalities after all layers, the text's last tokens and ViLT's last patches being padding."""
    text_mask = torch.arange(text.shape[1]) < torch.tensor([[6], [8]])
    if model.family == "meter":
        tokens = model.encode(meter.CrossTokens(text, image, text_mask))
        return {"text": tokens.text, "image": tokens.image}
    image_mask = torch.arange(image.shape[1]) < torch.tensor([[17], [14]])
    mask = torch.cat([text_mask, image_mask], dim=1)
    found = model.encode(vilt.JointTokens(torch.cat([text, image], dim=1), mask, text.shape[1])).split()
    return {"text": found[0], "image": found[1]}


def reached(model: Any) -> dict[str, dict[str, float]]:
    """The largest gradient of each modality's tokens after all layers by those of each before them."""
    before = {"text": random(2, 8, 64, seed=1), "image": random(2, 17, 64, seed=2)}
    for x in before.values():
        x.requires_grad_()
    found = {}
    for modality, x in through(model, **before).items():
        # random weights, because the sum over the channels of a normalised token tells nothing
        total = (x * random(*x.shape, seed=3)).sum()
        gradients = torch.autograd.grad(total, list(before.values()), retain_graph=True)
        sizes = [gradient.abs().max().item() for gradient in gradients]
        found[modality] = dict(zip(before, sizes, strict=True))
    return found


def keep_apart_(model: Any) -> None:
    """Sets the output of every attention to the other modality to 0; ViLT's are to both."""
    with torch.no_grad():
        for layer in model.layers:
            vilt_layer = model.family == "vilt"
            blocks = [layer.attention] if vilt_layer else [layer.text.cross_attention, layer.image.cross_attention]
            for block in blocks:
                block.output.dense.weight.zero_()


@every_family
@every_reducer
def test_modalities_never_mix_in_a_reduction(family: str, name: str) -> None:
    model = reducing(family, name)
    assert sum(hasattr(layer, "reducer") for layer in model.layers) >= 2
    meeting = reached(model)
    assert min(size for sizes in meeting.values() for size in sizes.values()) > 1e-3  # a mixture is seen
    keep_apart_(model)
    apart = reached(model)
    assert apart["text"]["text"] > 1e-3
    assert apart["image"]["image"] > 1e-3
    assert apart["text"]["image"] == apart["image"]["text"] == 0


@every_family
@every_reducer
def test_only_the_image_loses_tokens_but_for_pumers_text(family: str, name: str) -> None:
    model = reducing(family, name)
    found = through(model, random(2, 8, 64, seed=1), random(2, 17, 64, seed=2))
    assert found["text"].shape[1] == (4 if name.startswith("pumer") else 8)  # 8, 6, 4
    assert found["image"].shape[1] == {"pumer": 3, "tome": 5, "dynamicvit": 6}[name.partition("_")[0]]


@every_family
@pytest.mark.parametrize("paper", [False, True])
def test_likeness_is_judged_within_a_modality(family: str, paper: bool) -> None:
    """Other keys of one modality change what becomes of that modality's tokens, and nothing of the other's."""
    seen: list[Any] = []
    model = reducing(family, "pumer")
    inner = model.layers[0].reducer
    original = inner.reduce

    def spy(text: Stream, image: Stream, what: Any, carried: Any) -> Any:
        seen.append((text, image, what))
        return original(text, image, what, carried)

    inner.reduce = spy
    model(padded())
    text, image, what = seen[0]
    reducer = TextInformedReducer(Ratios(**RATIOS, paper_compatible=paper))

    def tokens(changed: Any) -> tuple[Tensor, Tensor]:
        found = reducer.reduce(text, image, changed, None)
        assert found.text is not None
        assert found.image is not None
        return found.text.of(text.x), found.image.of(image.x)

    expected_text, expected_image = tokens(what)
    new_text, new_image = tokens(replace(what, image_keys=random(*what.image_keys.shape, seed=9)))
    assert torch.equal(new_text, expected_text)
    assert not torch.equal(new_image, expected_image)
    new_text, new_image = tokens(replace(what, text_keys=random(*what.text_keys.shape, seed=9)))
    assert not torch.equal(new_text, expected_text)
    assert torch.equal(new_image, expected_image)
