"""Study files: defaults, completed techniques and recipes, units, paths, protocols."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.load import StudyConfig, StudyRefused, check_measurable, load_study, model_info
from tests.studies import tiny_study
from tests.study_files import faults_of, minimal, yaml_of
from workers.trial import Step


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
    assert set(study.techniques["tome"]) == {"r", "schedule", "proportional_attention", "where"}
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
    code = "import sys, orchestrator.study.load; sys.exit(bool({'torch', 'timm', 'ray', 'optuna'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_peak_memory_of_a_tiny_model_on_a_cpu_is_refused_before_work_starts() -> None:
    study = load_study(tiny_study(objectives=["top1_pct", "peak_memory_bytes"]))
    with pytest.raises(StudyRefused, match=r"objectives: peak_memory_bytes .* 5,000,000 parameters .* 5,018"):
        check_measurable(study, model_info(study.context()))


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
