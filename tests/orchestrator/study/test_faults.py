"""Bad study files: every fault at once, where it is, the rule and the remedy."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study import load
from orchestrator.study.load import Fault, StudyError, load_study, shipped_studies
from orchestrator.study.yaml_lines import ABSENT
from tests.study_files import faults_of, minimal, only_fault, yaml_of

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
  tome: {r: 999, shedule: constant}
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
    "model.checkpoint": (2, "must be a file or folder that exists", "relative to the study file"),
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
    "techniques.tome.r": (12, "must be from 0 to 288", "the nearest allowed value is 288"),
    "techniques.tome.shedule": (12, "must be a parameter of the technique", "did you mean schedule?"),
    "techniques.nystrom.landmarks.high": (13, "must be 10 plus a multiple of the step 4", "18"),
    "techniques.nystrom.iterations": (13, "must have at least one choice", "leave it out"),
    "techniques.weight_only.bits": (14, "must be one of 8, 7, 6, 5, 4, 3, 2", "for example 8"),
    "techniques.magnitude_prune.head_ratio.step": (15, "must be a positive multiple of 0.05", "default is 0.1"),
    "recipes[0]": (19, "must be a legal combination: dynamic_int8 + precision", "leave one of them out"),
    "recipes[1][0]": (20, "must be one of the study's techniques", ""),
    "recipes[2][0].dynamic_int8.granularity": (21, "must be what the study searches", "for example 'per_channel'"),
    "sampler.name": (22, "must be one of recipe, tpe, nsga2, random", "did you mean tpe?"),
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
    text = "bad.yaml: techniques.tome.r (line 12): must be from 0 to 288 (got 999); the nearest allowed value is 288"
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
        ({"model": {"create": {}, "pretrained": True}}, "model", "pretrained needs a timm name"),
        ({"data": {"kind": "digit"}}, "data.kind", "must be 'digits'"),
        ({"data": {"kind": "digits", "search_fraction": 1.0}}, "data.search_fraction", "must be less than 1"),
        ({"data": {"kind": "imagefolder", "path": "/nowhere"}}, "data.path", "must exist"),
        ({"trials": "16"}, "trials", "must be a valid integer"),
        ({"model": {"name": "resnet18"}}, "model.name", "must be a plain vision transformer"),
        ({"sampler": {"options": {"nonsense": 1}}}, "sampler.options.nonsense", "must be an argument of the sampler"),
        (
            {"sampler": {"name": "tpe", "options": {"n_ei_candidates": 0}}},
            "sampler.options.n_ei_candidates",
            "must be greater than or equal to 1",
        ),
        (
            {"sampler": {"name": "nsga2", "options": {"mutation_prob": 2.0}}},
            "sampler.options.mutation_prob",
            "must be less than or equal to 1",
        ),
        (
            {"sampler": {"name": "random", "options": {"group": True}}},
            "sampler.options.group",
            "must be an argument of the sampler",
        ),
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
        ({"techniques": {"tome": {"r": "many"}}}, "techniques.tome.r", "must be a number from 0 to 288"),
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
        ({"techniques": {"tome": {"r": float("inf")}}}, "techniques.tome.r", "must be from 0 to 288"),
        ({"techniques": {"tome": 8}}, "techniques.tome", "must be a mapping"),
        ({"budget": {"time": 0}}, "budget.time", "must be greater than 0"),
        ({"trials": int("9" * 400)}, "trials", "must be less than or equal to 1000000000"),
        ({"sampler": {"seed": 2**32}}, "sampler.seed", "must be less than or equal to 4294967295"),
        ({"sampler": {"options": {"seed": 2**32}}}, "sampler.options.seed", "must be less than or equal to 4294967295"),
        (
            {"sampler": {"name": "tpe", "options": {"n_ei_candidates": "many"}}},
            "sampler.options.n_ei_candidates",
            "must be a valid int",
        ),
        (
            {"resources": {"memory": int("9" * 400)}},
            "resources.memory",
            "must be less than or equal to 1000000000000000",
        ),
        ({"techniques": {"tome": {"r": {"step": 1e308}}}}, "techniques.tome.r.step", "must be a positive multiple"),
        ({"techniques": {"svd": {"keep": {"step": 1e308}}}}, "techniques.svd.keep.step", "must be a positive multiple"),
        ({"recipes": [["tomee", "weight_only"]]}, "recipes[0][0]", "must be one of the study's techniques"),
        ({"techniques": {"tome": {"r": int("9" * 400)}}}, "techniques.tome.r", "must be from 0 to 288"),
        ({"techniques": {"tome": {"r": {(1, 2): 3}}}}, "techniques.tome.r.(1, 2)", "must be one of low, high, step"),
        ({"model": {"create": {}, "checkpoint": "x" * 5_000}}, "model.checkpoint", "must be a file or folder"),
        ({"data": {"kind": "imagefolder", "path": "a\0b"}}, "data.path", "must exist"),
        ({"data": {"kind": "imagefolder", "path": "x" * 5_000}}, "data.path", "must exist"),
    ],
)
def test_one_fault(change: dict[str, Any], where: str, rule: str) -> None:
    found = only_fault(minimal(**change))
    assert found.where == where
    assert rule in found.rule


def test_a_technique_that_is_misspelt_everywhere_is_named_where_it_is_defined(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(shipped_studies()["quick"].read_text().replace("tome", "tomee"))
    found = only_fault(tmp_path / "s.yaml")
    assert (found.where, found.rule, found.remedy) == (
        "techniques.tomee",
        "must be a known technique",
        "did you mean tome?",
    )


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
        load.check_study_name(name)


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
        ("a: 1\nb: \x07\n", "must not hold control characters", 2),
        ("a: 1\n# \x1b[31m\n", "must not hold control characters", 2),
        ("a: 1\n\n\x00", "must not hold control characters", 3),
    ],
)
def test_unsafe_or_broken_yaml_is_refused(tmp_path: Path, text: str, rule: str, line: int | None) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    found = only_fault(path)
    assert rule in found.rule
    assert found.line == line


@pytest.mark.parametrize(
    ("text", "where", "rule", "remedy"),
    [
        ("trials: 010", "trials", "YAML 1.1 reads 010 as the octal number 8", "write 10"),
        ("trials: 1_6\nseeds: [00]", "seeds[0]", "reads 00 as the octal number 0", "write 0"),
        ("budget: {time: 1:30}", "budget.time", "YAML 1.1 reads 1:30 as the number 90", "give a unit (90s, 30m, 2h)"),
        ("budget: {time: 1:30:00.5}", "budget.time", "reads 1:30:00.5 as the number 5400.5", "give a unit"),
    ],
)
def test_numbers_that_versions_of_yaml_read_differently_are_refused(
    tmp_path: Path, text: str, where: str, rule: str, remedy: str
) -> None:
    (tmp_path / "s.yaml").write_text(yaml_of(minimal()) + text)
    (found,) = faults_of(tmp_path / "s.yaml")
    assert found.where == where
    assert rule in found.rule
    assert remedy in found.remedy
    assert found.line == len((yaml_of(minimal()) + text).splitlines())


def test_quoted_text_is_text(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml_of(minimal()).replace("name: small", "name: '010'") + "trials: 1_6\n")
    assert (load_study(tmp_path / "s.yaml").name, load_study(tmp_path / "s.yaml").trials) == ("010", 16)


@pytest.mark.parametrize("name", ["x" * 5_000, "a\0b", "quik"])
def test_an_unknown_study_is_none_whatever_its_name(name: str) -> None:
    assert "must be a study file that exists" in only_fault(name).rule


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
    more = {"trials": 99, "retries": 0, "budget": {"time": "1h"}, "sampler": {"name": "random", "seed": 3}}
    load.check_same_study(load_study(minimal(**more)), stored, "results/small")
    with pytest.raises(load.StudyRefused, match=r"results/small holds another study .* differ in objectives, seeds;"):
        load.check_same_study(load_study(minimal(objectives=["params"], seeds=[1])), stored, "results/small")
