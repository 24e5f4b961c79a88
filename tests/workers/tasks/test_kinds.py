"""The kinds of data: every record is complete, a made-up one works everywhere, and nothing else in the source lists them."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from orchestrator.study.load import StudyError, load_study
from orchestrator.study.tasks import accuracies_of
from orchestrator.sweep.plan import describe_plan
from tests.places import ROOT
from tests.studies import TINY_MODEL, tiny_study
from tests.vl_layouts import nlvr1
from tests.vl_layouts import own_cache as own_cache
from workers import tasks
from workers.metrics import ACCURACIES
from workers.models.vision_language import TASKS
from workers.tasks import IMAGES, KINDS, DataKind, TaskError
from workers.tasks.corpus import CLASSES
from workers.tasks.image_sources import ArraySource
from workers.tasks.kinds import PathRule

SOURCE = sorted(path for wing in ("orchestrator", "workers") for path in (ROOT / wing).rglob("*.py"))

# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_record_is_complete(name: str) -> None:
    kind = KINDS[name]
    assert kind.name == name
    assert kind.task == IMAGES or (kind.task in TASKS and kind.task in CLASSES)
    assert set(accuracies_of(kind.task)) <= set(ACCURACIES)
    module, _, function = kind.opener.partition(":")
    assert callable(getattr(import_module(module), function))
    assert kind.path in get_args(PathRule)
    assert kind.path_remedy
    data = (ROOT / "search_spaces" / "README.md").read_text().split("\n### data\n")[1].split("\n### ")[0]
    rows = [line.split("|")[1] for line in data.splitlines() if line.startswith("|")]
    assert f"`{name}`" in "".join(rows), "name it in the data section of search_spaces/README.md"


def test_reading_the_table_loads_the_standard_library_only() -> None:
    code = "import sys, json, workers.tasks; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    assert not loaded & {"torch", "numpy", "PIL", "pyarrow", "sklearn", "pydantic"}


# --- a made-up kind ---------------------------------------------------------------------------------------------------


def open_tiles(data: Any) -> ArraySource:
    """Opens tiles of the two photographs that come with scikit-learn; which photograph is the class."""
    with np.load(data["path"]) as file:
        images, labels = file["images"], file["labels"]
    rows = {"train": np.arange(len(labels)) % 4 > 0, "test": np.arange(len(labels)) % 4 == 0}
    arrays = {part: images[mine] for part, mine in rows.items()}
    return ArraySource(arrays, {part: labels[mine] for part, mine in rows.items()}, ["temple", "flower"], "ab" * 8)


TILES = DataKind("tiles", IMAGES, f"{__name__}:open_tiles", "needed", "name the file of tiles")


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    from sklearn.datasets import load_sample_images

    cut = [photo[:416, :640].reshape(26, 16, 40, 16, 3).swapaxes(1, 2) for photo in load_sample_images().images]
    images = np.concatenate([tiles.reshape(-1, 16, 16, 3)[::8] for tiles in cut])
    file = tmp_path / "tiles.npz"
    np.savez(file, images=images, labels=np.repeat([0, 1], len(images) // 2))
    return file


def asked(**data: Any) -> dict[str, Any]:
    create = {**TINY_MODEL["create"], "patch": 8}
    return tiny_study("tiled", model={"create": create}, data={"kind": "tiles", **data})


def faults(study: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(StudyError) as caught:
        load_study(study)
    return {fault.where: f"{fault.rule}; {fault.remedy}" for fault in caught.value.faults}


def test_a_kind_that_the_table_lacks_is_refused(tiles: Path) -> None:
    assert "'nlvr1' or 'retrieval'" in faults(asked(path=str(tiles)))["data.kind"]
    with pytest.raises(TaskError, match=r"data\.kind must be one of digits, .*, retrieval, got 'tiles'"):
        tasks.load({"kind": "tiles", "path": str(tiles)})


def test_a_kind_in_the_table_is_loaded_and_its_study_planned(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "tiles", TILES)
    data = {"kind": "tiles", "path": str(tiles)}
    task = tasks.load(data)
    assert task.info == tasks.info(data) == tasks.TaskInfo(2, 3, 16, ("temple", "flower"))
    assert [len(split) for split in (task.train, task.search, task.report)] == [156, 39, 65]
    assert {16, 3} <= set(task.report.images.shape)
    assert tasks.data_digest(data) == "ab" * 8
    with pytest.raises(TaskError, match=r"tiles\.npz: content must be the study's \(digest 0+\)"):
        tasks.load({**data, "digest": "0" * 16})
    study = load_study(asked(path=str(tiles)))
    assert study.context().data["digest"] == "ab" * 8
    lines = list(describe_plan(study, str(tiles.parent / "results")))
    assert lines[1].endswith("data tiles, 2 classes")
    assert load_study(study.to_dict()) == study


def test_what_a_record_says_of_its_path_is_kept(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(path: PathRule) -> None:
        monkeypatch.setitem(KINDS, "tiles", dataclasses.replace(TILES, path=path))

    rule("needed")
    assert faults(asked()) == {"data.path": "must be given for kind tiles; name the file of tiles"}
    assert faults(asked(path="nowhere")).keys() == {"data.path"}
    with pytest.raises(TaskError, match=r"data\.path must say where the tiles data lies"):
        tasks.load({"kind": "tiles"})
    rule("fetched")
    assert faults(asked()).keys() == {"data.path"}
    assert load_study(asked(path="nowhere")).data.path == str(Path("nowhere").absolute())
    rule("forbidden")
    assert faults(asked(path=str(tiles))) == {"data.path": "must be left out for kind tiles; name the file of tiles"}
    assert load_study(asked()).data.path is None
    rule("unused")
    assert load_study(asked()).data.path is None
    assert load_study(asked(path=str(tiles))).data.path == str(tiles)


def test_what_a_record_says_of_randaugment_is_kept(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = {**asked(path=str(tiles)), "training": {"recovery": {"epochs": 1, "augment": "randaugment"}}}
    monkeypatch.setitem(KINDS, "tiles", TILES)
    assert load_study(study).training.recovery.augment == "randaugment"
    monkeypatch.setitem(KINDS, "tiles", dataclasses.replace(TILES, randaugment=False))
    assert faults(study) == {"training.recovery.augment": "must not be randaugment for tiles; flip_crop or none"}


@pytest.mark.usefixtures("own_cache")
def test_a_kind_with_texts_need_not_have_its_tasks_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "boxes", dataclasses.replace(KINDS["nlvr1"], name="boxes"))
    data = {**nlvr1(tmp_path / "boxes"), "kind": "boxes"}
    task = tasks.load(data)
    assert (task.info.task, task.info.class_names) == ("nlvr1", ("false", "true"))
    model = {"family": "vilt", "name": "vilt_tiny", "create": {"patch_size": 8}}
    study = tiny_study(model=model, data=data, techniques={"weight_only": {}})
    assert load_study(study).data.kind == "boxes"
    assert faults({**study, "objectives": ["vqa_pct"]})["objectives[0]"].startswith(
        "must be an accuracy of the task nlvr1"
    )


# --- one place --------------------------------------------------------------------------------------------------------

TABLE = "workers/tasks/kinds.py"

FILE_FORMATS = {
    ("orchestrator/cli/io.py", "parquet"): "in which a command writes its table",
}
"""Words that are a kind's name and mean something else."""

TABLES_OF_TASKS = {
    "orchestrator/export/model_card.py": "what a model of the task does, in words",
    "orchestrator/study/tasks.py": "keys that the task alone has",
    "orchestrator/sweep/plan.py": "what the task's logits are, in words",
    "workers/metrics.py": "the tasks that an accuracy is for",
    "workers/model_settings.py": "words that a model may be built with",
    "workers/models/meter_release.py": "the published head of the task",
    "workers/models/vilt_release.py": "the published weights of the task",
    "workers/models/vision_language.py": "what the task asks of a model",
    "workers/tasks/corpus.py": "the task's classes",
}
"""Files with a literal of several tasks, some of which are called like the kind that has the task's published files."""


def strings(node: ast.AST) -> list[str]:
    return [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_other_file_names_a_kind() -> None:
    """A kind that is called like its task is judged by the next test."""
    own = set(KINDS) - {kind.task for kind in KINDS.values()}
    found = {
        (place(path), node.value)
        for path in SOURCE
        for node in nodes(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in own
    }
    assert found - {(TABLE, name) for name in own} == set(FILE_FORMATS)


def test_no_other_file_lists_kinds() -> None:
    tasks_ = {kind.task for kind in KINDS.values()}
    found: dict[str, set[str]] = {}
    for path in SOURCE:
        for node in nodes(path):
            if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
                named = {name for name in strings(node) if name in KINDS}
                if len(named) > 1:
                    found.setdefault(place(path), set()).update(named)
    assert found.pop(TABLE) == set(KINDS)
    assert found.keys() == TABLES_OF_TASKS.keys()
    assert all(named <= tasks_ for named in found.values())


def test_no_file_judges_a_kind_by_a_part_of_its_name() -> None:
    parts = {name[:end] for name in KINDS for end in range(3, len(name) + 1)}
    for path in SOURCE:
        calls = (node for node in nodes(path) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
        for call in calls:
            if call.func.attr in ("startswith", "removeprefix", "partition", "split"):  # type: ignore[attr-defined]
                named = [text for argument in call.args for text in strings(argument) if text in parts]
                assert not named, f"{place(path)}:{call.lineno} {ast.unparse(call)}"
