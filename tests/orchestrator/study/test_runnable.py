"""Studies that nothing could run: said from the file alone, with place, rule, value and remedy, before anything slow is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orchestrator.study import runnable
from orchestrator.study.constraints import parse
from orchestrator.study.load import Fault, StudyError, StudyRefused, check_runs_here, load_study
from tests.cli_calls import process
from tests.studies import tiny_study


def faults(**changes: Any) -> dict[str, Fault]:
    with pytest.raises(StudyError) as caught:
        load_study(tiny_study(**changes), here=True)
    return {fault.where: fault for fault in caught.value.faults}


@pytest.mark.parametrize(
    ("texts", "where"),
    [
        (["size_bytes < 1e6", "size_bytes > 2e6"], "constraints[1]"),
        (["size_bytes >= 1e6", "top1_pct > 3", "size_bytes < 1e6"], "constraints[2]"),
        (["top1_pct > 100"], "constraints[0]"),
        (["size_bytes < 0"], "constraints[0]"),
        (["top1_pct_drop < -100"], "constraints[0]"),
        (["size_bytes_ratio < 0"], "constraints[0]"),
        (["size_bytes >= 1e6", "size_bytes <= 1e6"], None),
        (["top1_pct_drop < 0", "top1_pct >= 100", "size_bytes_ratio < 1", "size_bytes > 1e6"], None),
        (["size_bytes < 1e6", "size_bytes < 2e6", "size_bytes > 5e5"], None),
    ],
)
def test_constraints_that_exclude_each_other(texts: list[str], where: str | None) -> None:
    found = runnable.constraint_faults(tuple(map(parse, texts)))
    assert [fault.where for fault in found] == ([] if where is None else [where])


def test_the_fault_names_what_it_contradicts() -> None:
    fault = faults(constraints=["size_bytes < 1e6", "size_bytes > 2e6"])["constraints[1]"]
    assert fault.rule == "must leave a value of size_bytes: none also is < 1e+06"
    assert (fault.value, fault.remedy) == ("size_bytes > 2e+06", "change or remove one")


def test_what_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = faults(resources={"gpus": 1, "memory": "900TiB"}, device="cuda")
    assert found["resources.gpus"].rule.startswith("must be at most what this machine has: 0 GPUs")
    assert "--address" in found["resources.gpus"].remedy
    assert found["resources.memory"].rule.startswith("must be at most what this machine has: ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert load_study(tiny_study(resources={"gpus": 2}, device="cuda"), here=True).resources.gpus == 2
    cpus = (psutil.cpu_count() or 1) + 1
    assert load_study(tiny_study(resources={"cpus": cpus}), here=True).resources.cpus == cpus  # runs, if slower
    config = load_study(tiny_study(resources={"gpus": 3}, device="cuda"))  # elsewhere
    with pytest.raises(StudyRefused, match=r"study tiny: resources\.gpus: must be at most"):
        check_runs_here(config)


def test_models_that_are_too_large() -> None:
    wide = {"width": 10**6, "depth": 4, "heads": 4, "patch": 4}
    assert faults(model={"create": wide})["model.create.width"].rule == "must be at most 65,536"
    found = faults(model={"create": {**wide, "width": 65_536, "depth": 256}})
    assert "must fit this machine's memory" in found["model"].rule
    assert "parameters or more take" in found["model"].rule
    deep = {"family": "meter", "name": "meter_tiny", "create": {"text_depth": 10**4}}
    assert faults(model=deep, data={"kind": "digit_vqa"}, objectives=["vqa_pct", "size_bytes"]).keys() == {
        "model.create.text_depth"
    }
    config = load_study(tiny_study())
    check_runs_here(config, params=10**6)
    with pytest.raises(StudyRefused, match="model: must fit this machine's memory"):
        check_runs_here(config, params=10**15)


@pytest.mark.parametrize("study", ["quick", "vlm_quick", "vlm_meter"])
def test_the_least_is_no_more_than_the_model_has(study: str) -> None:
    from orchestrator.study.schema import model_info

    config = load_study(study)
    assert 0 < runnable.least_parameters(config.model) <= model_info(config.context()).params


@pytest.mark.parametrize(
    ("options", "rule", "remedy"),
    [
        ({"checkpoint_path": "/etc/passwd"}, "must be a setting of a model's structure", "known: img_size"),
        ({"pretrained_cfg_overlay": {"file": "x.pth"}}, "must be a setting of a model's structure", ""),
        ({"cache_dir": "/tmp"}, "must be a setting of a model's structure", ""),
        ({"act_layer": "relu"}, "must be a setting of a model's structure", ""),
        ({"drop_path_rates": 0.1}, "must be a setting of a model's structure", "did you mean drop_path_rate?"),
        ({"drop_path_rate": 7}, "must be at most 1", ""),
        ({"depth": "12"}, "must be a valid integer", ""),
    ],
)
def test_options_are_settings_of_a_structure(options: dict[str, Any], rule: str, remedy: str) -> None:
    (key,) = options
    found = faults(model={"name": "vit_tiny_patch16_224", "options": options})[f"model.options.{key}"]
    assert (found.rule, found.value, remedy in found.remedy) == (rule, options[key], True)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("../vit_tiny_patch16_224", "must be a timm model"),
        ("hf-hub:vit", "must be hf-hub:owner/name"),
        ("hf-hub:../../etc/passwd", "must be hf-hub:owner/name"),
        ("local-dir:/nowhere", "must be a folder that exists"),
        ("local-dir:/etc", "must be a folder of a model that can be read"),
    ],
)
def test_a_name_is_one_of_timm_of_a_folder_or_of_the_hub(name: str, rule: str) -> None:
    assert faults(model={"name": name})["model.name"].rule.startswith(rule)


@pytest.mark.parametrize(
    ("expression", "target", "rule"),
    [
        ("blocks.(", "x", "must be a regular expression"),
        ("blocks", r"\1", "must lead to a name of groups that it has"),
        ("blocks", 3, "must lead to a name of timm's"),
        ("blocks", "", "must lead to a name of timm's"),
        ("blocks", "a{q}{k}", "must lead to a name with at most one"),
        ("blocks", "a{p1 p2}", "must lead to a name with at most one"),
        ("blocks", "a{h h d}", "must lead to a name with at most one"),
    ],
)
def test_a_rule_of_the_key_map_says_what_is_wrong_with_it(expression: str, target: object, rule: str) -> None:
    found = faults(model={"create": {}, "checkpoint": "x.pth", "key_map": {expression: target}})
    assert found[f"model.key_map.{expression}"].rule.startswith(rule)


def test_it_is_said_without_torch(tmp_path: Path) -> None:
    study = tiny_study(constraints=["size_bytes < 1e6", "size_bytes > 2e6"], resources={"memory": "900TiB"})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    code = (
        "import sys\nfrom orchestrator.study.load import StudyError, load_study\n"
        "try:\n    load_study('study.yaml', here=True)\n"
        "except StudyError as error:\n    print(len(error.faults), sorted({'torch', 'timm', 'ray'} & set(sys.modules)))"
    )
    done = process("-c", code, folder=tmp_path)
    assert done.stdout == "2 []\n", done.stderr
