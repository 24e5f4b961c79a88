"""What ``plan --landscape`` says of sizes and work, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from orchestrator.study.load import load_study
from orchestrator.study.schema import model_info
from orchestrator.study.space import SearchSpace
from orchestrator.sweep.landscape import SAMPLE, Landscape, lines, look
from orchestrator.words.units import format_value
from tests.cli_calls import call
from tests.studies import recipe, tiny_study
from workers.structure import Structures

SMALL: dict[str, Any] = {
    "magnitude_prune": {"head_ratio": [0.0], "mlp_ratio": [0.25, 0.5], "round_to": [1]},
    "importance_prune": {"head_ratio": [0.0], "mlp_ratio": [0.5], "round_to": [1]},
    "dynamic_int8": {},
}


def looked(**changes: Any) -> tuple[Landscape, Any, Any]:
    config = load_study(tiny_study(**changes))
    context = config.context()
    space = SearchSpace(config.techniques, model_info(context), max_techniques=config.max_techniques)
    return look(config, context, space, None), config, context


def test_a_small_space_is_told_whole() -> None:
    landscape, config, context = looked(techniques=SMALL, constraints=["size_bytes_ratio <= 0.9", "top1_pct_drop <= 1"])
    assert landscape.everything
    structures = Structures(context, load_data=False)
    facts = {recipe.label(): structures.facts(recipe, 0) for recipe, _ in landscape.recipes}
    known = {label: found for label, found in facts.items() if found}
    assert set(known) == {label for label in facts if "importance_prune" not in label}
    assert 0 < len(known) < len(facts)
    said = list(lines(landscape, config.parsed_constraints()))
    assert said[0] == (
        f"before any training: of all recipes {len(known)} are known by their structure; of {len(facts) - len(known)} more, "
        "weights, images or the training decide"
    )
    sizes = [found["size_bytes"] for found in known.values()]
    baseline = structures.facts(recipe(), 0)["size_bytes"]
    low, *quartiles, high = (format_value("size_bytes", q) for q in np.quantile(sizes, [0, 0.25, 0.5, 0.75, 1]))
    own = format_value("size_bytes", baseline)
    assert said[1] == f"  size_bytes: {low} to {high}, quartiles {', '.join(quartiles)}; uncompressed {own}"
    assert [line.split(":")[0] for line in said[2:4]] == ["  params", "  macs"]
    share = sum(size / baseline <= 0.9 for size in sizes) / len(sizes)
    assert said[4] == f"  {share:.0%} of them meet size_bytes_ratio <= 0.9; the others are refused without a trial"
    smallest = min(known, key=lambda label: known[label]["size_bytes"])
    assert said[5].startswith("  smallest: ")
    assert said[5].endswith(f": {smallest}")
    assert said[6].startswith("  least work: ")


def test_a_large_space_is_sampled_the_same_way_every_time() -> None:
    landscape, _, _ = looked()
    again, _, _ = looked()
    assert not landscape.everything
    assert [recipe for recipe, _ in landscape.recipes] == [recipe for recipe, _ in again.recipes]
    assert len({recipe.hash for recipe, _ in landscape.recipes}) == len(landscape.recipes) <= SAMPLE


def test_the_command_says_it_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tiny_study(techniques=SMALL)))
    plain = call("plan", str(file), storage=tmp_path / "results")
    asked = call("plan", str(file), "--landscape", storage=tmp_path / "results")
    assert (plain.exit_code, asked.exit_code) == (0, 0), asked.stderr
    more = [line for line in asked.stdout.splitlines() if line not in plain.stdout.splitlines()]
    assert [line for line in plain.stdout.splitlines() if line not in asked.stdout.splitlines()] == []
    assert more[0].startswith("before any training: of all recipes ")
    assert len(more) == 7


def test_where_nothing_is_known_that_is_all_it_says() -> None:
    landscape, config, _ = looked(techniques={"importance_prune": {**SMALL["importance_prune"], "l1": [1e-4]}})
    assert list(lines(landscape, config.parsed_constraints())) == [
        "before any training: of all recipes 0 are known by their structure; of 1 more, weights, images or the training decide"
    ]
