"""timm's blocks run with fewer tokens from block to block: what the token reducing techniques share.

A technique says in a subclass of :class:`TokenBlocks` what happens to the tokens of a block; attention stays fused in all
of them. Prefix tokens (class, distillation, register) come first and are never removed.

While a choice of tokens is being learned none is removed: ``kept`` masks them, so that gradients reach the choice, and the
attention of the others to them is scaled down by :data:`NEVER`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workers.models import model_info
from workers.techniques.record import ModelInfo, Rule

NEVER = 1e-6
"""Weight of a masked key beside 1 for the others: its logarithm is finite, hence also its gradient."""


NEEDS_ATTENTION_MAP = Rule(("low_rank_attention",), "forbidden", "low-rank attention has no attention map to score by")
"""Of every technique that scores tokens by the attention they get."""


# --- sequences --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The sequence between two blocks.

    Attributes:
        x: (B, N, C).
        size: (B, N, 1) float32, how many original tokens each stands for; None where each stands for itself.
        row: (B, N0) int64, the row in which each original token is now; None where nothing keeps count.
        kept: (B, N, 1) float32 of 0 and 1, only while a choice is learned.
        decided: every ``kept`` so far, for losses.
    """

    x: Tensor
    size: Tensor | None = None
    row: Tensor | None = None
    kept: Tensor | None = None
    decided: tuple[Tensor, ...] = ()

    def weights(self) -> Tensor:
        """Returns (B, N, 1) float32: the size of each token, 0 where it is masked."""
        ones = torch.ones(*self.x.shape[:2], 1, device=self.x.device)
        return (ones if self.size is None else self.size) * (1 if self.kept is None else self.kept)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Returns the rows ``index`` (B, M) int64 of x (B, N, C): (B, M, C); on a CPU four times as fast as a gather."""
    B, N, C = x.shape
    start = torch.arange(B, device=x.device)[:, None] * N
    return x.reshape(B * N, C).index_select(0, (index + start).flatten()).view(B, index.shape[1], C)


def best_first(score: Tensor) -> Tensor:
    """Returns (B, N) int64: the positions of score (B, N), best first; equal scores keep their order."""
    return score.argsort(dim=-1, descending=True, stable=True)


def pooled(tokens: Tokens, prefix: int) -> Tensor:
    """Returns (B, prefix + 1, C): the prefix tokens and the weighted mean of the others, for models that pool by a mean."""
    weights = tokens.weights()[:, prefix:]
    mean = (tokens.x[:, prefix:] * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
    return torch.cat([tokens.x[:, :prefix], mean.to(tokens.x.dtype)], dim=1)


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What an attention compared.

    Attributes:
        q, k: (B, H, N, D), normalised where the attention does that.
        bias: (B, 1, 1, N) added to the scaled logits, or None.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None
    scale: float

    def received(self, readers: int, tokens: Tokens, prefix: int) -> Tensor:
        """Returns (B, N - prefix) float32: the attention that each patch token gets, mean over heads and askers.

        Costs one row of the attention map a head and asker, beside the fused attention that does not give its map out.

        Args:
            readers: leading tokens that ask because the classifier reads them; 0 for models that pool over patch
                tokens, where the mean of their queries asks.
        """
        asking = self.q[:, :, :readers]
        if readers == 0:
            weights = tokens.weights()[:, None, prefix:]
            asking = (self.q[:, :, prefix:] * weights).sum(dim=2, keepdim=True) / weights.sum(dim=2, keepdim=True)
        logits = (asking.to(self.k.dtype) @ self.k.transpose(-1, -2)).float() * self.scale
        if self.bias is not None:
            logits = logits + self.bias.float()
        return logits.softmax(dim=-1)[..., prefix:].mean(dim=(1, 2))


def key_bias(tokens: Tokens) -> Tensor | None:
    """Returns (B, 1, 1, N) float32, which weighs keys by size and hides masked ones; None where there is neither.

    softmax(q k + log s) counts a key of size s as s equal keys.
    """
    if tokens.size is None and tokens.kept is None:
        return None
    bias = 0 if tokens.size is None else tokens.size.log()
    if tokens.kept is not None:
        bias = bias + (tokens.kept + NEVER).log()
    return cast(Tensor, bias).transpose(1, 2)[:, None]


def attend(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Seen]:
    """Computes timm's ``Attention.forward`` with a bias on the keys.

    Args:
        attn: a timm ``Attention``; its own num_heads and head_dim are used (pruned models differ).
        x: (B, N, C); bias: (B, 1, 1, N) or None.

    Returns:
        output (B, N, C), and what was compared.

    Raises:
        TypeError: another attention, which computes something else.
    """
    if hasattr(attn, "attend_quantised"):
        out, q, k = attn.attend_quantised(x, bias)
        return out, Seen(q, k, bias, attn.scale)
    if not isinstance(attn, Attention):
        raise TypeError(f"tokens are weighed and ranked by timm's Attention, found {type(attn).__name__}")
    B, N, _ = x.shape
    gate = attn.gate(x).sigmoid() if attn.gate is not None else None
    q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    mask = None if bias is None else bias.to(q.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=attn.scale)
    out = attn.norm(out.transpose(1, 2).reshape(B, N, attn.attn_dim))
    out = attn.proj(out if gate is None else out * gate)
    return attn.proj_drop(out), Seen(q, k, bias, attn.scale)


# --- blocks -----------------------------------------------------------------------------------------------------------


class TokenBlocks(nn.ModuleList, ABC):
    """timm's ``blocks`` with fewer tokens from one to the next: the same children under the same names.

    Args:
        blocks: timm ``Block`` modules; from here on they run only as parts of this one.
        prefix: protected tokens in front.

    Attributes:
        grad_checkpointing: calculate each block again in the backward pass. timm's own switch passes by this module.
    """

    def __init__(self, blocks: Iterable[nn.Module], prefix: int) -> None:
        super().__init__(blocks)
        self.prefix = prefix
        self.grad_checkpointing = False
        self.training = all(block.training for block in self)  # a new module would be in training mode
        for block in self:
            block.register_forward_pre_hook(_refuse)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the blocks on x (B, N, C); returns (B, N', C)."""
        tokens = Tokens(x)
        for i, block in enumerate(self):
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(self.run, i, block, tokens, use_reentrant=False)
            else:
                tokens = self.run(i, block, tokens)
        return self.finish(tokens)

    def run(self, i: int, block: Any, tokens: Tokens) -> Tokens:
        """Runs block i: timm's ``Block.forward`` with :meth:`enter` before it and :meth:`reduce` in its middle."""
        tokens = self.enter(i, block, tokens)
        out, seen = self.attend(block.attn, block.norm1(tokens.x), tokens)
        tokens = self.reduce(i, block, replace(tokens, x=tokens.x + block.drop_path1(block.ls1(out))), seen)
        return replace(tokens, x=tokens.x + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens.x)))))

    def enter(self, i: int, block: Any, tokens: Tokens) -> Tokens:
        """Changes the tokens before block i."""
        return tokens

    def attend(self, attn: Any, x: Tensor, tokens: Tokens) -> tuple[Tensor, Any]:
        """Attends over x (B, N, C), the normalised tokens; returns the output and what :meth:`reduce` needs of it."""
        return attend(attn, x, key_bias(tokens))

    @abstractmethod
    def reduce(self, i: int, block: Any, tokens: Tokens, seen: Any) -> Tokens:
        """Changes the tokens between the attention and the MLP of block i."""

    def finish(self, tokens: Tokens) -> Tensor:
        """Returns what timm's norm and head get."""
        return tokens.x


def _refuse(block: nn.Module, args: object) -> None:
    raise RuntimeError(
        "a block was called by itself, which passes by the reduction of its tokens; call the model. For gradient "
        "checkpointing set model.blocks.grad_checkpointing; attention masks and intermediate features are not possible"
    )


# --- models -----------------------------------------------------------------------------------------------------------


def blocks_fault(info: ModelInfo) -> str | None:
    """Returns why tokens cannot be removed between or inside a model's blocks, or None."""
    if info.block == "Block" and info.attention == "Attention":
        return None
    return f"tokens are removed in timm's Block with its Attention; here are {info.block} with {info.attention}"


def pooling_fault(info: ModelInfo) -> str | None:
    """Returns why a mean over fewer tokens, weighted or not, cannot take the place of what the model pools, or None."""
    by_mean = info.pooling == "avg" and not info.norm_before_pool and not info.pools_prefix
    if info.pooling == "token" or by_mean:
        return None
    where = "after" if info.norm_before_pool else "before"
    prefix = ", prefix tokens among them" if info.pools_prefix else ""
    return (
        f"the model must read its class token, or average its patch tokens before its last norm; here it pools "
        f"by {info.pooling!r} {where} it{prefix}"
    )


def require_blocks(model: nn.Module, technique: str) -> None:
    """Refuses blocks whose forward :class:`TokenBlocks` does not know.

    Raises:
        ValueError: naming the block, or for gradient checkpointing that is on already.
    """
    vit: Any = model  # timm is not typed
    for name, block in vit.blocks.named_children():
        if not isinstance(block.attn, Attention) or not hasattr(block, "drop_path2"):
            raise ValueError(
                f"{technique}: blocks.{name} must be timm's Block with timm's Attention, "
                f"found {type(block).__name__} with {type(block.attn).__name__}"
            )
    if vit.grad_checkpointing:
        raise ValueError(
            f"{technique}: gradient checkpointing must be off, it passes by the reduction; "
            "set model.blocks.grad_checkpointing afterwards"
        )


def readers(model: nn.Module) -> int:
    """Returns how many leading tokens the classifier reads: class and distillation token; 0 where it pools over patches."""
    vit: Any = model
    if vit.global_pool != "token":
        return 0
    return 2 if hasattr(vit, "dist_token") else 1


def pools_by_mean(model: nn.Module, technique: str) -> bool:
    """Returns whether the model averages its patch tokens (True) or reads its prefix tokens (False).

    Raises:
        ValueError: it does anything else, which a changing number of tokens would change.
    """
    info = model_info(model)
    if reason := pooling_fault(info):
        raise ValueError(f"{technique}: {reason}")
    return info.pooling != "token"


def spread_layers(depth: int, start: float, stages: int) -> list[int]:
    """Returns the blocks that reduce: ``stages`` of them from the share ``start`` of the depth on, evenly to its end.

    12 blocks, start 0.25 and 3 stages give 3, 6, 9. Blocks that would coincide in a shallow model are one.
    """
    return sorted({int(depth * (start + (1 - start) * i / stages) + 1e-9) for i in range(stages)})
