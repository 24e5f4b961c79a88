"""The studies that ship and their documentation: every recipe feasible and in its space, every key named."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study import load
from orchestrator.study.load import StudyConfig, load_study
from tests.study_files import minimal
from workers import tasks
from workers.tasks import KINDS, TaskInfo, TextInfo


def test_every_shipped_study_loads_and_survives_json() -> None:
    assert "quick" in load.shipped_studies()
    for name in load.shipped_studies():
        study = load_study(name, check_files=False)
        assert StudyConfig.from_dict(json.loads(json.dumps(study.to_dict()))) == study
        assert load_study(study.to_dict(), check_files=False) == study


def test_quick_searches_every_family_and_starts_from_known_good_recipes() -> None:
    from workers.techniques import NAMES
    from workers.techniques.composition import family_of

    study = load_study("quick")
    assert {family_of(name) for name in study.techniques} == {family_of(name) for name in NAMES}
    assert len(study.known_good()) >= 5
    assert study.trials >= 16
    text = load.shipped_studies()["quick"].read_text()
    assert "\ntrials: 16\n" in text, "scripts edit this line"


SHIPPED_DATA = {
    "quick": TaskInfo(10, 1, 8, tuple(map(str, range(10)))),
    **dict.fromkeys(("survey_small", "compiled_small"), TaskInfo(10, 3, 32, tuple(map(str, range(10))))),
}
"""What the data of each shipped study is, most of which is not here."""

CIFAR = {"cifar10": 10, "cifar100": 100}

TEXTS = {"vilt": TextInfo(30522, 40, 0), "meter": TextInfo(50265, 32, 1)}

CLASSES = {"vqa": 3129, "entailment": 3, "nlvr2": 2, "nlvr1": 2, "retrieval": 1}


def shipped_data(study: StudyConfig) -> TaskInfo:
    """What the data of a shipped study is; of those of PuMer's paper, what tokenizers and tasks say."""
    if study.data.kind.startswith("digit_"):  # these are at hand
        return tasks.info({"kind": study.data.kind})
    if study.data.kind in CIFAR:
        return TaskInfo(CIFAR[study.data.kind], 3, 224, tuple(map(str, range(CIFAR[study.data.kind]))))
    if study.name in SHIPPED_DATA:
        return SHIPPED_DATA[study.name]
    task, side = KINDS[study.data.kind].task, study.data.image_size or 0
    names = tuple(map(str, range(CLASSES[task])))
    return TaskInfo(CLASSES[task], 3, side, names, task, TEXTS[study.model.family])


@pytest.mark.parametrize("name", load.shipped_studies())
def test_every_known_good_recipe_of_a_shipped_study_is_feasible_and_in_its_space(name: str) -> None:
    from orchestrator.study.space import SearchSpace
    from workers import models

    study = load_study(name, check_files=False)
    section = {"family": study.model.family, "name": study.model.name, "create": study.model.settings()}
    info = models.model_info(models.build(section, shipped_data(study), device="meta"), study.device)
    space = SearchSpace(study.techniques, info, max_techniques=study.max_techniques)
    assert study.known_good()
    for recipe in study.known_good():
        assert space.fault(recipe) is None
        assert space.params_of(recipe)


SURVEYS = [name for name in load.shipped_studies() if name.startswith("survey_")]


@pytest.mark.parametrize("name", SURVEYS)
def test_a_survey_tries_every_technique_alone(name: str) -> None:
    study = load_study(name, check_files=False)
    alone = {recipe.steps[0].technique for recipe in study.known_good() if len(recipe.steps) == 1}
    assert alone == set(study.techniques)


@pytest.mark.parametrize("name", [name for name in SURVEYS if name.endswith("_cpu")])
def test_a_survey_on_the_cpu_takes_the_models_that_were_trained_for_the_other(name: str) -> None:
    from workers.stages.graph import compile_recipe

    cpu, cuda = (load_study(n, check_files=False) for n in (name, name.removesuffix("_cpu")))
    ours = {recipe.label(): recipe for recipe in cpu.known_good()}
    shared = [recipe for recipe in cuda.known_good() if recipe.label() in ours]
    assert len(shared) > 10
    assert cpu.data == cuda.data
    at_hand = {"data": {"kind": "digits"}}  # CIFAR is not, and its digest is part of a context
    here, there = (StudyConfig.from_dict({**study.to_dict(), **at_hand}).context() for study in (cpu, cuda))
    assert here.device != there.device
    for recipe in shared:
        assert compile_recipe(recipe, 0, here) == compile_recipe(recipe, 0, there)
    headline = [[step.technique for step in recipe.steps] for recipe in cpu.known_good()]
    assert ["dynamic_int8"] in headline
    assert ["distill", "dynamic_int8"] in headline


def readme() -> str:
    return (load.shipped_studies()["quick"].parent / "README.md").read_text()


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
