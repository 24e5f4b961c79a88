"""The data section of a study: channels, units of mean and deviation, names of the hub; ids of trials that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.load import load_study
from orchestrator.study.schema import StudyConfig
from tests.study_files import faults_of, minimal, only_fault

LIES = {"kind": "parquet", "path": "."}


@pytest.mark.parametrize(
    ("data", "where", "rule", "remedy"),
    [
        (
            {**LIES, "mean": [123.7, 116.3, 103.5]},
            "data.mean",
            "must be from 0 (black) to 1 (white), a value for each channel",
            "divided by 255: [0.4851, 0.4561, 0.4059]",
        ),
        ({**LIES, "std": [58.4]}, "data.std", "must be from 0 (black) to 1 (white)", "divided by 255: [0.2290]"),
        ({**LIES, "mean": [-0.5]}, "data.mean", "must be from 0", "leave it out"),
        ({**LIES, "mean": [300.0]}, "data.mean", "must be from 0", "leave it out"),
        ({**LIES, "mean": []}, "data.mean", "must be from 0", "leave it out"),
        ({"kind": "digits", "mean": [123.7]}, "data.mean", "must be from 0 (black) to 16 (white)", "leave it out"),
        ({**LIES, "channels": 3, "mean": [0.5]}, "data.mean", "must have 3 values, as data.channels says", ""),
        ({**LIES, "channels": 2}, "data.channels", "must be 1 or 3", ""),
        ({"kind": "huggingface", "path": "nowhere"}, "data.path", "must exist", "relative to the study file"),
        ({"kind": "parquet", "path": "owner/flowers"}, "data.path", "must exist", "relative to the study file"),
    ],
)
def test_what_the_section_may_not_say(data: dict[str, Any], where: str, rule: str, remedy: str) -> None:
    fault = only_fault(minimal(data=data))
    assert fault.where == where
    assert fault.rule.startswith(rule)
    assert remedy in fault.remedy


def test_a_number_that_no_float_holds_is_a_fault() -> None:
    assert {fault.where.partition("[")[0] for fault in faults_of(minimal(data={**LIES, "mean": [10**400]}))} == {
        "data.mean"
    }


def test_channels_are_for_images_alone() -> None:
    study = minimal(
        data={"kind": "digit_vqa", "channels": 1}, objectives=["vqa_pct"], model={"family": "vilt", "name": "vilt_tiny"}
    )
    fault = only_fault(study)
    assert (fault.where, fault.rule) == ("data.channels", "must be left out: pictures with texts have 3")


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "digits", "mean": [8.0], "std": [4.0]},
        {**LIES, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        {**LIES, "mean": [0.0], "std": [1.0], "channels": 1},
    ],
)
def test_units_of_the_data_are_taken(data: dict[str, Any]) -> None:
    assert load_study(minimal(data=data)).data.mean == data["mean"]


def test_a_name_of_the_hub_stays_one_unless_a_folder_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = minimal(data={"kind": "huggingface", "path": "owner/flowers@main"})
    assert load_study(study).data.path == "owner/flowers@main"
    (tmp_path / "owner" / "flowers@main").mkdir(parents=True)
    assert load_study(study).data.path == str(tmp_path / "owner" / "flowers@main")


def test_a_section_that_does_not_say_channels_is_what_it_was_before_it_could() -> None:
    study = load_study(minimal())
    assert "channels" not in study.context().data
    assert load_study(minimal(data={"kind": "digits", "channels": 3})).context().data["channels"] == 3
    stored = study.to_dict()
    del stored["data"]["channels"]
    assert StudyConfig.from_dict(stored).context().digest == study.context().digest
