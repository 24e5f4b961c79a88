"""Token merging on full-size models against the best way to run them unmerged, with the published ratios beside.

    python -m benchmarks.bench_tome [--quick] [--device cuda] [--threads 2] [--compile] [--window-s 10]

Run from the repository root; needs torch, timm and the workers package only. ViT-B/16 at 224 pixels and ViT-L/16 at 384, with
random weights; how it is measured: :mod:`benchmarks.reduction_tables`. Prints the machine as one JSON line, then a Markdown
table for each model and kind of speed. --quick: ViT-B/16 alone, small batches, few rounds.

Source of the published ratios: ToMe (arXiv 2210.09461) on a V100 in fp32, from images/s in the tables of its repository:
ViT-B/16 309 to 511 (r=13) and 603 (r=16, trained with MAE), ViT-L/16 at 384 pixels 28 to 56 (r=23). No figure is known to us
for the other rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.reduction_tables import Case, Recipe, main
from workers.tasks import TaskInfo
from workers.techniques.tokens.tome import reductions, token_counts

BATCHES = {"batch_step": 32}
"""Of the batch sizes: in the protocol's steps of 8 a GPU gains less than 1 % twice long before it is full."""


def tokens_left(model: Any, label: str) -> int:
    """Returns the tokens after the last block."""
    tokens, prefix = model.patch_embed.num_patches + model.num_prefix_tokens, model.num_prefix_tokens
    if not label.startswith("r="):
        return int(tokens)
    return token_counts(tokens, prefix, reductions(int(label[2:]), 0, len(model.blocks)))[-1]


def case(name: str, size: int, merged: tuple[int, ...], published: Mapping[str, float]) -> Case:
    """Returns the case of one ViT with 1,000 classes."""
    info = TaskInfo(num_classes=1000, in_chans=3, image_size=size, class_names=())
    recipes: dict[str, Recipe] = {f"r={r}": (("tome", {"r": r}),) for r in merged}
    model = {"family": "timm", "name": name, "create": {}}
    return Case(f"{name}, {size} px", model, info, recipes, published, BATCHES, tokens_left)


CASES = (
    case("vit_base_patch16_224", 224, (8, 13, 16), {"r=13": 511 / 309, "r=16": 603 / 309}),
    case("vit_large_patch16_384", 384, (8, 13, 16, 23), {"r=23": 56 / 28}),
)

if __name__ == "__main__":
    main(__doc__, CASES, quick=1)
