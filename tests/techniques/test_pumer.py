"""PuMer: METHODS' traces and counts, a layer of each backbone against a slow one, modalities apart, padding, parts, artefacts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.techniques.vlm import FAMILIES, apply, describe, padded, vlm
from tests.vision_language import CLASSES, batch, macs
from workers import artefact
from workers.models import meter, model_info, vilt
from workers.techniques.distill import soft_loss
from workers.techniques.joint_tokens import LAYER_NAMES, Seen, Stream, chosen_layers, layers_fault
from workers.techniques.merging import Matching
from workers.techniques.pumer import (
    TECHNIQUE,
    Config,
    Ratios,
    TextInformedReducer,
    plain_change,
    pruned,
    share,
    token_counts,
)
from workers.techniques.record import LossInputs

every_family = pytest.mark.parametrize("family", FAMILIES)
NOTHING: dict[str, Any] = {"prune": 0.0, "image_merge": 0.0, "text_merge": 0.0}
STRONG: dict[str, Any] = {"layers": "0,2", "prune": 0.3, "image_merge": 0.3, "text_merge": 0.3}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- counts -----------------------------------------------------------------------------------------------------------


def test_traces_of_the_specification() -> None:
    assert token_counts(40, 145, Ratios(0.1, 0.3, 0.2, False), 4) == [(32, 87), (26, 52), (21, 31), (17, 19)]
    assert token_counts(32, 577, Ratios(0.2, 0.2, 0.2, False), 4) == [(26, 347), (21, 209), (17, 125), (14, 75)]
    assert token_counts(32, 577, Ratios(0.3, 0.5, 0.2, False), 4) == [(26, 203), (21, 72), (17, 26), (14, 10)]


def test_shares_round_a_half_to_the_even_number() -> None:
    assert [share(0.1, 145), share(0.3, 145), share(0.5, 203), share(0.30000000000000004, 5)] == [14, 44, 102, 2]
    assert Ratios(0.5, 0.5, 0.5, False).image(1) == (1, 0)
    assert Ratios(0.5, 0.5, 0.5, False).text(1) == 0
    assert Ratios(0.0, 0.5, 0.5, True).image(9) == (9, 0)  # as published, no pruning switches the merging off


@pytest.mark.parametrize(("layers", "expected"), [("2,5,8", 8.70), ("2,4,6,8", 7.64), ("spread_3", 8.70)])
def test_work_of_a_full_size_vilt(layers: str, expected: float) -> None:
    model = vilt.create({"name": "vilt_b32", "create": {"task": "retrieval"}}, device="meta").eval()
    TECHNIQUE.apply(model, Config(layers=layers), surroundings_of_meta())
    ids = torch.zeros(1, 32, dtype=torch.int64, device="meta")
    examples = {"pixel_values": torch.zeros(1, 3, 384, 384, device="meta"), "input_ids": ids}
    assert round(macs(model, examples) / 1e9, 2) == expected


def surroundings_of_meta() -> Any:
    return None  # nothing is drawn and nothing is trained


def test_tokens_of_a_full_size_vilt_layer_by_layer() -> None:
    model = vilt.create({"name": "vilt_b32", "create": {"task": "retrieval"}}, device="meta").eval()
    TECHNIQUE.apply(model, Config(layers="2,4,6,8"), surroundings_of_meta())
    ids = torch.zeros(1, 40, dtype=torch.int64, device="meta")
    tokens = model.tokens({"pixel_values": torch.zeros(1, 3, 384, 384, device="meta"), "input_ids": ids})
    found = []
    for layer in model.layers:
        tokens = layer.advance(tokens)  # type: ignore[operator]
        found.append((tokens.num_text, tokens.hidden.shape[1] - tokens.num_text))
    steps = [(40, 145), (32, 87), (26, 52), (21, 31), (17, 19)]
    assert found == [steps[i] for i in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4)]


@pytest.mark.parametrize(
    ("prune", "merge", "layers", "expected"),
    [
        (0.2, 0.2, "0,2,4,6", [(26, 347), (21, 209), (17, 125), (14, 75), (14, 75), (14, 75)]),
        (0.3, 0.5, "0,2,4,6", [(26, 203), (21, 72), (17, 26), (14, 10), (14, 10), (14, 10)]),
        (0.3, 0.5, "2,4,6", [(32, 577), (26, 203), (21, 72), (17, 26), (17, 26), (17, 26)]),
    ],
)
def test_tokens_of_a_full_size_meter_layer_by_layer(
    prune: float, merge: float, layers: str, expected: list[tuple[int, int]]
) -> None:
    model = meter.create({"name": "meter_b16", "create": {"task": "retrieval"}}, device="meta").eval()
    TECHNIQUE.apply(model, Config(layers=layers, prune=prune, image_merge=merge), surroundings_of_meta())
    tokens = meter.CrossTokens(torch.zeros(1, 32, 768, device="meta"), torch.zeros(1, 577, 768, device="meta"))
    found = []
    for layer in model.layers:
        tokens = layer(tokens)
        found.append((tokens.text.shape[1], tokens.image.shape[1]))
    assert found == expected


def test_layers_by_name() -> None:
    assert chosen_layers("2,4,6,8", "vilt", 12) == [2, 4, 6, 8]
    assert [chosen_layers(f"spread_{n}", "vilt", 12) for n in (1, 2, 3)] == [[2], [2, 7], [2, 5, 8]]
    assert chosen_layers("spread_4", "vilt", 12) == [2, 4, 7, 9]
    assert [chosen_layers(f"spread_{n}", "vilt", 4) for n in (2, 3, 4)] == [[0, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert chosen_layers("0,2,4,6", "meter", 6) == [0, 1, 2, 3]
    assert layers_fault("0,2,4,6", "meter", 6) is None
    for name in LAYER_NAMES:
        assert layers_fault(name, "vilt", 12) is None
    assert "even numbers" in str(layers_fault("2,5,8", "meter", 6))
    assert "is number 3" in str(layers_fault("2,4", "vilt", 4))
    assert "is number 2" in str(layers_fault("2,4", "meter", 2))


# --- a slow reference -------------------------------------------------------------------------------------------------

Rows = list[tuple[Tensor, float]]
"""Tokens (C,) of one example, each with what is added to its logit as a key."""


def slow_merge(tokens: Rows, keys: Tensor, r: int, paper: bool) -> Rows:
    """Merges r of the tokens by keys (N, D), one by one; token 0 stays."""
    n = len(tokens)
    hidden = [bias < -1 for _, bias in tokens]
    best: dict[int, tuple[float, int]] = {}
    for a in range(2, n, 2):
        choices = []
        for b in range(1, n, 2):
            cosine = F.cosine_similarity(keys[a], keys[b], dim=0).item()
            choices.append((-2.0 if hidden[b] and not paper else cosine, -b))
        score, b = max(choices)
        best[a] = (2.0 if hidden[a] and not paper else score, -b)
    gone = sorted(best, key=lambda a: -best[a][0])[:r]
    result = []
    for i in [0, *[a for a in range(2, n, 2) if a not in gone], *range(1, n, 2)]:
        members = [i, *[a for a in gone if best[a][1] == i]]
        valid = members if paper else [m for m in members if not hidden[m]]
        if not valid:
            result.append((tokens[i][0] * (0 if len(members) > 1 else 1), -1e4))
            continue
        mean = sum(tokens[m][0] for m in valid) / len(valid)
        bias = sum(tokens[m][1] for m in valid) / len(valid)
        result.append((mean, bias))
    return result if gone else list(tokens)


def slow_attention(attention: Any, x: Tensor, source: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One example: output (N, C), map (N, S) averaged over heads, keys (S, D) averaged over heads."""
    q, k, v = attention.query(x), attention.key(source), attention.value(source)
    d, outs, maps = attention.head_dim, [], []
    for h in range(attention.num_heads):
        part = slice(h * d, (h + 1) * d)
        weights = (q[:, part] @ k[:, part].T / d**0.5 + bias).softmax(-1)
        outs.append(weights @ v[:, part])
        maps.append(weights)
    return torch.cat(outs, 1), torch.stack(maps).mean(0), k.unflatten(1, (-1, d)).mean(1)


def slow_image(tokens: Rows, votes: Tensor, keys: Tensor, ratios: Ratios) -> Rows:
    total, paper = len(tokens), ratios.paper_compatible
    if paper and ratios.prune == 0:
        return tokens
    keep = max(total - round(ratios.prune * total), 1)
    score = votes.tolist()
    if not paper:
        score = [9.0, *[-1.0 if bias < -1 else s for (_, bias), s in zip(tokens[1:], score[1:], strict=True)]]
    order = sorted(range(total), key=lambda i: -score[i])[:keep]
    order = (order if paper else sorted(order)) if keep < total else list(range(total))
    r = min(round(ratios.image_merge * total), (keep - 1) // 2)
    return slow_merge([tokens[i] for i in order], keys[order], r, paper)


def slow_text(tokens: Rows, keys: Tensor, ratios: Ratios) -> Rows:
    if ratios.paper_compatible and ratios.prune == 0:
        return tokens
    r = min(round(ratios.text_merge * len(tokens)), (len(tokens) - 1) // 2)
    return slow_merge(tokens, keys, r, ratios.paper_compatible)


def vote(shares: Tensor, text_bias: Tensor, paper: bool) -> Tensor:
    return shares.mean(0) if paper else shares[text_bias > -1].mean(0)


def slow_vilt(layer: Any, x: Tensor, bias: Tensor, length: int, ratios: Ratios) -> tuple[Rows, Rows]:
    normed = layer.layernorm_before(x)
    out, shares, keys = slow_attention(layer.attention.attention, normed, normed, bias)
    x = x + layer.attention.output.dense(out)
    tokens = list(zip(x, bias.tolist(), strict=True))
    votes = vote(shares[:length, length:], bias[:length], ratios.paper_compatible)
    text = slow_text(tokens[:length], keys[:length], ratios)
    image = slow_image(tokens[length:], votes, keys[length:], ratios)
    return [(layer.transform(x[None])[0], b) for x, b in text], [(layer.transform(x[None])[0], b) for x, b in image]


def slow_meter(layer: Any, text: Tensor, bias: Tensor, image: Tensor, ratios: Ratios) -> tuple[Rows, Rows]:
    own, cross = layer.text.self_attention, layer.text.cross_attention
    out, _, text_keys = slow_attention(own.attention, text, text, bias)
    hidden = own.output(out, text)
    out, shares, image_keys = slow_attention(cross.attention, hidden, image, torch.zeros(len(image)))
    hidden = cross.output(out, hidden)
    votes = vote(shares, bias, ratios.paper_compatible)
    fewer = slow_image([(x, 0.0) for x in image], votes, image_keys, ratios)
    both = torch.cat([hidden, text], 1)  # the same reduction of the text after and before the layer
    pairs = slow_text(list(zip(both, bias.tolist(), strict=True)), text_keys, ratios)
    after, before = (torch.stack(part) for part in zip(*(x.chunk(2) for x, _ in pairs), strict=True))
    bias, seen = torch.tensor([b for _, b in pairs]), torch.stack([x for x, _ in fewer])
    new_text = layer.text.transform(after)
    attended = layer.image.attend(seen[None], None, before[None], bias[None])
    new_image = layer.image.transform(attended)[0]
    return list(zip(new_text, bias.tolist(), strict=True)), [(x, 0.0) for x in new_image]


RATIOS = [
    Ratios(0.2, 0.3, 0.3, False),
    Ratios(0.0, 0.5, 0.0, False),
    Ratios(0.3, 0.0, 0.5, False),
    Ratios(0.3, 0.3, 0.3, True),
]


@pytest.mark.parametrize("ratios", RATIOS, ids=str)
def test_a_vilt_layer_is_the_slow_one(ratios: Ratios) -> None:
    model = vlm("vilt")
    layer = model.layers[1]
    hidden = random(2, 8 + 17, 64)
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[0, 5:8] = mask[1, 6:8] = mask[1, 20:] = False
    reduced = apply(TECHNIQUE, copy.deepcopy(model), layers="1").model.layers[1]
    reduced.reducer = TextInformedReducer(ratios)
    found = reduced.advance(vilt.JointTokens(hidden, mask, 8))
    for i in range(2):
        bias = torch.zeros(25).masked_fill(~mask[i], -1e4)
        text, image = slow_vilt(layer, hidden[i], bias, 8, ratios)
        check_rows(found.split()[0][i], found.split_mask()[0][i], text)
        check_rows(found.split()[1][i], found.split_mask()[1][i], image)


def check_rows(x: Tensor, mask: Tensor, expected: Rows) -> None:
    """Valid rows are equal; where the mask hides a row, the slow one hides it too."""
    valid = mask if mask.dtype == torch.bool else mask > -1
    assert len(x) == len(expected)
    assert valid.tolist() == [bias > -1 for _, bias in expected]
    for row, is_valid, (want, _) in zip(x, valid.tolist(), expected, strict=True):
        if is_valid:
            torch.testing.assert_close(row, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratios", RATIOS, ids=str)
def test_a_meter_layer_is_the_slow_one(ratios: Ratios) -> None:
    model = vlm("meter")
    layer = model.layers[1]
    text, image = random(2, 8, 64), random(2, 17, 64, seed=1)
    mask = torch.arange(8) < torch.tensor([[5], [8]])
    reduced = apply(TECHNIQUE, copy.deepcopy(model), layers="2").model.layers[1]
    reduced.reducer = TextInformedReducer(ratios)
    found = reduced(meter.CrossTokens(text, image, mask))
    assert found.image_mask is None
    for i in range(2):
        bias = torch.zeros(8).masked_fill(~mask[i], -1e4)
        new_text, new_image = slow_meter(layer, text[i], bias, image[i], ratios)
        check_rows(found.text[i], found.text_mask[i], new_text)
        check_rows(found.image[i], torch.ones(len(found.image[i]), dtype=torch.bool), new_image)


def test_pruning_and_merging_by_hand() -> None:
    score = torch.tensor([[0.0, 0.4, 0.1, 0.3, 0.2]])
    assert pruned(score, 3, None).tolist() == [[0, 1, 3]]  # the class token, though nobody asks for it
    assert pruned(score, 3, torch.tensor([[True, False, True, True, True]])).tolist() == [[0, 3, 4]]
    x = torch.tensor([[[10.0], [1.0], [3.0], [5.0]]])
    matching = Matching(rest=torch.tensor([[0, 1]]), merged=torch.tensor([[2, 3]]), into=torch.tensor([[1, 1]]))
    valid = torch.tensor([[True, True, True, False]])
    published = plain_change(Stream(x, valid), matching)
    assert published.of(x).flatten().tolist() == [10.0, 3.0]
    assert published.mask is not None
    assert published.mask[0, 0] == 0
    assert published.mask[0, 1] < -3000  # one padded token of three hides them all


# --- invariants -------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("examples", [batch("entailment"), padded()], ids=["whole", "padded"])
def test_ratios_of_zero_change_nothing(family: str, examples: dict[str, Tensor]) -> None:
    model = vlm(family)
    expected = model(examples)
    applied = TECHNIQUE.apply(copy.deepcopy(model), Config(**NOTHING), surroundings_of_meta())
    assert applied.changed == []
    assert torch.equal(applied.model(examples), expected)
    whole = apply(TECHNIQUE, model, layers="0,2").model
    for layer in whole.layers:
        if hasattr(layer, "reducer"):  # the reducing layer's own forward pass, asking and keeping everything
            layer.reducer = TextInformedReducer(Ratios(0.0, 0.0, 0.0, False))
            layer.reducer.asks = True
    torch.testing.assert_close(whole(examples), expected, atol=1e-6, rtol=1e-6)


@every_family
@pytest.mark.parametrize("paper", [False, True])
def test_modalities_never_mix_in_a_reduction(family: str, paper: bool) -> None:
    """What a reducer makes of the text is the same whatever the image's tokens are, and the other way round, and no
    token of one has a gradient from the other."""
    reducer = TextInformedReducer(Ratios(0.3, 0.3, 0.3, paper))
    seen: list[Any] = []
    model = apply(TECHNIQUE, vlm(family), **STRONG).model
    inner = model.layers[0].reducer
    original = inner.reduce

    def spy(text: Stream, image: Stream, what: Any, carried: Any) -> Any:
        seen.append((text, image, what))
        return original(text, image, what, carried)

    inner.reduce = spy
    model(padded())
    text, image, what = seen[0]
    text_x, image_x = text.x.detach().requires_grad_(), image.x.detach().requires_grad_()
    found = reducer.reduce(replace(text, x=text_x), replace(image, x=image_x), what, None)
    assert found.text is not None
    assert found.image is not None
    for change, own, other in ((found.text, text_x, image_x), (found.image, image_x, text_x)):
        one, none = torch.autograd.grad(change.of(own).sum(), (own, other), allow_unused=True)
        assert one.abs().sum() > 0
        assert none is None
    elsewhere = replace(what, image_keys=random(*what.image_keys.shape, seed=9))
    same = reducer.reduce(text, image, elsewhere, None)
    assert same.text is not None
    assert torch.equal(same.text.of(text_x), found.text.of(text_x))
    elsewhere = replace(what, text_keys=random(*what.text_keys.shape, seed=9))
    same = reducer.reduce(text, image, elsewhere, None)
    assert same.image is not None
    assert torch.equal(same.image.of(image_x), found.image.of(image_x))


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


def test_the_class_token_stays_unless_as_published() -> None:
    shares = torch.tensor([[[0.0, 0.1, 0.4, 0.2, 0.3], [0.0, 0.1, 0.3, 0.2, 0.4], [0.9, 0.0, 0.0, 0.0, 0.0]]])
    what = Seen(random(1, 2, 5, 4), random(1, 2, 3, 4), shares)
    text = Stream(random(1, 3, 8), torch.tensor([[True, True, False]]))  # the third, padding, asks for the class token
    kept = {}
    for paper in (False, True):
        found = TextInformedReducer(Ratios(0.4, 0.0, 0.0, paper)).reduce(
            text, Stream(random(1, 5, 8), None), what, None
        )
        assert found.image is not None
        assert found.text is None
        kept[paper] = found.image.matching.rest.tolist()
    assert kept == {False: [[0, 2, 4]], True: [[0, 2, 4]]}
    what = replace(what, shares=shares[:, :2])
    text = Stream(text.x[:, :2], None)
    found = TextInformedReducer(Ratios(0.4, 0.0, 0.0, True)).reduce(text, Stream(random(1, 5, 8), None), what, None)
    assert found.image is not None
    assert found.image.matching.rest.tolist() == [[2, 4, 3]]  # by score, the class token among those that went


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
