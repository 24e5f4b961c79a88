"""Which quantisers survive LayerNorm outputs of which a few channels are far larger than the others, as published ViTs have them.

    python -m benchmarks.bench_skewed_norms [--times 50] [--channels 4] [--seeds 3] [--epochs 20]

Run from the repository root. A small ViT is trained on the digits. Then, in every block, some channels of what both norms give out are
made so many times larger and the columns of the linear layers that read them so many times smaller: the model computes the same.
Every quantiser is applied to the model as it was and to the skewed one. ``top-1`` is of the search split, ``off`` how far the
logits move, as a share of them (root mean square). A table in Markdown, means over the seeds; nothing is timed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from workers import evaluation, models, tasks
from workers.tasks.batches import TaskData
from workers.techniques import registry
from workers.techniques.quantisation.shared_affine import linears
from workers.techniques.quantisation.shared_integer_linear import IntegerLinear
from workers.techniques.quantisation.shared_norm_folding import fold_, pairs
from workers.techniques.record import Surroundings, make_config
from workers.training import loop

MODEL = {
    "family": "timm",
    "name": None,
    "create": {"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "pos_embed_std": 0.5},
}
TRAINING = {
    "batch_size": 64,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup_fraction": 0.1,
    "optimizer": "adamw",
    "schedule": "cosine",
    "grad_clip": 1.0,
}
TOKEN = "int8, a scale a token"
"""No technique: what smoothquant does after the smoothing, by itself."""

RECIPES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("precision", {}),
    ("fp8", {}),
    ("weight_only", {"bits": 8}),
    ("weight_only", {"bits": 4}),
    ("gptq", {"bits": 4}),
    ("dynamic_int8", {}),
    ("static_int8", {"observer": "minmax"}),
    ("static_int8", {"observer": "percentile", "percentile": 99.99}),
    ("static_int8", {"observer": "percentile", "percentile": 99.0}),
    ("fq_vit", {"attention_bits": 8, "power_of_two_factor": False}),
    ("fq_vit", {"attention_bits": 8}),
    ("fq_vit", {}),
    (TOKEN, {}),
    ("smoothquant", {"alpha": 0.0, "activations": "token"}),
    ("smoothquant", {"alpha": 0.5, "activations": "token"}),
    ("smoothquant", {"alpha": 0.5, "activations": "static"}),
    ("smoothquant", {"alpha": 0.8, "activations": "token"}),
    ("repq_vit", {"weight_bits": 8, "activation_bits": 8}),
    ("repq_vit", {"weight_bits": 6, "activation_bits": 6}),
)


def skew_(model: Any, channels: int, times: float, seed: int) -> Any:
    """Makes drawn channels behind every norm of the blocks ``times`` larger and what reads them smaller, in place."""
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs(model):
        factor = torch.ones(model.embed_dim)
        factor[torch.randperm(len(factor), generator=generator)[:channels]] = 1 / times
        fold_(model, pair, factor)
    return model


def surroundings(data: TaskData, model: Any, seed: int) -> Surroundings:
    """What a technique may use in a trial of this seed."""

    def batches() -> Iterator[tuple[Any, Tensor]]:
        for _, inputs, targets in data.train.batches(64, shuffle_seed=seed):
            yield inputs, targets

    return Surroundings(
        torch.device("cpu"), seed, torch.Generator().manual_seed(seed), batches, lambda: copy.deepcopy(model)
    )


def quantised(model: Any, name: str, values: dict[str, Any], data: TaskData, seed: int) -> Any:
    """Returns the model after the technique; the one given stays as it is."""
    if name == TOKEN:
        changed = copy.deepcopy(model)
        for layer, linear in linears(changed, skip_head=False).items():
            changed.set_submodule(layer, IntegerLinear.of(linear))
        return changed.eval()
    technique = registry()[name]
    config = make_config(technique.Config, values)
    applied = technique.apply(copy.deepcopy(model), config, surroundings(data, model, seed))
    return applied.model.eval()


def judged(model: Any, data: TaskData, expected: Tensor) -> tuple[float, float]:
    """Returns top-1 in per cent, and how far the logits are from ``expected`` (N, classes)."""
    logits = evaluation.predict_logits(model, data.search, device="cpu")
    top1 = evaluation.evaluate(model, data.search, device="cpu").accuracies[0].pct
    return top1, float((logits - expected).norm() / expected.norm())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=50.0)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = tasks.load({"kind": "digits"})
    found: dict[int, list[list[float]]] = {i: [] for i in range(-1, len(RECIPES))}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        trained = models.build(MODEL, data.info)
        settings = {**TRAINING, "epochs": options.epochs}
        loop.train(trained, data.train, settings, seed=seed, device="cpu")
        expected = evaluation.predict_logits(trained, data.search, device="cpu")
        arms = [trained, skew_(copy.deepcopy(trained), options.channels, options.times, seed)]
        found[-1].append([x for arm in arms for x in judged(arm, data, expected)])
        for i, (name, values) in enumerate(RECIPES):
            print(f"seed {seed}: {name} {values}", file=sys.stderr, flush=True)
            found[i].append(
                [x for arm in arms for x in judged(quantised(arm, name, values, data, seed), data, expected)]
            )
    print("| | top-1, % | off | skewed: top-1, % | off |\n|---|---|---|---|---|")
    for i, rows in found.items():
        name, values = RECIPES[i] if i >= 0 else ("not quantised", {})
        shown = f"`{name}`" if name in registry() else name
        label = ", ".join([shown, *(f"{key} {value}" for key, value in values.items())])
        a, b, c, d = (mean(column) for column in zip(*rows, strict=True))
        print(f"| {label} | {a:.1f} | {b:.3f} | {c:.1f} | {d:.3f} |")


if __name__ == "__main__":
    main()
