"""Blocks with fewer tokens: the shared attention, scores and masks against explicit softmax, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.workers.techniques.models import images, surroundings, vit
from workers.techniques.tokens import dynamicvit, evit, tome
from workers.techniques.tokens.shared_blocks import (
    Tokens,
    attend,
    best_first,
    key_bias,
    pooled,
    pools_by_mean,
    readers,
    rows,
    spread_layers,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sizes(batch: int, tokens: int) -> Tensor:
    return torch.randint(1, 5, (batch, tokens, 1), generator=torch.Generator().manual_seed(2)).float()


def explicit(attn: Any, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one image by its formula: x (N, C), key weights (N,); returns output and map (H, N, N)."""
    n = len(x)
    q, k, v = attn.qkv(x).reshape(n, 3, 4, 8).permute(1, 2, 0, 3).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    raw = (q @ k.transpose(-1, -2) * 8**-0.5).exp() * weights
    weighed = raw / raw.sum(-1, keepdim=True)
    return attn.proj((weighed @ v).transpose(0, 1).reshape(n, 32)), weighed


def test_rows_are_those_of_the_index() -> None:
    x = random(3, 7, 4).double().requires_grad_()
    index = torch.tensor([[0, 6, 6], [1, 2, 3], [5, 4, 0]])
    assert torch.equal(rows(x, index), torch.stack([x[b, i] for b, i in enumerate(index)]))
    assert torch.autograd.gradcheck(lambda t: rows(t, index), (x,))


def test_equal_scores_keep_their_order() -> None:
    assert best_first(torch.tensor([[1.0, 3.0, 1.0, 3.0]])).tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize(
    ("depth", "start", "stages", "layers"),
    [
        (12, 0.25, 3, [3, 6, 9]),
        (24, 0.25, 3, [6, 12, 18]),
        (12, 0.0, 4, [0, 3, 6, 9]),
        (4, 0.25, 3, [1, 2, 3]),
        (3, 0.25, 3, [0, 1, 2]),
        (2, 0.25, 3, [0, 1]),
        (1, 0.25, 3, [0]),
    ],
)
def test_layers_are_spread_over_the_depth(depth: int, start: float, stages: int, layers: list[int]) -> None:
    assert spread_layers(depth, start, stages) == layers


@pytest.mark.parametrize("variant", ["class", "qk_norm"])
def test_sizes_are_weights_of_keys(variant: str) -> None:
    attn = vit(variant).blocks[0].attn
    x, size = random(2, 9, 32), sizes(2, 9)
    out, _ = attend(attn, x, key_bias(Tokens(x, size=size)))
    for b in range(2):
        torch.testing.assert_close(out[b], explicit(attn, x[b], size[b, :, 0])[0], atol=1e-6, rtol=1e-5)


def test_a_key_of_size_s_acts_as_s_duplicates() -> None:
    attn = vit().blocks[0].attn.double()
    x = random(2, 6, 32).double()
    times = torch.tensor([1, 3, 1, 2, 5, 1])
    size = times.double()[None, :, None].expand(2, -1, -1)
    want = attn(x.repeat_interleave(times, dim=1))[:, [0, 1, 4, 5, 7, 12]]
    out, _ = attend(attn, x, key_bias(Tokens(x, size=size)))
    assert (out - want).abs().max() < 1e-6


@pytest.mark.parametrize("changes", [{"gated": True}, {"scale_attn_norm": True}, {"attn_drop_rate": 0.5}])
def test_without_a_bias_it_is_timm_s_attention(changes: dict[str, Any]) -> None:
    from timm.layers import Attention

    torch.manual_seed(0)
    x = random(2, 9, 32)
    attn: Any = Attention(32, 4, gated=True).eval() if "gated" in changes else vit(**changes).blocks[0].attn
    for mode in (True, False):
        attn.train(mode)
        torch.manual_seed(1)
        want = attn(x)
        torch.manual_seed(1)
        torch.testing.assert_close(attend(attn, x, None)[0], want)


def test_another_attention_is_an_error_and_not_another_result() -> None:
    with pytest.raises(TypeError, match="found Identity"):
        attend(torch.nn.Identity(), random(1, 2, 4), None)


@pytest.mark.parametrize("asking", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_received_is_a_row_of_the_map(asking: int, masked: bool) -> None:
    attn = vit("qk_norm").blocks[0].attn
    x, size, prefix = random(2, 11, 32), sizes(2, 11), 3
    kept = torch.ones(2, 11, 1)
    if masked:
        kept[0, 5], kept[1, 9] = 0, 0
    tokens = Tokens(x, size=size, kept=kept)
    _, seen = attend(attn, x, key_bias(tokens))
    got = seen.received(asking, tokens, prefix)
    for b in range(2):
        weights = (size * kept)[b, :, 0]
        if asking:
            want = explicit(attn, x[b], weights)[1][:, :asking, prefix:].mean(dim=(0, 1))
        else:  # the mean query, by hand
            q, k, _ = attn.qkv(x[b]).reshape(11, 3, 4, 8).permute(1, 2, 0, 3).unbind(0)
            q, k = attn.q_norm(q)[:, prefix:], attn.k_norm(k)
            mean = (q * weights[prefix:, None]).sum(1) / weights[prefix:].sum()
            raw = ((mean[:, None] * k).sum(-1) * 8**-0.5).exp() * weights
            want = (raw / raw.sum(-1, keepdim=True))[:, prefix:].mean(0)
        torch.testing.assert_close(got[b], want, atol=2e-6, rtol=1e-5)


def test_a_masked_token_is_as_good_as_removed() -> None:
    attn = vit().blocks[0].attn
    x, size, left = random(2, 9, 32), sizes(2, 9), [0, 1, 3, 4, 7]
    kept = torch.zeros(2, 9, 1)
    kept[:, left] = 1
    masked, _ = attend(attn, x, key_bias(Tokens(x, size=size, kept=kept)))
    removed, _ = attend(attn, x[:, left], key_bias(Tokens(x[:, left], size=size[:, left])))
    torch.testing.assert_close(masked[:, left], removed, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_a_mask_is_that_of_the_masked_softmax() -> None:
    """At 0 too, where a logarithm alone would give NaN: exp(l_j) m_j / sum exp(l_k) m_k."""
    attn = vit().blocks[0].attn.double()
    x, weight = random(1, 6, 32).double(), random(1, 6, 32, seed=1).double()
    kept = torch.tensor([1, 0, 1, 1, 0, 1]).double()[None, :, None].requires_grad_()
    out, _ = attend(attn, x, key_bias(Tokens(x, kept=kept)))
    (got,) = torch.autograd.grad((out * weight).sum(), kept)

    def value(mask: Tensor) -> float:
        with torch.no_grad():
            return float((explicit(attn, x[0], mask)[0] * weight[0]).sum())

    for j in range(6):
        step = torch.zeros(6).double()
        step[j] = 1e-5
        base = kept.detach()[0, :, 0]
        slope = (value(base + step) - value(base)) / 1e-5
        assert float(got[0, j, 0]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_the_pooled_mean_counts_sizes_and_not_what_is_masked() -> None:
    x, size = random(1, 5, 3), torch.tensor([1.0, 2, 1, 4, 3])[None, :, None]
    kept = torch.tensor([1.0, 1, 0, 1, 1])[None, :, None]
    out = pooled(Tokens(x, size=size, kept=kept), 1)
    assert out.shape == (1, 2, 3)
    torch.testing.assert_close(out[:, 0], x[:, 0])
    torch.testing.assert_close(out[:, 1], (2 * x[:, 1] + 4 * x[:, 3] + 3 * x[:, 4]) / 9)


# --- models -----------------------------------------------------------------------------------------------------------


def test_what_the_classifier_reads_asks() -> None:
    asking = {v: readers(vit(v)) for v in ("class", "distil", "registers", "average")}
    assert asking == {"class": 1, "distil": 2, "registers": 1, "average": 0}
    assert readers(vit(global_pool="avg")) == 0  # a class token that nothing reads does not ask


def test_only_a_mean_before_the_last_norm_is_a_mean_of_any_number_of_tokens() -> None:
    assert pools_by_mean(vit("average"), "t")
    assert not pools_by_mean(vit("distil"), "t")
    for changes in ({"fc_norm": False}, {"global_pool": "max"}, {"pool_include_prefix": True}):
        with pytest.raises(ValueError, match="t: the model must read its class token, or average"):
            pools_by_mean(vit(**{"global_pool": "avg", **changes}), "t")


@pytest.mark.parametrize("technique", [tome, evit, dynamicvit], ids=lambda m: m.TECHNIQUE.name)
def test_checkpointing_changes_no_gradient(technique: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = vit(drop_path_rate=0.3)
        technique.TECHNIQUE.apply(model, technique.Config(), surroundings(model))
        model.train().blocks.grad_checkpointing = checkpointing
        torch.manual_seed(3)
        model(images()).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_blocks_alone_would_pass_by_the_reduction_and_are_refused() -> None:
    model = vit()
    tome.TECHNIQUE.apply(model, tome.Config(), surroundings(model))
    for call in (
        lambda: model.blocks[0](random(1, 17, 32)),
        lambda: model.forward_intermediates(images()),
        lambda: model(images(), is_causal=True),
    ):
        with pytest.raises(RuntimeError, match="passes by the reduction"):
            call()
    model.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match=r"set model\.blocks\.grad_checkpointing"):
        model.train()(images())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("technique", [tome, evit, dynamicvit], ids=lambda m: m.TECHNIQUE.name)
def test_the_mode_of_the_model_stays(technique: Any, mode: bool) -> None:
    model = vit().train(mode)
    technique.TECHNIQUE.apply(model, technique.Config(), surroundings(model))
    assert {part.training for part in model.modules()} == {mode}


def test_a_model_under_checkpointing_is_refused() -> None:
    model = vit()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="evit: gradient checkpointing must be off"):
        evit.TECHNIQUE.apply(model, evit.Config(), surroundings(model))
