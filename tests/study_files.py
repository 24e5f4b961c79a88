"""A small study to change, and what is said of a bad one."""

from typing import Any

import pytest

from orchestrator.study.load import Fault, StudyError, load_study


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


def yaml_of(study: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(study, sort_keys=False)
