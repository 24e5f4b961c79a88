"""PuMer's mathematics (arXiv 2305.17530, section 3): traces and counts worked out by hand, layers by name, and layers of each backbone against slow ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.study.space import SearchSpace
from orchestrator.study.techniques import resolve_techniques
from tests.vision_language import macs
from tests.workers.techniques.vlm import apply, vlm
from workers.models import meter, vilt
from workers.techniques.record import config_faults, defaults, make_config
from workers.techniques.tokens.pumer import (
    TECHNIQUE,
    Config,
    Ratios,
    TextInformedReducer,
    plain_change,
    pruned,
    share,
    token_counts,
)
from workers.techniques.tokens.shared_joint_tokens import (
    HIDDEN,
    LAYER_NAMES,
    Stream,
    chosen_layers,
    layers_fault,
    numbers_fault,
)
from workers.techniques.tokens.shared_merging import Matching
from workers.trial import Recipe, Step


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


@pytest.mark.parametrize(
    ("task", "layers", "expected"),
    [
        ("retrieval", None, "15.95"),
        ("retrieval", "2,5,8", "8.70"),
        ("retrieval", "2,4,6,8", "7.64"),
        ("retrieval", "spread_3", "8.70"),
        ("nlvr2", "2,5,8", "17.4"),
    ],
)
def test_work_of_a_full_size_vilt(task: str, layers: str | None, expected: str) -> None:
    """In G for an example of 32 text tokens, which for NLVR2 is a pair of images, to as many digits as are given here."""
    model = vilt.create({"name": "vilt_b32", "create": {"task": task}}, device="meta").eval()
    if layers is not None:
        TECHNIQUE.apply(model, Config(layers=layers), surroundings_of_meta())
    images = (2,) if task == "nlvr2" else ()
    ids = torch.zeros(1, 32, dtype=torch.int64, device="meta")
    examples = {"pixel_values": torch.zeros(1, *images, 3, 384, 384, device="meta"), "input_ids": ids}
    digits = len(expected.partition(".")[2])
    assert f"{macs(model, examples) / 1e9:.{digits}f}" == expected


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
        assert numbers_fault(name) is None or name.startswith("spread_")
        assert layers_fault(name, "vilt", 12) is None
    assert "even numbers" in str(layers_fault("2,5,8", "meter", 6))
    assert "is number 3" in str(layers_fault("2,4", "vilt", 4))
    assert "is number 2" in str(layers_fault("2,4", "meter", 2))


def test_layers_are_any_ascending_numbers() -> None:
    """As few or as many as there are, in one spelling, so that equal recipes have equal hashes."""
    for name in ("3,6,9", "1,4,7", "2,5", "11", "0,1,2,3,4,5,6,7,8,9,10,11"):
        assert make_config(Config, {"layers": name}).layers == name
        assert layers_fault(name, "vilt", 12) is None
        assert chosen_layers(name, "vilt", 12) == [int(part) for part in name.split(",")]
    for wrong in (
        "",
        "2,",
        ",2",
        "2;5",
        "2, 5",
        "02,5",
        "-1",
        "5,2",
        "2,2",
        "1.5",
        "spread_9",
        "٣",
        "9" * 5000,
        3,
        None,
    ):
        assert [name for name, _ in config_faults(Config, {"layers": wrong})] == ["layers"], wrong
    with pytest.raises(ValueError, match=r"^layers: must be .* in ascending order .* \(got '5,2'\)"):
        make_config(Config, {"layers": "5,2"})
    assert chosen_layers("4,10", "meter", 6) == [2, 5]
    assert "is number 10" in str(layers_fault("4,12", "meter", 6))
    assert "even numbers" in str(layers_fault("4,7", "meter", 6))
    assert "is number 11" in str(layers_fault("3,12", "vilt", 12))
    model = apply(TECHNIQUE, vlm("vilt"), layers="0,3", prune=0.3).model
    assert [hasattr(layer, "reducer") for layer in model.layers] == [True, False, False, True]


def test_a_study_searches_sets_of_its_own() -> None:
    fields: dict[str, Any] = {"layers": ["3,6,9", "1,4,7"]}
    techniques, faults = resolve_techniques({"pumer": fields}, "vilt")
    assert not faults
    space = SearchSpace(techniques)
    recipe = Recipe((Step("pumer", {**defaults(Config), "layers": "1,4,7", "prune": 0.2}),))
    assert space.params_of(recipe)["pumer.layers"] == "1,4,7"
    _, faults = resolve_techniques({"pumer": {"layers": ["3,6,9", "2,5,8,7"]}}, "vilt")
    assert [(fault.where, fault.remedy) for fault in faults] == [("techniques.pumer.layers[1]", "did you mean 2,5,8?")]


# --- a slow reference -------------------------------------------------------------------------------------------------

Rows = list[tuple[Tensor, float]]
"""Tokens (C,) of one example, each with the weight by which it counts in an attention: 1, for padding 0."""


def slow_merge(tokens: Rows, keys: Tensor, r: int, paper: bool) -> Rows:
    """Merges r of the tokens by keys (N, D), one by one; token 0 stays."""
    n = len(tokens)
    hidden = [weight == 0 and not paper for _, weight in tokens]
    best: dict[int, tuple[float, int]] = {}
    for a in range(2, n, 2):
        choices = []
        for b in range(1, n, 2):
            cosine = F.cosine_similarity(keys[a], keys[b], dim=0).item()
            choices.append((-2.0 if hidden[b] else cosine, -b))
        score, b = max(choices)
        best[a] = (2.0 if hidden[a] else score, -b)
    gone = sorted(best, key=lambda a: -best[a][0])[:r]
    result = []
    for i in [0, *[a for a in range(2, n, 2) if a not in gone], *range(1, n, 2)]:
        members = [i, *[a for a in gone if best[a][1] == i]]
        counted = [m for m in members if not hidden[m]]
        if not counted:
            result.append((tokens[i][0] * (0 if len(members) > 1 else 1), 0.0))
            continue
        mean = sum(tokens[m][0] for m in counted) / len(counted)
        weight = sum(tokens[m][1] for m in counted) / len(counted)
        result.append((mean, weight))
    return result if gone else list(tokens)


def slow_attention(attention: Any, x: Tensor, source: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One example, exp(logit) times weight (S,): output (N, C), map (N, S) averaged over heads, keys (S, D) averaged over
    heads."""
    q, k, v = attention.query(x), attention.key(source), attention.value(source)
    d, outs, maps = attention.head_dim, [], []
    for h in range(attention.num_heads):
        part = slice(h * d, (h + 1) * d)
        exp = (q[:, part] @ k[:, part].T / d**0.5).exp() * weight
        shares = exp / exp.sum(-1, keepdim=True)
        outs.append(shares @ v[:, part])
        maps.append(shares)
    return torch.cat(outs, 1), torch.stack(maps).mean(0), k.unflatten(1, (-1, d)).mean(1)


def slow_image(tokens: Rows, votes: Tensor, keys: Tensor, ratios: Ratios) -> Rows:
    total, paper = len(tokens), ratios.paper_compatible
    if paper and ratios.prune == 0:
        return tokens
    keep = max(total - round(ratios.prune * total), 1)
    score = votes.tolist()
    if not paper:
        score = [9.0, *[s if weight else -1.0 for (_, weight), s in zip(tokens[1:], score[1:], strict=True)]]
    order = sorted(range(total), key=lambda i: -score[i])[:keep]
    order = (order if paper else sorted(order)) if keep < total else list(range(total))
    r = min(round(ratios.image_merge * total), (keep - 1) // 2)
    return slow_merge([tokens[i] for i in order], keys[order], r, paper)


def slow_text(tokens: Rows, keys: Tensor, ratios: Ratios) -> Rows:
    if ratios.paper_compatible and ratios.prune == 0:
        return tokens
    r = min(round(ratios.text_merge * len(tokens)), (len(tokens) - 1) // 2)
    return slow_merge(tokens, keys, r, ratios.paper_compatible)


def vote(shares: Tensor, weight: Tensor, paper: bool) -> Tensor:
    return shares.mean(0) if paper else shares[weight > 0].mean(0)


def apart(tokens: Rows) -> tuple[Tensor, Tensor]:
    """Tokens (N, C) and their weights (N,)."""
    return torch.stack([x for x, _ in tokens]), torch.tensor([weight for _, weight in tokens])


def slow_vilt(layer: Any, text: Rows, image: Rows, ratios: Ratios) -> tuple[Rows, Rows]:
    (x, weight), length = apart([*text, *image]), len(text)
    normed = layer.layernorm_before(x)
    out, shares, keys = slow_attention(layer.attention.attention, normed, normed, weight)
    x = x + layer.attention.output.dense(out)
    tokens = list(zip(x, weight.tolist(), strict=True))
    votes = vote(shares[:length, length:], weight[:length], ratios.paper_compatible)
    text = slow_text(tokens[:length], keys[:length], ratios)
    image = slow_image(tokens[length:], votes, keys[length:], ratios)
    return [(layer.transform(x[None])[0], w) for x, w in text], [(layer.transform(x[None])[0], w) for x, w in image]


def slow_block(block: Any, x: Tensor, source: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`slow_attention`, after projection, residual and norm."""
    out, shares, keys = slow_attention(block.attention, x, source, weight)
    return block.output(out, x), shares, keys


def slow_meter(layer: Any, text: Rows, image: Rows, ratios: Ratios) -> tuple[Rows, Rows]:
    (x, weight), (pixels, ones) = apart(text), apart(image)
    hidden, _, text_keys = slow_block(layer.text.self_attention, x, x, weight)
    hidden, shares, image_keys = slow_block(layer.text.cross_attention, hidden, pixels, ones)
    fewer = slow_image(image, vote(shares, weight, ratios.paper_compatible), image_keys, ratios)
    both = torch.cat([hidden, x], 1)  # the same reduction of the text after and before the layer
    pairs, weight = apart(slow_text(list(zip(both, weight.tolist(), strict=True)), text_keys, ratios))
    after, before = pairs.chunk(2, dim=1)
    pixels, ones = apart(fewer)
    pixels, _, _ = slow_block(layer.image.self_attention, pixels, pixels, ones)
    pixels, _, _ = slow_block(layer.image.cross_attention, pixels, before, weight)
    new_text, new_image = layer.text.transform(after), layer.image.transform(pixels)
    return list(zip(new_text, weight.tolist(), strict=True)), list(zip(new_image, ones.tolist(), strict=True))


RATIOS = [
    Ratios(0.2, 0.3, 0.3, False),
    Ratios(0.0, 0.5, 0.0, False),
    Ratios(0.3, 0.0, 0.5, False),
    Ratios(0.3, 0.3, 0.3, True),
]


def reduced_layers(family: str, ratios: Ratios) -> tuple[list[Any], list[Any]]:
    """Two layers in a row, as they are and reducing; the second takes what the first has merged."""
    model = vlm(family)
    reduced = apply(TECHNIQUE, copy.deepcopy(model), layers="1,2" if family == "vilt" else "2,4").model
    for layer in reduced.layers[1:3]:
        layer.reducer = TextInformedReducer(ratios)
    return list(model.layers[1:3]), list(reduced.layers[1:3])


def weighed(x: Tensor, mask: Tensor | None) -> Rows:
    """The tokens (N, C) of one example with their weights, of a mask (N,) as the layers have it."""
    if mask is None:
        return [(row, 1.0) for row in x]
    return list(zip(x, (mask.exp() if mask.is_floating_point() else mask.float()).tolist(), strict=True))


def check_rows(found: Rows, expected: Rows) -> None:
    """Weights are equal, and tokens where they are not 0."""
    assert len(found) == len(expected)
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])
    for (row, weight), (want, _) in zip(found, expected, strict=True):
        if weight:
            torch.testing.assert_close(row, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratios", RATIOS, ids=str)
def test_vilt_layers_are_the_slow_ones(ratios: Ratios) -> None:
    layers, reduced = reduced_layers("vilt", ratios)
    hidden = random(2, 8 + 17, 64)
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[0, 5:8] = mask[1, 6:8] = mask[1, 20:] = False
    expected = [(weighed(x[:8], m[:8]), weighed(x[8:], m[8:])) for x, m in zip(hidden, mask, strict=True)]
    tokens = vilt.JointTokens(hidden, mask, 8)
    for slow, layer in zip(layers, reduced, strict=True):
        tokens = layer.advance(tokens)
        expected = [slow_vilt(slow, *rows, ratios) for rows in expected]
        for modality, (x, m) in enumerate(zip(tokens.split(), tokens.split_mask(), strict=True)):
            assert m is not None
            for i in range(2):
                check_rows(weighed(x[i], m[i]), expected[i][modality])
    halves = {weight for rows in expected for weight in apart([*rows[0], *rows[1]])[1].tolist()} - {0.0, 1.0}
    assert bool(halves) is ratios.paper_compatible


@pytest.mark.parametrize("ratios", RATIOS, ids=str)
def test_meter_layers_are_the_slow_ones(ratios: Ratios) -> None:
    layers, reduced = reduced_layers("meter", ratios)
    text, image = random(2, 8, 64), random(2, 17, 64, seed=1)
    mask = torch.arange(8) < torch.tensor([[5], [8]])
    expected = [(weighed(text[i], mask[i]), weighed(image[i], None)) for i in range(2)]
    tokens = meter.CrossTokens(text, image, mask)
    for slow, layer in zip(layers, reduced, strict=True):
        tokens = layer(tokens)
        assert tokens.image_mask is None
        assert tokens.text_mask is not None
        expected = [slow_meter(slow, *rows, ratios) for rows in expected]
        for i in range(2):
            check_rows(weighed(tokens.text[i], tokens.text_mask[i]), expected[i][0])
            check_rows(weighed(tokens.image[i], None), expected[i][1])


def test_pruning_and_merging_by_hand() -> None:
    score = torch.tensor([[0.0, 0.4, 0.1, 0.3, 0.2]])
    assert pruned(score, 3, None).tolist() == [[0, 1, 3]]  # the class token, though nobody asks for it
    assert pruned(score, 3, torch.tensor([[True, False, True, True, True]])).tolist() == [[0, 3, 4]]


def test_pruning_does_not_need_merging_in_either_model() -> None:
    """In the published METER nothing is pruned where nothing is merged: said on the page, in no setting."""
    for paper in (False, True):
        assert Ratios(0.3, 0.0, 0.2, paper).image(577) == (404, 0)


def test_a_token_merged_with_padding_keeps_its_share_of_weight_as_published() -> None:
    x = torch.tensor([[[10.0], [1.0], [3.0], [5.0]]])
    matching = Matching(rest=torch.tensor([[0, 1]]), merged=torch.tensor([[2, 3]]), into=torch.tensor([[1, 1]]))
    once = plain_change(Stream(x, torch.tensor([[True, True, True, False]])), matching)
    assert once.of(x).flatten().tolist() == [10.0, 3.0]
    assert once.mask is not None
    assert once.mask.exp().flatten().tolist() == pytest.approx([1, 2 / 3])
    both = Matching(rest=torch.tensor([[0]]), merged=torch.tensor([[1]]), into=torch.tensor([[0]]))
    twice = plain_change(once.stream(Stream(x, None)), both)
    assert twice.mask is not None
    assert twice.mask.exp().item() == pytest.approx(5 / 6)  # the mean of 1 and 2/3, not that of their logarithms
    hidden = plain_change(Stream(x, torch.tensor([[True, False, False, False]])), matching)
    assert hidden.mask is not None
    assert hidden.mask.tolist() == [[0.0, HIDDEN]]  # finite: a row of nothing else would be nan
    assert plain_change(Stream(x, None), matching).mask is None
