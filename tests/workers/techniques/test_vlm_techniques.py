"""Quantisation, precision, distillation and structured pruning on tiny ViLT and METER models; together: test_vlm_pruned.

What each computes is in the technique's own tests; here: batches of several tensors calibrate and train it, what it makes is smaller,
and the artefact computes the same bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.vision_language import CLASSES, batch
from tests.workers.techniques.vlm import FAMILIES, describe, vlm
from workers import artefact, models
from workers.inputs import Inputs
from workers.measuring.counting import count_params
from workers.techniques import registry
from workers.techniques.quantisation import gptq, weight_only, weight_only_sensitivity
from workers.techniques.quantisation.shared_affine import linears, unquantised
from workers.techniques.quantisation.shared_norm_folding import pairs
from workers.techniques.quantisation.shared_packed_embeddings import PackedEmbedding, TrainedEmbedding
from workers.techniques.quantisation.smoothquant import smooth_
from workers.techniques.record import LossInputs, Surroundings, Technique, make_config

Step = tuple[str, dict[str, Any]]

SHAPES: dict[str, dict[str, int]] = {
    "vilt": {"depth": 3},
    "meter": {"cross_depth": 2, "text_depth": 1, "image_depth": 1},
}
every_family = pytest.mark.parametrize("family", FAMILIES)

CONVERSIONS: list[Step] = [
    ("precision", {"dtype": "bf16"}),
    ("dynamic_int8", {}),
    ("fp8", {}),
    ("weight_only", {"bits": 8}),
    ("weight_only", {"bits": 4, "embeddings": False}),
    ("static_int8", {"images": 64}),
    ("smoothquant", {"images": 64, "activations": "token"}),
    ("smoothquant", {"images": 64, "activations": "static"}),
    ("gptq", {"bits": 4, "images": 64}),
]
TRAINED: list[Step] = [("qat", {}), ("lsq", {"weight_bits": 4}), ("diffq", {"penalty": 10.0})]
PRUNE: Step = (
    "magnitude_prune",
    {"head_ratio": 0.25, "mlp_ratio": 0.3, "head_dim_ratio": 0.25, "depth_ratio": 0.35, "round_to": 4},
)
NARROW: Step = ("magnitude_prune", {"head_ratio": 0.25, "mlp_ratio": 0.3, "head_dim_ratio": 0.25, "round_to": 4})
PUMER: Step = ("pumer", {"layers": "spread_2", "prune": 0.2})
STUDENT: Step = ("distill", {"depth": 0.5, "width": 0.5})
FACTORS: Step = ("svd", {"keep": 0.5})
SPARSE: Step = ("semi_structured_prune", {})


def label(step: Step) -> str:
    return "_".join([step[0], *(str(value) for value in step[1].values() if isinstance(value, int | str))])


def build(family: str, task: str = "vqa") -> Any:
    return vlm(family, task, **SHAPES[family])


def examples(task: str = "vqa", count: int = 8, seed: int = 0) -> Inputs:
    """Texts of six tokens, the second one with two of padding; for retrieval three texts an image."""
    found = batch(task, count, seed=seed)
    if task == "retrieval":
        found["input_ids"] = torch.stack([found["input_ids"].roll(shift, 0) for shift in range(3)], dim=1)
    mask = torch.ones_like(found["input_ids"], dtype=torch.bool)
    mask[1, ..., 4:] = False
    return Inputs({**found, "attention_mask": mask})


def targets(task: str) -> torch.Tensor:
    if task == "vqa":
        return torch.rand(8, CLASSES[task], generator=torch.Generator().manual_seed(5))
    return torch.arange(8) % CLASSES[task]


def surroundings(model: nn.Module, task: str = "vqa") -> Surroundings:
    teacher = copy.deepcopy(model)

    def batches() -> Iterator[tuple[Inputs, torch.Tensor]]:
        for seed in (10, 11):
            yield examples(task, seed=seed), targets(task)

    return Surroundings(torch.device("cpu"), 0, torch.Generator().manual_seed(0), batches, lambda: teacher)


def logits(model: Any, task: str = "vqa") -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(examples(task))
    return found


def train_a_step(model: Any, steps: list[tuple[Technique, Any]], teacher: Any, task: str) -> None:
    """One step of every parameter, the techniques' losses and groups among them."""
    model.train()
    groups = [g for t, c in steps if t.parameter_groups is not None for g in t.parameter_groups(model, c)]
    own = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in own]
    optimiser = torch.optim.AdamW([{"params": rest}, *groups], lr=1e-3)
    for technique, config in steps:
        if technique.on_progress is not None:
            technique.on_progress(model, config, 0.0)
    out, aims = model(examples(task)), targets(task)
    loss = (
        functional.binary_cross_entropy_with_logits(out, aims) if task == "vqa" else functional.cross_entropy(out, aims)
    )
    inputs = LossInputs(model, examples(task), out, aims, logits(teacher, task).clone(), 0.0, teacher=teacher)
    for term in (t.loss(inputs, c) for t, c in steps if t.loss is not None):
        loss = loss * term.task_weight + term.extra
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    assert bool(loss.isfinite())


def compress(family: str, steps: list[Step], task: str = "vqa") -> tuple[Any, list[dict[str, Any]]]:
    """Does what the stages of a trial do; returns the model and the steps of its manifest."""
    model, teacher = build(family, task), build(family, task)
    surgery: list[tuple[Technique, Any]] = []
    records: list[dict[str, Any]] = []
    for stage in ("surgery", "conversion"):
        for name, values in steps:
            technique = registry()[name]
            if technique.stage != stage:
                continue
            assert family in technique.models
            config = make_config(technique.Config, values)
            told = technique.info_after(models.model_info(model), config)
            assert technique.check(models.model_info(model), config) is None
            applied = technique.apply(model, config, surroundings(model, task))
            assert applied.changed
            model = applied.model
            records.append({"technique": name, "version": technique.version, "resolved": applied.resolved})
            if stage == "surgery":
                surgery.append((technique, config))
            if name in ("distill", "magnitude_prune"):
                assert models.model_info(model) == told
        if stage == "surgery" and surgery:
            train_a_step(model, surgery, teacher, task)
            for record, (technique, config) in zip(records, surgery, strict=True):
                if technique.finalise is not None:
                    record["resolved"] = {**record["resolved"], **technique.finalise(model, config)}
    return model.eval(), records


def save(model: Any, records: list[dict[str, Any]], family: str, task: str, path: Path) -> int:
    artefact.save(model, path, model_description=describe(family, task, **SHAPES[family]), steps=records)
    return (path / artefact.TENSORS).stat().st_size


def check(family: str, steps: list[Step], path: Path, task: str = "vqa", smaller: float = 1.0) -> Any:
    """Compresses, saves and loads; the artefact computes the same and is ``smaller`` times as large as the whole or less."""
    model, records = compress(family, steps, task)
    expected = logits(model, task)
    assert expected.shape == (8, 3 if task == "retrieval" else CLASSES[task])
    assert expected.dtype == torch.float32
    assert bool(expected.isfinite().all())
    whole = build(family, task)
    assert not torch.equal(expected, logits(whole, task))
    assert save(model, records, family, task, path / "a") < smaller * save(whole, [], family, task, path / "whole")
    loaded = artefact.load(path / "a")
    assert torch.equal(logits(loaded, task), expected)
    return model


# --- each alone -------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("step", CONVERSIONS, ids=label)
def test_a_conversion_calibrates_shrinks_and_reloads(family: str, step: Step, tmp_path: Path) -> None:
    check(family, [step], tmp_path, smaller=0.55)


@every_family
@pytest.mark.parametrize("step", [*TRAINED, PRUNE, STUDENT, FACTORS, SPARSE], ids=lambda step: step[0])
def test_what_trains_takes_a_step_shrinks_and_reloads(family: str, step: Step, tmp_path: Path) -> None:
    check(family, [step], tmp_path, smaller=0.9)


@every_family
@pytest.mark.parametrize(
    "steps",
    [
        [NARROW, FACTORS],
        [NARROW, SPARSE],
        [SPARSE, ("precision", {})],
        [FACTORS, ("smoothquant", {"images": 64})],
        [FACTORS, ("gptq", {"bits": 4, "images": 64})],
        [FACTORS, ("lsq", {})],
    ],
    ids=lambda steps: "+".join(step[0] for step in steps),
)
def test_factors_and_sparse_layers_with_what_comes_before_and_after(
    family: str, steps: list[Step], tmp_path: Path
) -> None:
    check(family, steps, tmp_path, smaller=0.9)


@every_family
@pytest.mark.parametrize("task", ["nlvr2", "retrieval"])
def test_two_images_and_several_texts(family: str, task: str, tmp_path: Path) -> None:
    check(family, [STUDENT, ("lsq", {})], tmp_path / "trained", task)
    check(family, [("static_int8", {"images": 64})], tmp_path / "static", task)


@every_family
@pytest.mark.parametrize("name", ["distill", "magnitude_prune", "svd"])
def test_identity_settings_reproduce_the_logits(family: str, name: str) -> None:
    technique, model = registry()[name], build(family)
    assert technique.identity is not None
    config = make_config(technique.Config, dict(technique.identity))
    changed = technique.apply(model, config, surroundings(model)).model
    assert torch.equal(logits(changed), logits(build(family)))
    # A student that starts anew is another one, the same for the same seed, and leaves the global generator alone.
    if name == "distill":
        state = torch.get_rng_state()
        anew = technique.Config(init="random")
        one, two = (technique.apply(model, anew, surroundings(model)).model for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(logits(one), logits(two))
        assert not torch.equal(logits(one), logits(model))


# --- quantisers -------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("bits", [8, 5, 4])
def test_word_embeddings_are_packed_as_layers_are(family: str, bits: int) -> None:
    model = build(family)
    (name,) = [n for n, part in model.named_modules() if isinstance(part, nn.Embedding) and "word" in n]
    table = model.get_submodule(name).weight.detach().clone()
    config = weight_only.Config(bits=bits)
    applied = weight_only.TECHNIQUE.apply(model, config, surroundings(model))
    assert applied.resolved["embeddings"] == [name]
    packed = model.get_submodule(name)
    assert isinstance(packed, PackedEmbedding)
    ids = torch.tensor([[5, 0, 255], [5, 7, 1]])
    rounded = weight_only.rounded(table, config, bits)
    assert torch.equal(packed(ids), rounded[ids])
    assert sum(b.nbytes for b in packed.buffers()) < table.nbytes * (bits / 32 + 0.07)
    with pytest.raises(ValueError, match="once only"):
        linears(model, skip_head=False)


@every_family
@pytest.mark.parametrize("step", TRAINED, ids=label)
def test_word_embeddings_are_trained_as_they_are_stored(family: str, step: Step, tmp_path: Path) -> None:
    technique, model = registry()[step[0]], build(family)
    applied = technique.apply(model, make_config(technique.Config, step[1]), surroundings(model))
    (table,) = [part for part in model.modules() if isinstance(part, TrainedEmbedding)]
    ids = torch.tensor([[5, 0, 255], [5, 7, 1]])
    model.train()
    table(ids).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[5].tolist() == [2.0] * 64  # twice among the ids, straight through
    assert not bool(table.weight.grad[6].any())
    # What is saved before the training computes the same.
    save(model, [{"technique": step[0], "version": 1, "resolved": applied.resolved}], family, "vqa", tmp_path / "a")
    assert torch.equal(logits(artefact.load(tmp_path / "a")), logits(model))
    assert technique.finalise is not None
    technique.finalise(model, technique.Config())
    (packed,) = [part for part in model.modules() if isinstance(part, PackedEmbedding)]
    assert torch.equal(packed(ids), table.eval()(ids))
    assert count_params(unquantised(model)) == count_params(build(family))


@every_family
@pytest.mark.parametrize("order", [("precision", "weight_only"), ("weight_only", "precision")])
def test_embeddings_follow_the_precision_in_either_order(family: str, order: tuple[str, str], tmp_path: Path) -> None:
    values: dict[str, dict[str, Any]] = {"precision": {}, "weight_only": {"bits": 4}}
    model = check(family, [(name, values[name]) for name in order], tmp_path, smaller=0.3)
    (packed,) = [part for part in model.modules() if isinstance(part, PackedEmbedding)]
    assert packed(torch.tensor([3])).dtype == torch.bfloat16


@every_family
def test_precision_takes_plain_dictionaries_too(family: str) -> None:
    model = build(family)
    registry()["precision"].apply(model, registry()["precision"].Config(), surroundings(model))
    with torch.inference_mode():
        assert torch.equal(model(dict(examples().items())), model(examples()))


def test_smoothing_is_exact_where_norms_stand_before_what_reads_them() -> None:
    for family, norms in (("vilt", 6), ("meter", 2)):  # of METER the image encoder's layer
        model = build(family)
        found = pairs(model)
        assert len(found) == norms
        assert all(
            pair.norm.startswith({"vilt": "layers.", "meter": "image_encoder.layers."}[family]) for pair in found
        )
        expected = logits(model)
        assert smooth_(model, 0.6, surroundings(model), 16) == [pair.norm for pair in found]
        torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=2e-5)


@every_family
def test_gptq_rounds_layers_in_the_order_in_which_they_run(family: str) -> None:
    model, ran = build(family), []
    found = linears(model, skip_head=False)
    for name, linear in found.items():
        linear.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    logits(model)
    place = {name: i for i, name in enumerate(ran)}
    stages = gptq._stages(list(found))
    assert sorted(name for stage in stages for name in stage) == sorted(ran)
    blocks = [[place[name] for name in stage] for stage in stages if "layers" in stage[0]]
    assert len(blocks) == {"vilt": 3, "meter": 4}[family]
    assert all(max(one) < min(two) for one, two in pairwise(blocks))
    assert stages[-1] == ["head.3"]
    assert place["head.3"] == len(ran) - 1


def test_a_pairs_score_alone_has_a_sensitivity() -> None:
    model = build("vilt", "retrieval")
    one = Inputs(batch("retrieval", 4))
    around = surroundings(model, "retrieval")
    around.batches = lambda: iter([(one, torch.zeros(4))])
    table = weight_only_sensitivity.measure(
        model, around.batches, lambda w, bits: weight_only.rounded(w, weight_only.Config(), bits)
    )
    assert table["layers.0.intermediate.dense"][0] > 0


def test_widths_are_chosen_for_every_layer(tmp_path: Path) -> None:
    check("vilt", [PRUNE, ("weight_only", {"bits": "mixed"})], tmp_path, smaller=0.25)
