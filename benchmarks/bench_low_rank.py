"""At which sequence length each attention without an N by N map begins to pay, against fused exact attention.

    python -m benchmarks.bench_low_rank [--device cuda --dtype bfloat16] [--threads 1] [--batch 1] [--tokens 197 577]

Run from the repository root. ``mix`` is what stands between queries, keys, values and the projection; ``block`` is a whole
block of ViT-B (width 768, 12 heads of 64, MLP of 3072) at inference. All attentions of one length take turns in one run,
the order reversed every other round; ``speed`` is how many times as fast as scaled_dot_product_attention, the median of the
paired ratios with its 95 % bootstrap interval. 197, 577, 1025 and 2305 tokens are 224, 384, 512 and 768 pixels in patches
of 16 with a class token. One JSON object a line: the machine, every measurement, and last the shortest length at which an
attention's whole interval is above 1 (and stays so for the longer ones).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from workers.measuring.counting import FORMULAS
from workers.measuring.timing import blocked, interleaved, paired_ratio
from workers.techniques.low_rank.linformer import LinformerAttention, Projection, segment_projection
from workers.techniques.low_rank.nystrom import NystromAttention
from workers.techniques.low_rank.performer import PerformerAttention
from workers.techniques.low_rank.scatterbrain import ScatterbrainAttention
from workers.techniques.low_rank.shared_random_features import feature_count, orthogonal_projection

WIDTH, HEADS, PREFIX = 768, 12, 1
TOKENS = (197, 577, 1025, 2305)
EXACT = "exact"


def attentions(attn: Any, tokens: int) -> dict[str, nn.Module]:
    """Returns every attention that makes sense at this length, by name, around the weights of ``attn``."""
    D = WIDTH // HEADS

    def projection(share: float) -> Tensor:
        drawn = orthogonal_projection(feature_count(D, share), D, torch.Generator().manual_seed(0))
        return drawn.to(attn.qkv.weight.device)

    found: dict[str, nn.Module] = {EXACT: attn}
    for landmarks, iterations in ((64, 6), (32, 2)):
        found[f"nystrom m={landmarks} i={iterations}"] = NystromAttention(attn, landmarks, iterations)
    for share in (1.0, 0.5):
        found[f"performer m={feature_count(D, share)}"] = PerformerAttention(attn, projection(share))
    for k in (64, 256):
        if k < tokens:
            one = Projection(segment_projection(k, tokens, PREFIX)).to(attn.qkv.weight)
            found[f"linformer k={k}"] = LinformerAttention(attn, one, one)
    for window in (14, 32):
        found[f"scatterbrain w={window} m={feature_count(D, 0.5)}"] = ScatterbrainAttention(
            attn, projection(0.5), window, PREFIX
        )
    return found


def mixes(modules: dict[str, nn.Module], x: Tensor) -> dict[str, Callable[[Tensor], object]]:
    """Returns the part between heads and projection of every attention, on fixed queries, keys and values of x."""
    any_low_rank: Any = next(m for name, m in modules.items() if name != EXACT)
    with torch.inference_mode():
        q, k, v = any_low_rank.split(x)
    calls: dict[str, Callable[[Tensor], object]] = {EXACT: lambda _: F.scaled_dot_product_attention(q, k, v)}
    for name, module in modules.items():
        if name != EXACT:
            attention: Any = module
            calls[name] = lambda _, attention=attention: attention.mix(q, k, v)
    return calls


def whole_blocks(block: Any, modules: dict[str, nn.Module]) -> dict[str, Callable[[Tensor], object]]:
    """Returns a block with each attention; the other weights are shared."""
    calls: dict[str, Callable[[Tensor], object]] = {}
    for name, module in modules.items():
        with_it = copy.copy(block)
        with_it._modules = {**block._modules, "attn": module}
        calls[name] = with_it
    return calls


def macs(call: Callable[[Tensor], object], x: Tensor) -> int:
    """Returns the multiply-accumulates of one call."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    with torch.inference_mode(), counter:
        call(x)
    return int(counter.get_total_flops()) // 2


def machine(device: torch.device) -> dict[str, object]:
    """Returns what the numbers depend on besides the code."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def main() -> None:
    """Prints the machine, one line a measurement, and the lengths from which each attention pays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--window-s", type=float, default=0.0, help="seconds each attention is timed for, at least")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    print(json.dumps({**machine(device), "dtype": options.dtype, "batch": options.batch}), flush=True)
    above: dict[tuple[str, str], dict[int, bool]] = {}
    for tokens in sorted(options.tokens):
        torch.manual_seed(0)
        block = Block(WIDTH, HEADS, qkv_bias=True).eval().to(device, dtype)
        x = torch.randn(options.batch, tokens, WIDTH).to(device, dtype)
        modules = attentions(block.attn, tokens)
        for scope, calls in (("mix", mixes(modules, x)), ("block", whole_blocks(block, modules))):
            print(f"{tokens} tokens, {scope}: {len(calls)} attentions", file=sys.stderr, flush=True)
            with torch.inference_mode():
                arms = [blocked(call, x) for call in calls.values()]
            seconds = interleaved(arms, window_s=options.window_s, pairs=options.rounds, warmup=2)
            for index, (name, call) in enumerate(calls.items()):
                speed, low, high = paired_ratio(seconds[:, 0], seconds[:, index], 2000)
                above.setdefault((scope, name), {})[tokens] = low > 1
                print(
                    json.dumps(
                        {
                            "tokens": tokens,
                            "scope": scope,
                            "attention": name,
                            "ms_p50": round(1e3 * float(sorted(seconds[:, index])[len(seconds) // 2]), 3),
                            "speed": round(speed, 3),
                            "low": round(low, 3),
                            "high": round(high, 3),
                            "macs": macs(call, x) // options.batch,
                        }
                    ),
                    flush=True,
                )
    for (scope, name), pays in above.items():
        longest_without = max((tokens for tokens, paid in pays.items() if not paid), default=0)
        begins = min((tokens for tokens in pays if tokens > longest_without), default=None)
        if name != EXACT:
            print(json.dumps({"scope": scope, "attention": name, "pays_from_tokens": begins}), flush=True)


if __name__ == "__main__":
    main()
