"""Speed against the strong baseline: the fastest way, A/A noise, intervals, and the rows that come of it, on real models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from orchestrator.study.load import load_study
from tests import sleepers
from tests.clocks import Clock
from tests.sleepers import Sleeper
from tests.studies import tiny_study
from workers.measuring import known_speeds, strong_baseline
from workers.measuring.against_baseline import Subject, half_width, make_inputs, measure_speed
from workers.measuring.protocols import PROTOCOLS
from workers.measuring.strong_baseline import PROCESS_SIGMA, StrongBaseline, corrected, noise_of, settled, with_noise
from workers.metrics import METRICS
from workers.node.conditions import dtypes, fused
from workers.node.deadline import Deadline
from workers.run import run_remeasure, run_trial, workbench
from workers.stages.graph import compile_recipe
from workers.tasks import TaskInfo
from workers.techniques import registry, versions
from workers.techniques.quantisation import fp8
from workers.techniques.record import defaults
from workers.trial import Measurement, Recipe, Step, TrialResult, TrialSpec, trial_id

clock = sleepers.clock

INFO = TaskInfo(10, 1, 8, tuple("0123456789"))
CPU = torch.device("cpu")
SHORT: dict[str, Any] = {
    **PROTOCOLS["quick"],
    "window_s": 0.0,
    "latency_pairs": 9,
    "throughput_pairs": 5,
    "warmup": 1,
    "batch_start": 4,
    "batch_step": 4,
    "batch_max": 8,
    "noise_runs": 2,
}
del SHORT["remeasure"]  # of a study, not of a trial
SETTINGS = {**SHORT, "protocol": "quick", "threads": 1, "bootstrap": 500, "compile": False}
EVERY = tuple(n for n, m in METRICS.items() if m.kind in ("exact", "speed") or "image_classification" in m.tasks)
"""Every objective that a trial of images has on a CPU; so small a model has no peak memory there."""


def record(kind: str, **changes: Any) -> StrongBaseline:
    values: dict[str, Any] = {
        "kind": kind,
        "way": "fp32",
        "value": 10.0,
        "batch": 1 if kind == "latency" else 8,
        "largest_batch": 8,
        "ways": {"fp32": 10.0},
        "device_name": "test",
        "seconds": 1.0,
    }
    return StrongBaseline(**{**values, **changes})


def subject(model: nn.Module, baseline: nn.Module, **settings: Any) -> Subject:
    return Subject(model, baseline, "key", {**SETTINGS, **settings}, INFO, CPU)


# --- one measurement --------------------------------------------------------------------------------------------------


def test_a_model_that_sleeps_twice_as_long_has_twice_the_latency(clock: Clock) -> None:
    found = measure_speed(subject(Sleeper(clock, 1 / 32), Sleeper(clock, 1 / 64)), record("latency"))
    assert (found.ratio, found.ratio_low, found.ratio_high) == (2, 2, 2)
    assert (found.kind, found.unit, found.batch, found.conditions["baseline_batch"]) == ("latency", "ms", 1, 1)
    assert found.samples == (1e3 / 32,) * 9
    assert found.baseline_samples == (1e3 / 64,) * 9
    assert found.value == found.conditions["call_ms_p95"] == 1e3 / 32
    assert found.conditions["repeats"] == 9


def test_throughput_compares_each_model_at_its_own_best_batch(clock: Clock) -> None:
    # A fixed cost a call: the compressed model's best batch is the largest, the baseline runs at the stored one.
    model, baseline = Sleeper(clock, 1 / 64), Sleeper(clock, 1 / 64)
    found = measure_speed(subject(model, baseline), record("throughput", batch=4))
    assert (found.batch, found.conditions["baseline_batch"], found.conditions["largest_batch"]) == (8, 4, 8)
    assert (found.ratio, found.value) == (2, 8 * 64)
    assert {len_ for _, len_ in baseline.calls} == {4}


def test_conditions_say_what_was_measured(clock: Clock) -> None:
    torch.set_num_threads(2)
    model, baseline = Sleeper(clock, 1 / 64), Sleeper(clock, 1 / 64)
    found = measure_speed(subject(model, baseline), record("latency", noise_sigma=0.01, noise_dof=4))
    assert torch.get_num_threads() == 2
    wanted = {"threads": 1, "way": "fp32", "noise_sigma": 0.01, "noise_dof": 4, "compiled": False, "warmup": 1}
    assert found.conditions.items() >= wanted.items()
    assert found.conditions["device_name"]
    assert "clock_mhz" in found.conditions
    json.dumps(found.conditions)


def test_dtypes_and_fused_attention_are_told() -> None:
    vit = timm.create_model("test_vit", pretrained=False)
    assert fused(vit) is True
    vit.blocks[0].attn.fused_attn = False
    assert fused(vit) is False
    assert fused(nn.Linear(2, 2)) is None
    assert dtypes(nn.Sequential(nn.Linear(64, 64).bfloat16(), nn.Linear(2, 2))) == "bfloat16+float32"


# --- the fastest way ----------------------------------------------------------------------------------------------------


class FasterInHalf(nn.Module):
    """Sleeps half as long once its weights are bfloat16; cannot run in fp16 at all."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == torch.float16:
            raise RuntimeError("no fp16 here")
        return Sleeper(self.clock, 1 / 64 if self.weight.dtype == torch.bfloat16 else 1 / 32)(images)


@pytest.mark.parametrize(("kind", "fp32", "bf16"), [("latency", 1e3 / 32, 1e3 / 64), ("throughput", 8 * 32, 8 * 64)])
def test_the_fastest_way_is_found_and_the_others_are_told(clock: Clock, kind: str, fp32: float, bf16: float) -> None:
    model = FasterInHalf(clock)
    found = strong_baseline.find(kind, model, SETTINGS, lambda batch: make_inputs(INFO, CPU, batch), "test")
    assert (found.way, found.value) == ("bf16", bf16)
    assert found.ways == {"fp32": fp32, "bf16": bf16, "fp16": "RuntimeError: no fp16 here"}
    assert found.batch == (1 if kind == "latency" else 8)
    assert found.seconds == pytest.approx(clock.passed_s, abs=0.001)
    assert StrongBaseline.from_dict(json.loads(found.to_json())) == found


def test_a_speed_that_nothing_times_is_not_taken_for_another() -> None:
    with pytest.raises(ValueError, match="must be of latency or throughput, got 'first_answer'"):
        strong_baseline.find(
            "first_answer", nn.Identity(), SETTINGS, lambda batch: make_inputs(INFO, CPU, batch), "test"
        )


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_the_root_mean_square_of_log_ratios_and_widens_by_students_t() -> None:
    sigma, dof = noise_of([math.exp(0.03), math.exp(-0.03), math.exp(0.03), math.exp(-0.03)])
    assert (sigma, dof) == (pytest.approx(0.03), 4)
    noisy = record("latency", noise_sigma=0.03, noise_dof=4)
    expected = math.hypot(2.7764 * 0.03, 1.96 * PROCESS_SIGMA)  # t, 4 degrees of freedom, 97.5 %
    assert noisy.half_width() == pytest.approx(expected, rel=1e-4)
    assert record("latency").half_width() == 0


def test_the_larger_of_bootstrap_and_noise_is_the_interval() -> None:
    measured = Measurement("latency", "key", "cpu", 1, 8, "quick", 2.0, "ms", 2.0, 1.9, 2.1)
    assert half_width(measured, record("latency")) == pytest.approx(math.log(2 / 1.9))
    wide = record("latency", noise_sigma=0.1, noise_dof=4)
    assert half_width(measured, wide) == wide.half_width()


def test_noise_takes_the_runs_of_its_own_kind() -> None:
    runs = [
        Measurement(kind, "key", "cpu", 1, 8, "quick", 1.0, "ms", ratio, ratio, ratio)
        for kind, ratio in (("aa_latency", math.e), ("aa_throughput", 1.0), ("aa_latency", 1 / math.e))
    ]
    assert with_noise(record("latency"), runs).noise_sigma == pytest.approx(1)
    assert with_noise(record("throughput"), runs).noise_ratios == (1.0,)


def aa(batch: int, ratio: float) -> Measurement:
    return Measurement("aa_throughput", "key", "cpu", batch, 8, "quick", 1.0, "images/s", ratio, ratio, ratio)


@pytest.mark.parametrize(
    ("runs", "batch", "value"),
    [
        pytest.param([(64, 1.25), (96, 1.08), (64, 1.16), (96, 1.02)], 64, 1.205, id="as seen"),
        pytest.param([(64, 1.25), (128, 1.08), (128, 1.0), (96, 1.02)], 128, 1.0, id="no more than half"),
        pytest.param([(128, 1.3), (128, 1.2), (128, 1.3)], 128, 1.0, id="its own batch"),
        pytest.param([(64, 0.9), (64, 1.005), (96, 1.3)], 128, 1.0, id="slower, or equally fast"),
        pytest.param([], 128, 1.0, id="none"),
    ],
)
def test_a_batch_that_fresh_processes_find_faster_becomes_the_units(
    runs: list[tuple[int, float]], batch: int, value: float
) -> None:
    found = corrected(record("throughput", batch=128, value=1.0), [aa(*run) for run in runs])
    assert (found.batch, found.value) == (batch, pytest.approx(value))


def test_a_unit_is_corrected_until_its_runs_agree_and_twice_at_most() -> None:
    asked: list[list[int]] = []

    def measure(records: Any) -> list[Measurement]:
        asked.append([r.batch for r in records])
        quiet = Measurement("aa_latency", "key", "cpu", 1, 8, "quick", 1.0, "ms", 1.0, 1.0, 1.0)
        return [quiet if r.kind == "latency" else aa(r.batch // 2, 2.0 if r.batch > end else 1.0) for r in records]

    for end, batches in ((32, [128, 64, 32]), (1, [128, 64, 32])):
        asked.clear()
        (latency, throughput), runs = settled(
            [record("latency"), record("throughput", batch=128, value=1.0)], measure, times=2
        )
        assert asked == [[1, 128], [1, 128], *[[batch] for batch in batches[1:] for _ in range(2)]]
        assert (latency.noise_sigma, latency.noise_dof) == (0.0, 2)
        assert (throughput.batch, throughput.value) == (32, 4.0)
        assert throughput.noise_ratios == ((1.0, 1.0) if end == 32 else (2.0, 2.0)), "what is left shows as noise"
        assert [run.kind for run in runs] == ["aa_latency"] * 2 + ["aa_throughput"] * 2


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speed")


def spec(root: Path, steps: dict[str, dict[str, Any]]) -> TrialSpec:
    context = load_study(tiny_study(measurement={**SHORT, "threads": 1})).context()
    recipe = Recipe(tuple(Step(n, {**defaults(registry()[n].Config), **c}) for n, c in steps.items()))
    return TrialSpec(
        study="speed",
        trial_id=trial_id(recipe, 0, context, versions()),
        recipe=recipe,
        seed=0,
        context=context,
        storage=str(root),
        objectives=EVERY,
    )


@pytest.fixture(scope="module")
def baseline_row(root: Path) -> TrialResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strong_baseline, "CORRECTIONS", 0)  # a batch that A/A runs moved is no longer that of the ways
        result = run_trial(spec(root, {}))
    assert result.status == "ok", result.failure
    return result


def test_every_objective_is_measured(baseline_row: TrialResult) -> None:
    """A metric that nothing measures ends the trial of ``baseline_row``: ``no value for ...``."""
    assert set(EVERY) <= baseline_row.metrics.keys()


def test_the_baseline_is_the_unit_and_brings_its_noise(baseline_row: TrialResult) -> None:
    metrics, strong = baseline_row.metrics, baseline_row.conditions["strong_baseline"]
    for kind, objective in (("latency", "latency_ms_p50"), ("throughput", "throughput_images_per_s")):
        assert metrics[objective] == strong[kind]["value"]
        assert strong[kind]["value"] == strong[kind]["ways"][strong[kind]["way"]]
        assert metrics[f"{objective}_ratio"] == 1
        assert f"{objective}_low" not in metrics
        noise = [m for m in baseline_row.measurements if m.kind == f"aa_{kind}"]
        assert len(noise) == strong["noise"][kind]["dof"] == 2
        assert [m.ratio for m in noise] == strong["noise"][kind]["ratios"]
        assert all(m.samples for m in noise)


def test_a_row_is_a_ratio_to_the_stored_baseline_with_an_interval(root: Path, baseline_row: TrialResult) -> None:
    result = run_trial(spec(root, {"tome": {"r": 1}}))
    assert result.status == "ok", result.failure
    assert not [m for m in result.measurements if m.kind.startswith("aa_")]  # found once a study and device
    for kind, objective in (("latency", "latency_ms_p50"), ("throughput", "throughput_images_per_s")):
        value, unit = result.metrics[objective], baseline_row.metrics[objective]
        measured = next(m for m in result.measurements if m.kind == kind)
        assert value == pytest.approx(measured.ratio * unit)
        low, high = result.metrics[f"{objective}_low"], result.metrics[f"{objective}_high"]
        assert low < value < high
        assert math.sqrt(low * high) == pytest.approx(value)
        assert high / value >= measured.ratio_high / measured.ratio * (1 - 1e-9)
    assert result.metrics["latency_ms_p95"] >= result.metrics["latency_ms_p50"]


def test_a_remeasurement_adds_records_of_the_same_artefact(root: Path, baseline_row: TrialResult) -> None:
    assert baseline_row.status == "ok"
    asked = spec(root, {"dynamic_int8": {}})
    first = run_trial(asked)
    again = run_remeasure(asked)
    assert [m.kind for m in again] == ["latency", "throughput"]
    assert {m.artefact for m in again} == {m.artefact for m in first.measurements}
    assert all(m.ratio is not None and m.samples for m in again)
    assert run_remeasure(spec(root, {})) == ()  # the unit is not measured against itself


def test_the_speed_of_an_equal_structure_is_taken_over_and_not_measured_again(
    root: Path, baseline_row: TrialResult
) -> None:
    """Two trainings of one structure: what was learnt differs, what runs does not."""
    assert baseline_row.status == "ok"
    pruned = {"head_ratio": 0.0, "mlp_ratio": 0.5, "round_to": 1}
    first, second, slower = (
        run_trial(replace(spec(root, {"magnitude_prune": {**pruned, "mlp_ratio": ratio}}), seed=seed, trial_id=name))
        for ratio, seed, name in ((0.5, 0, "first0"), (0.5, 1, "second"), (0.25, 0, "other0"))
    )
    assert {r.status for r in (first, second, slower)} == {"ok"}
    assert first.artefact != second.artefact
    assert second.conditions["speed_of"] == "first0"
    speeds = [n for n in first.metrics if n.startswith(("latency", "throughput"))]
    assert len(speeds) == 9
    assert {n: second.metrics[n] for n in speeds} == {n: first.metrics[n] for n in speeds}
    assert [m.kind for m in second.measurements] == ["accuracy_search"], "no second sample of one measurement"
    assert second.seconds["measure"] < 0.5 * first.seconds["measure"]
    assert "speed_of" not in slower.conditions
    assert {m.kind for m in slower.measurements} >= {"latency", "throughput"}
    again = run_trial(replace(spec(root, {"magnitude_prune": pruned}), trial_id="first0"))
    assert "speed_of" not in again.conditions, "a trial that is run again is measured again"


def test_speeds_are_shared_within_one_question_only(root: Path, baseline_row: TrialResult) -> None:
    """Another unit, device, library or study is another question."""
    assert baseline_row.status == "ok"
    bench = workbench(spec(root, {}), Deadline(None), {})
    asked = spec(root, {"tome": {"r": 1}})
    names = {
        known_speeds.question(bench, asked, "s", [["latency", "fp32", 1.0, 1]]),
        known_speeds.question(bench, asked, "t", [["latency", "fp32", 1.0, 1]]),
        known_speeds.question(bench, asked, "s", [["latency", "fp32", 1.5, 1]]),
        known_speeds.question(bench, replace(asked, study="another"), "s", [["latency", "fp32", 1.0, 1]]),
        known_speeds.question(bench, replace(asked, storage_token="another"), "s", [["latency", "fp32", 1.0, 1]]),
        known_speeds.question(
            bench, replace(asked, objectives=("latency_ms_p50",)), "s", [["latency", "fp32", 1.0, 1]]
        ),
    }
    for changed in ({"threads": 2}, {"compile": True}, {"protocol": "standard"}):
        context = replace(asked.context, measurement={**asked.context.measurement, **changed})
        names.add(known_speeds.question(bench, replace(asked, context=context), "s", [["latency", "fp32", 1.0, 1]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_speeds, "device_conditions", lambda device: {"device_name": "another", "torch": "2"})
        names.add(known_speeds.question(bench, asked, "s", [["latency", "fp32", 1.0, 1]]))
    assert len(names) == 10


def test_a_simulated_quantiser_alone_runs_at_the_baselines_own_speed(root: Path, baseline_row: TrialResult) -> None:
    alone = run_trial(spec(root, {"weight_only": {"bits": 3}}))
    assert alone.status == "ok", alone.failure
    assert alone.conditions["simulated"] is True
    assert alone.metrics["latency_ms_p50"] == baseline_row.metrics["latency_ms_p50"]
    assert alone.metrics["throughput_images_per_s_ratio"] == 1
    assert alone.metrics["size_bytes"] < baseline_row.metrics["size_bytes"]


def test_the_kernel_of_another_device_claims_no_speed(
    root: Path, baseline_row: TrialResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial on the CPU of a machine whose GPU has the kernel."""
    monkeypatch.setattr(fp8, "has_kernel", lambda: True)
    asked = spec(root, {"fp8": {}})
    assert asked.context.device == "cpu"
    result = run_trial(asked)
    assert result.status == "ok", result.failure
    assert result.conditions["simulated"] is True
    assert result.metrics["latency_ms_p50"] == baseline_row.metrics["latency_ms_p50"]
    assert run_remeasure(asked) == ()


@pytest.mark.parametrize(
    ("surgery", "quantiser"),
    [({"tome": {"r": 1}}, {"fq_vit": {}}), ({}, {"weight_only": {"bits": 3}}), ({"tome": {"r": 1}}, {})],
    ids=["behind surgery", "alone", "not quantised"],
)
@pytest.mark.usefixtures("baseline_row")
def test_a_simulated_quantiser_leaves_the_precision_beside_it(
    root: Path, surgery: dict[str, Any], quantiser: dict[str, Any]
) -> None:
    without = {**surgery, "precision": {"dtype": "bf16"}}
    asked = spec(root, {**without, **quantiser})
    result = run_trial(asked)
    assert result.status == "ok", result.failure
    assert result.conditions["simulated"] is bool(quantiser)
    own, twin = (compile_recipe(s.recipe, s.seed, s.context) for s in (asked, spec(root, without)))
    assert {run.key for run in result.stages} == {stage.key for stage in own + twin}
    speeds = [m for m in result.measurements if m.kind in ("latency", "throughput")]
    again = run_remeasure(asked)
    taken = "speed_of" in result.conditions  # of a recipe whose timed model is the same
    assert [m.kind for m in (*speeds, *again)] == ["latency", "throughput"] * (1 if taken else 2)
    for measured in (*speeds, *again):
        assert measured.conditions["dtype"] == "bfloat16"
        assert measured.artefact == own[-1].key
    assert result.metrics["latency_ms_p50_low"] < result.metrics["latency_ms_p50_high"]
