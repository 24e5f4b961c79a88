"""Each technique moves the number it exists for, on a small ViT trained on real images; slow, with data that not every checkout has."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.load import load_study
from tests.places import DATA
from tests.workers.techniques.test_contract import SAMPLES
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.techniques import registry
from workers.trial import Context, Recipe, Step, TrialResult, TrialSpec

IMAGES = DATA / "cifar10_subset.parquet"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGES.exists(), reason=f"needs the CIFAR-10 images of {IMAGES}"),
    pytest.mark.timeout(900),
]

LESS: dict[str, tuple[str, ...]] = {
    "distill": ("size_bytes", "params", "macs"),
    "magnitude_prune": ("size_bytes", "params", "macs"),
    "taylor_prune": ("size_bytes", "params", "macs"),
    "importance_prune": ("size_bytes", "params", "macs"),
    "semi_structured_prune": ("size_bytes",),
    "resolution": ("macs",),
    "tome": ("macs",),
    "pitome": ("macs",),
    "evit": ("macs",),
    "dynamicvit": ("macs",),
    "diffrate": ("macs",),
    "nystrom": ("macs",),
    "performer": ("macs",),
    "linformer": ("macs",),
    "scatterbrain": ("macs",),
    "svd": ("size_bytes", "params", "macs"),
    "precision": ("size_bytes",),
    "qat": ("size_bytes",),
    "lsq": ("size_bytes",),
    "diffq": ("size_bytes",),
    "dynamic_int8": ("size_bytes",),
    "weight_only": ("size_bytes",),
    "static_int8": ("size_bytes",),
    "fq_vit": ("size_bytes",),
    "smoothquant": ("size_bytes",),
    "gptq": ("size_bytes",),
    "repq_vit": ("size_bytes",),
    "fp8": ("size_bytes",),
}
"""What each technique must make less."""

LACKING = sorted(set(SAMPLES) ^ set(LESS))
assert not LACKING, f"tests/workers/techniques/test_direction.py: LESS and SAMPLES differ in {', '.join(LACKING)}"

FROM_TOKENS = {"scatterbrain": 257}
"""Honest exceptions: those that do not pay at the 65 tokens of 32 x 32 pixels are asked at this many; at 65 this one has
1.002 times the MACs. Where time turns is another matter: docs/benchmarks.md."""

CHANCE_PCT = 10.0


def study(pixels: int) -> dict[str, Any]:
    """65 tokens at 32 pixels, 257 at 64."""
    few = pixels > 32  # long sequences are counted, not learned
    return {
        "name": f"direction{pixels}",
        "model": {"create": {"width": 64, "depth": 4, "heads": 4, "patch": 4}},
        "data": {
            "kind": "parquet",
            "path": str(IMAGES),
            "image_size": pixels,
            "train_limit": 64 if few else 3000,
            "search_limit": 32 if few else 500,
            "report_limit": 32,
        },
        "training": {"baseline": {"epochs": 1 if few else 4, "lr": 2e-3}, "recovery": {"epochs": 1, "lr": 1e-3}},
        "objectives": ["top1_pct", "size_bytes", "params", "macs"],
        "techniques": {name: {} for name in SAMPLES},
    }


class Runs:
    """Trials of one study, its stages shared."""

    def __init__(self, folder: Path, pixels: int) -> None:
        self.storage = LocalStorage(folder)
        self.context: Context = load_study(study(pixels)).context()

    def __call__(self, *steps: Step) -> TrialResult:
        recipe = Recipe(steps)
        result = run_trial(TrialSpec("s", recipe.hash[:12], recipe, 0, self.context, self.storage.url))
        assert result.status == "ok", result.failure
        return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Runs]:
    return {tokens: Runs(tmp_path_factory.mktemp(str(tokens)), pixels) for tokens, pixels in ((65, 32), (257, 64))}


@pytest.mark.parametrize("name", LESS)
def test_a_technique_makes_less_of_what_it_exists_for(name: str, runs: dict[int, Runs]) -> None:
    run = runs[FROM_TOKENS.get(name, 65)]
    step = Step(name, asdict(registry()[name].Config(**SAMPLES[name])))
    whole, less = run(), run(step)
    for metric in LESS[name]:
        assert less.metrics[metric] < whole.metrics[metric], metric


@pytest.mark.parametrize("name", LESS)
def test_what_is_left_has_learned(name: str, runs: dict[int, Runs]) -> None:
    """Twice chance, of a baseline that has more than three times chance: no technique forgets everything."""
    run = runs[65]
    whole = run()
    assert whole.metrics["top1_pct"] > 3 * CHANCE_PCT
    step = Step(name, asdict(registry()[name].Config(**SAMPLES[name])))
    assert run(step).metrics["top1_pct"] > 2 * CHANCE_PCT
