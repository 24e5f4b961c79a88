"""The key early_stopping: defaults by the length of the recovery, whole epochs, faults; it changes no trial's name."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.study.load import MAY_CHANGE, StudyError, load_study
from orchestrator.study.schema import StudyConfig
from tests.studies import tiny_study


def study(epochs: int, *value: Any) -> StudyConfig:
    more = {"early_stopping": value[0]} if value else {}
    return load_study(tiny_study(training={"recovery": {"epochs": epochs}}, **more))


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(1, ()), (3, ()), (4, (0.25, 0.5)), (5, (0.2, 0.4)), (8, (0.125, 0.375)), (10, (0.2, 0.4))]
)
def test_a_study_that_does_not_say_is_stopped_early_from_four_epochs_on(epochs: int, rungs: tuple[float, ...]) -> None:
    assert study(epochs).rungs == rungs
    assert study(epochs).eta == 2
    assert study(epochs, "none").rungs == ()


@pytest.mark.parametrize(
    ("epochs", "asked", "rungs"),
    [
        (2, [0.125, 0.375], (0.5,)),
        (8, [0.01, 0.1, 0.9], (0.125,)),
        (8, [0.3], (0.375,)),
        (1, [0.5], ()),
        (7, [2 / 7], (2 / 7,)),
    ],
)
def test_rungs_are_whole_epochs_and_none_is_at_the_end(
    epochs: int, asked: list[float], rungs: tuple[float, ...]
) -> None:
    config = study(epochs, {"rungs": asked})
    assert config.rungs == rungs
    assert StudyConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (False, "early_stopping: must be none, or a mapping of eta and rungs (got False); for example {eta: 2, rungs"),
        ("off", "early_stopping: must be none, or a mapping of eta and rungs (got 'off')"),
        ({"eta": 1}, "early_stopping.eta: must be greater than 1 (got 1)"),
        (
            {"rungs": [0.5, 0.25]},
            "early_stopping.rungs: must be ascending shares of the recovery training (got [0.5, 0.25])",
        ),
        ({"rungs": [0.25, 0.25]}, "early_stopping.rungs: must be ascending"),
        ({"rungs": [0.0]}, "early_stopping.rungs[0]: must be greater than 0"),
        ({"rungs": [1.0]}, "early_stopping.rungs[0]: must be less than 1"),
        ({"rung": [0.5]}, "early_stopping.rung: must be a known key (got 'rung'); did you mean rungs?"),
    ],
)
def test_faults_say_what_must_be(value: Any, fault: str) -> None:
    with pytest.raises(StudyError) as caught:
        study(8, value)
    assert fault in str(caught.value)


def test_it_is_no_part_of_the_question() -> None:
    assert study(8).context().digest == study(8, "none").context().digest
    assert "early_stopping" in MAY_CHANGE
    older = {name: value for name, value in study(8).to_dict().items() if name != "early_stopping"}
    assert StudyConfig.from_dict(older).rungs == (0.125, 0.375)
