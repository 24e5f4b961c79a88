"""PuMer and what it is compared with on full-size ViLT and METER, against the best way to run them whole.

    python -m benchmarks.bench_pumer [--quick] [--only vilt] [--device cuda] [--threads 2] [--peak-memory 4]

Run from the repository root; needs torch, timm, transformers and the workers package only. ViLT-B/32 and METER-CLIP-ViT-B/16
at 384 pixels with 32 text tokens and random weights, PuMer's published configurations and what has about as many MACs; how it is measured:
:mod:`benchmarks.reduction_tables`. Prints the machine as one JSON line, then a Markdown table for each model and kind of
speed, or with --peak-memory of the peak memory of one inference at that batch. --quick: small batches, few rounds.

Source of configurations and published ratios: PuMer (arXiv 2305.17530), section 5 and tables 2 to 4, measured there on
fine-tuned models.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.reduction_tables import Case, Recipe, main
from workers.tasks import TaskInfo, TextInfo

TEXT_TOKENS = 32
SIDE = 384


def pumer(prune: float, image: float, text: float, layers: str) -> Recipe:
    """Returns one of the paper's configurations."""
    return (("pumer", {"prune": prune, "image_merge": image, "text_merge": text, "layers": layers}),)


VILT: Mapping[str, Recipe] = {
    "pumer .1/.3/.2 at 2,5,8": pumer(0.1, 0.3, 0.2, "2,5,8"),
    "pumer .1/.3/.2 at 2,4,6,8": pumer(0.1, 0.3, 0.2, "2,4,6,8"),
    "pumer without pruning": pumer(0.0, 0.3, 0.2, "2,5,8"),
    "pumer without merging": pumer(0.1, 0.0, 0.0, "2,5,8"),
    "dynamicvit, keep .5": (("dynamicvit", {"keep": 0.5, "layers": "2,5,8"}),),
    "tome, r=14 a layer": (("tome", {"r": 14}),),
    "resolution 256": (("resolution", {"ratio": 0.625}),),
    "resolution 320": (("resolution", {"ratio": 0.8125}),),
}
METER: Mapping[str, Recipe] = {
    "pumer .2/.2/.2 at 0,2,4,6": pumer(0.2, 0.2, 0.2, "0,2,4,6"),
    "pumer .3/.5/.2 at 0,2,4,6": pumer(0.3, 0.5, 0.2, "0,2,4,6"),
    "pumer .3/.5/.2 at 2,4,6": pumer(0.3, 0.5, 0.2, "2,4,6"),
    "pumer without pruning": pumer(0.0, 0.2, 0.2, "0,2,4,6"),
    "pumer without merging": pumer(0.2, 0.0, 0.0, "0,2,4,6"),
    "dynamicvit, keep .55": (("dynamicvit", {"keep": 0.55, "layers": "0,2,4,6"}),),
    "tome in the fusion, r=100 decreasing": (("tome", {"r": 100, "schedule": "decreasing"}),),
    "tome in the image tower, r=16": (("tome", {"r": 16, "where": "image_tower"}),),
    "resolution 320": (("resolution", {"ratio": 0.8125}),),
    "resolution 320 + pumer .2/.2/.2": (("resolution", {"ratio": 0.8125}), *pumer(0.2, 0.2, 0.2, "0,2,4,6")),
}

PUBLISHED = {
    "vilt": {"pumer .1/.3/.2 at 2,5,8": 1.76},
    "meter": {"pumer .2/.2/.2 at 0,2,4,6": 1.82, "resolution 320": 1.62, "resolution 320 + pumer .2/.2/.2": 2.86},
}
"""Of VQAv2: throughput over the whole model."""


def case(
    family: str, name: str, recipes: Mapping[str, Recipe], vocabulary: int, pad: int, batches: Mapping[str, int]
) -> Case:
    """Returns a full-size model with VQAv2's 3,129 answers."""
    text = TextInfo(vocabulary, TEXT_TOKENS, pad)
    info = TaskInfo(num_classes=3129, in_chans=3, image_size=SIDE, class_names=(), task="vqa", text=text)
    return Case(name, {"family": family, "name": name, "create": {}}, info, recipes, PUBLISHED[family], batches)


CASES = (
    case("vilt", "vilt_b32", VILT, 30522, 0, {"batch_step": 8}),
    case("meter", "meter_b16", METER, 50265, 1, {"batch_start": 16, "batch_step": 8}),
)

if __name__ == "__main__":
    main(__doc__, CASES, quick=len(CASES))
