"""Study files: a good one loads, a bad one reports every fault at once with its path, line, rule, value and remedy."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from orchestrator import config
from orchestrator.config import (
    Fault,
    StudyConfig,
    StudyError,
    StudyRefused,
    check_measurable,
    load_study,
    model_info,
)
from orchestrator.constraints import METRICS, Constraint, ConstraintError, derived, parse
from orchestrator.study_yaml import ABSENT
from tests.studies import tiny_study
from workers.protocol import OBJECTIVES, Step
from workers.tasks import TaskInfo


def minimal(**more: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "model": {"create": {}},
        "data": {"kind": "digits"},
        "objectives": ["top1_pct", "size_bytes"],
        "techniques": {"tome": {"r": {"low": 2, "high": 8, "step": 2}}, "weight_only": None},
        **more,
    }


def faults_of(source: Any) -> list[Fault]:
    with pytest.raises(StudyError) as caught:
        load_study(source)
    return caught.value.faults


def only_fault(source: Any) -> Fault:
    (fault,) = faults_of(source)
    return fault


# --- good studies -----------------------------------------------------------------------------------------------------


def test_every_shipped_study_loads_and_survives_json() -> None:
    assert "quick" in config.shipped_studies()
    for name in config.shipped_studies():
        study = load_study(name)
        assert StudyConfig.from_dict(json.loads(json.dumps(study.to_dict()))) == study
        assert load_study(study.to_dict()) == study


def test_quick_searches_every_family_and_starts_from_known_good_recipes() -> None:
    from workers.techniques import NAMES
    from workers.techniques.composition import family_of

    study = load_study("quick")
    assert {family_of(name) for name in study.techniques} == {family_of(name) for name in NAMES}
    assert len(study.known_good()) >= 5
    assert study.trials >= 16
    text = config.shipped_studies()["quick"].read_text()
    assert "\ntrials: 16\n" in text, "scripts edit this line"


SHIPPED_DATA = {
    "quick": TaskInfo(10, 1, 8, tuple(map(str, range(10)))),
    "survey_small": TaskInfo(10, 3, 32, tuple(map(str, range(10)))),
    "survey_cifar10": TaskInfo(10, 3, 224, tuple(map(str, range(10)))),
    "survey_cifar100": TaskInfo(100, 3, 224, tuple(map(str, range(100)))),
}
"""What the data of each shipped study is, most of which is not here."""


@pytest.mark.parametrize("name", config.shipped_studies())
def test_every_known_good_recipe_of_a_shipped_study_is_feasible_and_in_its_space(name: str) -> None:
    from orchestrator.space import SearchSpace
    from workers import models

    study = load_study(name)
    create = study.model.create.timm_arguments() if study.model.create else dict(study.model.options)
    section = {"family": "timm", "name": study.model.name, "create": create}
    info = models.model_info(models.build(section, SHIPPED_DATA[name], device="meta"), study.device)
    space = SearchSpace(study.techniques, info, max_techniques=study.max_techniques)
    assert study.known_good()
    for recipe in study.known_good():
        assert space.fault(recipe) is None
        assert space.params_of(recipe)


def test_the_context_is_plain_and_changes_with_what_it_holds() -> None:
    context = load_study(minimal()).context()
    assert json.loads(json.dumps(context.model)) == context.model
    assert context.model["create"]["embed_dim"] == 64
    assert context.model["train"] is True
    assert context.data["digest"]
    assert context.digest == load_study(minimal(trials=99, name="other")).context().digest
    assert context.digest != load_study(minimal(training={"baseline": {"lr": 0.01}})).context().digest


def test_a_mapping_gets_defaults_and_techniques_are_complete() -> None:
    study = load_study(minimal())
    assert study.objectives == {"top1_pct": "maximize", "size_bytes": "minimize"}
    assert study.techniques["tome"]["r"] == {"low": 2, "high": 8, "step": 2}
    assert set(study.techniques["tome"]) == {"r", "schedule", "proportional_attention"}
    assert (study.trials, study.seeds, study.max_techniques) == (16, [0], 3)
    assert study.model.train
    assert study.budget.trial_timeout == 600


def test_fixed_values_choices_and_partial_ranges() -> None:
    techniques = {
        "tome": {"r": 8.0, "schedule": "constant"},
        "weight_only": {"bits": [4, 8]},
        "nystrom": {"landmarks": {"high": 48}},
    }
    study = load_study(minimal(techniques=techniques))
    assert study.techniques["tome"]["r"] == [8]
    assert isinstance(study.techniques["tome"]["r"][0], int)
    assert study.techniques["weight_only"]["bits"] == [4, 8]
    assert study.techniques["nystrom"]["landmarks"] == {"low": 24, "high": 48, "step": 8}


def test_recipes_are_completed_with_defaults_or_the_nearest_searched_value() -> None:
    study = load_study(minimal(recipes=[["tome"], [{"tome": {"r": 2}}, {"weight_only": None}]]))
    first, second = study.known_good()
    assert first.steps[0].config["r"] == 8
    assert second.techniques == ("tome", "weight_only")
    assert second.steps[0] == Step("tome", {**first.steps[0].config, "r": 2})
    wide = {"tome": {"r": {"low": 1, "high": 3}}}
    assert load_study(minimal(techniques=wide, recipes=[["tome"]])).known_good()[0].steps[0].config["r"] == 3


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5h", 5400), (45, 45)])
def test_durations(text: Any, seconds: float) -> None:
    assert load_study(minimal(budget={"time": text})).budget.time == seconds


@pytest.mark.parametrize(("text", "size"), [("1GiB", 2**30), ("500MB", 500_000_000), (1024, 1024), ("0.5kB", 500)])
def test_sizes(text: Any, size: int) -> None:
    assert load_study(minimal(resources={"memory": text})).resources.memory == size


def test_a_number_like_1e_3_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml_of(minimal(training={"baseline": {"lr": 0.5}})).replace("0.5", "1e-3"))
    assert load_study(path).training.baseline.lr == 1e-3


def yaml_of(study: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(study, sort_keys=False)


def test_relative_paths_are_relative_to_the_file_then_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "studies", tmp_path / "work"
    for folder, name in ((here, "a.parquet"), (there, "b.parquet")):
        folder.mkdir()
        (folder / name).write_bytes(b"PAR1")
    monkeypatch.chdir(there)
    for name, folder in (("a.parquet", here), ("b.parquet", there)):
        (here / "s.yaml").write_text(yaml_of(minimal(data={"kind": "parquet", "path": name})))
        assert load_study(here / "s.yaml").data.path == str(folder / name)


def test_importing_the_module_loads_neither_torch_nor_ray() -> None:
    code = "import sys, orchestrator.config; sys.exit(bool({'torch', 'timm', 'ray', 'optuna'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- bad studies ------------------------------------------------------------------------------------------------------

BAD = """\
name: ../escape
model: {name: vit_tiny_patch16_225, checkpoint: nowhere.safetensors}
data: {kind: parquet, imagesize: 32}
training:
  baseline: {epochs: 0, schedule: one_cycel}
objectives: [top1_pct, size_byte]
device: gpu
reference_point: {latency_ms_p50: 3}
constraints: [top1_drop <= 1, size_bytes is small, params < 1e6]
techniques:
  tomme:
  tome: {r: 99, shedule: constant}
  nystrom: {landmarks: {low: 10, high: 21, step: 4}, iterations: []}
  weight_only: {bits: 9}
  magnitude_prune: {head_ratio: {low: 0.1, high: 0.4, step: 0.07}}
  dynamic_int8:
  precision:
recipes:
  - [dynamic_int8, precision]
  - [evit]
  - [{dynamic_int8: {granularity: per_banana}}]
sampler: {name: tpee}
seeds: [0, 0]
trials: -1
trials: 16
budget: {time: 30 parsecs}
resources: {memory: 1 gig}
"""

EXPECTED = {
    "name": (1, "must be 1 to 64 letters", "escape"),
    "model.name": (2, "must be a timm model", "vit_tiny_patch16_224"),
    "model.checkpoint": (2, "must be a file that exists", "relative to the study file"),
    "data.path": (3, "must be given for kind parquet", "name the folder or file"),
    "data.imagesize": (3, "must be a known key", "did you mean image_size?"),
    "training.baseline.epochs": (5, "must be greater than or equal to 1", ""),
    "training.baseline.schedule": (5, "must be 'one_cycle' or 'cosine'", "did you mean one_cycle?"),
    "objectives[1]": (6, "must be a known objective", "did you mean size_bytes?"),
    "device": (7, "must be 'cpu' or 'cuda'", "did you mean cpu?"),
    "reference_point.latency_ms_p50": (8, "must be one of the study's objectives", "known: top1_pct"),
    "constraints[0]": (9, "must name one of top1_pct", "did you mean top1_pct_drop?"),
    "constraints[1]": (9, "must be a metric, one of <= >= < >, and a number", "size_bytes < 4e6"),
    "techniques.tomme": (11, "must be a known technique", "did you mean tome?"),
    "techniques.tome.r": (12, "must be from 0 to 64", "the nearest allowed value is 64"),
    "techniques.tome.shedule": (12, "must be a parameter of the technique", "did you mean schedule?"),
    "techniques.nystrom.landmarks.high": (13, "must be 10 plus a multiple of the step 4", "18"),
    "techniques.nystrom.iterations": (13, "must have at least one choice", "leave it out"),
    "techniques.weight_only.bits": (14, "must be one of 8, 7, 6, 5, 4, 3, 2", "for example 8"),
    "techniques.magnitude_prune.head_ratio.step": (15, "must be a positive multiple of 0.05", "default is 0.1"),
    "recipes[0]": (19, "must be a legal combination: dynamic_int8 + precision", "leave one of them out"),
    "recipes[1][0]": (20, "must be one of the study's techniques", ""),
    "recipes[2][0].dynamic_int8.granularity": (21, "must be what the study searches", "for example 'per_channel'"),
    "sampler.name": (22, "must be one of tpe, nsga2, random", "did you mean tpe?"),
    "seeds": (23, "must not repeat a value", "remove the repeated ones"),
    "trials": (25, "must stand once; the first is on line 24", "remove one of the two"),
    "budget.time": (26, "must be a number with one of the units", "for example 30m"),
    "resources.memory": (27, "must be a number with one of the units", "for example 1GiB"),
}


def test_every_fault_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    with pytest.raises(StudyError) as caught:
        load_study(path)
    found = {fault.where: fault for fault in caught.value.faults}
    assert found.keys() == EXPECTED.keys()
    for where, (line, rule, remedy) in EXPECTED.items():
        fault = found[where]
        assert (where, fault.line) == (where, line)
        assert rule in fault.rule, where
        assert remedy in fault.remedy, where
    lines = str(caught.value).splitlines()
    assert len(lines) == len(EXPECTED)
    text = "bad.yaml: techniques.tome.r (line 12): must be from 0 to 64 (got 99); the nearest allowed value is 64"
    assert text in lines
    assert [fault.line for fault in caught.value.faults] == sorted(line for line, _, _ in EXPECTED.values())


@pytest.mark.parametrize(
    ("change", "where", "rule"),
    [
        ({"techniques": {}}, "techniques", "must have at least 1 item"),
        ({"objectives": []}, "objectives", "must have at least 1 item"),
        ({"objectives": {"top1_pct": "minimize"}}, "objectives.top1_pct", "must be maximize"),
        ({"objectives": ["params", "params"]}, "objectives[1]", "must stand once"),
        ({"objectives": {"top1_pct": "maximise"}}, "objectives.top1_pct", "must be 'minimize' or 'maximize'"),
        ({"device": "cuda"}, "resources.gpus", "must be above 0 for device cuda"),
        ({"model": {}}, "model", "must have either name or create"),
        ({"model": {"create": {"width": 65}}}, "model.create", "width must be a multiple of heads"),
        ({"model": {"create": {}, "train": False}}, "model", "must be trained, pretrained or loaded"),
        ({"model": {"create": {}, "pretrained": True}}, "model", "pretrained and options need a timm name"),
        ({"data": {"kind": "digit"}}, "data.kind", "must be 'digits'"),
        ({"data": {"kind": "digits", "search_fraction": 1.0}}, "data.search_fraction", "must be less than 1"),
        ({"data": {"kind": "imagefolder", "path": "/nowhere"}}, "data.path", "must exist"),
        ({"trials": "16"}, "trials", "must be a valid integer"),
        ({"model": {"name": "resnet18"}}, "model.name", "must be a plain vision transformer"),
        ({"sampler": {"options": {"nonsense": 1}}}, "sampler.options", "must be arguments of the sampler"),
        ({"trails": 16}, "trails", "must be a known key"),
        ({"seeds": []}, "seeds", "must have at least 1 item"),
        ({"recipes": [[]]}, "recipes[0]", "must have at least 1 item"),
        ({"recipes": [["weight_only", "tome"]]}, "recipes[0]", "tome must come before weight_only"),
        (
            {"recipes": [["tome", "weight_only"]], "max_techniques": 1},
            "recipes[0]",
            "must have at most max_techniques = 1",
        ),
        ({"recipes": [["tome"]], "max_techniques": 0}, "max_techniques", "must be greater than or equal to 1"),
        ({"techniques": {"tome": {"r": "many"}}}, "techniques.tome.r", "must be a number from 0 to 64"),
        ({"techniques": {"tome": {"r": {"low": 9, "high": 3}}}}, "techniques.tome.r", "must have low <= high"),
        ({"techniques": {"tome": {"r": [2, 2.0]}}}, "techniques.tome.r", "must not repeat a choice"),
        (
            {"techniques": {"tome": {"r": {"low": 1, "hi": 3}}}},
            "techniques.tome.r.hi",
            "must be one of low, high, step",
        ),
        ({"techniques": {"tome": {"schedule": {"low": 1}}}}, "techniques.tome.schedule", "must be a value or a list"),
        (
            {"techniques": {"tome": {"r": {"step": float("nan")}}}},
            "techniques.tome.r.step",
            "must be a positive multiple",
        ),
        ({"techniques": {"tome": {"r": float("inf")}}}, "techniques.tome.r", "must be from 0 to 64"),
        ({"techniques": {"tome": 8}}, "techniques.tome", "must be a mapping"),
        ({"budget": {"time": 0}}, "budget.time", "must be greater than 0"),
    ],
)
def test_one_fault(change: dict[str, Any], where: str, rule: str) -> None:
    found = only_fault(minimal(**change))
    assert found.where == where
    assert rule in found.rule


def test_missing_sections_are_all_named() -> None:
    found = faults_of({"name": "x"})
    assert {f.where for f in found} == {"model", "data", "objectives", "techniques"}
    assert all(f.value is ABSENT and f.rule == "must be given" for f in found)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "-rf", "a..b", "a b", "a\n", "é", "x" * 65, "$(id)", ".hidden"]
)
def test_unsafe_names_are_refused(name: str) -> None:
    assert only_fault(minimal(name=name)).where == "name"
    with pytest.raises(StudyError, match="must be 1 to 64"):
        config.check_study_name(name)


@pytest.mark.parametrize(
    ("text", "rule", "line"),
    [
        ("name: !!python/object/apply:os.system ['true']\n", "tags that build objects are refused", 1),
        ("a: 1\nb: !custom {}\n", "tags that build objects are refused", 2),
        ("a: &x [1]\nb: *x\n", "must not use aliases", 2),
        ("- a\n", "must be a mapping", None),
        ("", "must be a mapping", None),
        ("a: [1\nb: 2\n", "must be readable YAML", 2),
        ("a: 2020-99-99\n", "must be readable YAML", None),
        ("a: " + "[" * 5000, "must not be nested", None),
        ("a: " + "x" * (1 << 20), "must be at most", None),
    ],
)
def test_unsafe_or_broken_yaml_is_refused(tmp_path: Path, text: str, rule: str, line: int | None) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    found = only_fault(path)
    assert rule in found.rule
    assert found.line == line


def test_an_unknown_study_names_the_nearest_that_ships() -> None:
    assert only_fault("quik").remedy == "did you mean quick?"


def test_checkpoints_are_refused_unless_they_load_without_running_code(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def fault(path: Path) -> list[Fault]:
        try:
            load_study(minimal(model={"create": {}, "checkpoint": str(path)}))
        except StudyError as error:
            return error.faults
        return []

    names = ("a.safetensors", "b.pth", "c.safetensors", "d.pth", "e.pth", "f.pth")
    good, weights, cut, code, empty, text = (tmp_path / name for name in names)
    save_file({"weight": torch.zeros(2)}, good)
    torch.save({"weight": torch.zeros(2)}, weights)
    cut.write_bytes(good.read_bytes()[:20])
    torch.save({"weight": Path("an object of a class")}, code)
    with zipfile.ZipFile(empty, "w") as file:
        file.writestr("model/data.pkl", b"")
    text.write_text("weights")
    assert fault(good) == fault(weights) == []
    for path in (cut, code, empty, text):
        (found,) = fault(path)
        assert (found.where, found.value) == ("model.checkpoint", str(path))
        assert "safetensors" in found.remedy


def test_files_need_not_be_here_for_a_study_that_runs_elsewhere() -> None:
    there = minimal(data={"kind": "parquet", "path": "/mnt/there.parquet"})
    assert only_fault(there).where == "data.path"
    assert load_study(there, check_files=False).data.path == "/mnt/there.parquet"
    with pytest.raises(StudyError, match="must be given for kind parquet"):
        load_study(minimal(data={"kind": "parquet"}), check_files=False)


def test_the_same_study_may_change_its_budget_only() -> None:
    stored = load_study(minimal()).to_dict()
    config.check_same_study(load_study(minimal(trials=99, retries=0, budget={"time": "1h"})), stored, "results/small")
    with pytest.raises(config.StudyRefused, match=r"results/small holds another study .* differ in objectives, seeds;"):
        config.check_same_study(load_study(minimal(objectives=["params"], seeds=[1])), stored, "results/small")


# --- constraints ------------------------------------------------------------------------------------------------------


def test_constraints_are_parsed_and_judged() -> None:
    assert load_study(minimal(constraints=["size_bytes<4e6"])).parsed_constraints() == (
        Constraint("size_bytes", "<", 4e6),
    )
    limit = parse("top1_pct_drop <= 1")
    metrics = derived({"top1_pct": 96.5, "size_bytes": 50.0}, {"top1_pct": 98.0, "size_bytes": 200.0})
    assert metrics["top1_pct_drop"] == pytest.approx(1.5)
    assert metrics["size_bytes_ratio"] == 0.25
    assert limit.violation(metrics) == pytest.approx(0.5)
    assert not limit.satisfied(metrics)
    assert parse("size_bytes_ratio > 0.25").violation(metrics) > 0, "a strict bound met exactly is broken"
    assert parse("size_bytes_ratio >= 0.25").violation(metrics) <= 0
    assert parse("top1_pct >= 90").violation({"top1_pct": float("nan")}) == float("inf")


@pytest.mark.parametrize("text", ["size_bytes", "size_bytes == 3", "size_bytes < x", "1 < size_bytes", "a < 1", ""])
def test_other_texts_are_no_constraints(text: str) -> None:
    with pytest.raises(ConstraintError):
        parse(text)


def test_every_metric_can_be_constrained() -> None:
    assert set(OBJECTIVES) < set(METRICS)
    for metric in METRICS:
        assert parse(f"{metric} < -1.5e3") == Constraint(metric, "<", -1500.0)


# --- documentation ----------------------------------------------------------------------------------------------------


def readme() -> str:
    return (config.shipped_studies()["quick"].parent / "README.md").read_text()


def test_the_example_of_the_readme_is_a_good_study(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    path = tmp_path / "example.yaml"
    path.write_text(readme().split("```yaml\n")[1].split("```")[0])
    study = load_study(path)
    assert study.data.path == str(tmp_path / "flowers")
    assert len(study.known_good()) == 2


def test_the_readme_names_every_key() -> None:
    def keys(section: Any) -> list[str]:
        return list(type(section).model_fields)

    study = load_study(minimal())
    text = readme()
    for section in ("model", "data", "sampler"):
        assert not [key for key in keys(getattr(study, section)) if f"`{key}`" not in text]
    for section in ("resources", "budget", "measurement"):
        assert not [key for key in keys(getattr(study, section)) if f"`{section}.{key}`" not in text]
    assert not [key for key in keys(study.model.create) + keys(study.training.baseline) if f"`{key}`" not in text]
    assert not [key for key in StudyConfig.model_fields if key not in text]
    assert not [name for name in OBJECTIVES if f"`{name}`" not in text]


def test_peak_memory_of_a_tiny_model_on_a_cpu_is_refused_before_work_starts() -> None:
    study = load_study(tiny_study(objectives=["top1_pct", "peak_memory_bytes"]))
    with pytest.raises(StudyRefused, match=r"objectives: peak_memory_bytes .* 5,000,000 parameters .* 5,018"):
        check_measurable(study, model_info(study.context()))


# --- measurement ------------------------------------------------------------------------------------------------------


def test_a_protocol_fills_in_what_a_study_leaves_out() -> None:
    quick, standard = (load_study(minimal(measurement={"protocol": name})) for name in ("quick", "standard"))
    assert (quick.measurement.window_s, standard.measurement.window_s) == (0.5, 30.0)
    assert load_study(minimal()).measurement == quick.measurement
    own = load_study(minimal(measurement={"protocol": "standard", "window_s": 3.0})).measurement
    assert (own.window_s, own.batch_step) == (3.0, standard.measurement.batch_step)
    assert StudyConfig.from_dict(standard.to_dict()) == standard


def test_thorough_takes_three_seeds_and_refuses_fewer() -> None:
    assert load_study(minimal(measurement={"protocol": "thorough"})).seeds == [0, 1, 2]
    assert load_study(minimal(measurement={"protocol": "thorough"}, seeds=[5, 6, 7])).seeds == [5, 6, 7]
    (fault,) = faults_of(minimal(measurement={"protocol": "thorough"}, seeds=[5, 6]))
    assert (fault.where, fault.value) == ("seeds", [5, 6])
    assert "at least 3 with measurement.protocol thorough" in fault.rule


def test_remeasurements_come_from_the_budget_or_the_protocol() -> None:
    assert load_study(minimal()).remeasurements == 4
    assert load_study(minimal(measurement={"protocol": "standard"})).remeasurements == 16
    assert load_study(minimal(budget={"remeasure": 0})).remeasurements == 0


def test_batch_sizes_that_cannot_grow_are_refused() -> None:
    (fault,) = faults_of(minimal(measurement={"batch_start": 900}))
    assert fault.where == "measurement"
    assert "batch_max must not be less than batch_start" in fault.rule
