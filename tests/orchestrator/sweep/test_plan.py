"""What a plan says of the data: what will be trained on, as it is, before anything costs time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.sweep.plan import data_lines
from tests import vl_layouts
from tests.cli_calls import call
from tests.studies import tiny_study
from tests.workers.tasks.test_strange_data import colour, folder, grey, two_classes
from tests.workers.tasks.test_strange_data import own_cache as own_cache
from workers import tasks
from workers.tasks import TaskError


def said(data: dict[str, Any]) -> str:
    return "\n".join(data_lines(tasks.describe(data)))


def test_splits_classes_sizes_and_copies(tmp_path: Path) -> None:
    """Fifteen training images of cats, three of which are in the report split too, and five of dogs."""
    images = two_classes()
    images |= {f"train/cat/{i}.png": colour(200 + i, size=6) for i in range(5, 15)}
    images |= {f"test/cat/{i}.png": images[f"train/cat/{i}.png"] for i in (0, 1, 7)}
    images["test/dog/0.png"] = grey(3)
    data = {**folder(tmp_path / "data", images), "image_size": 4, "search_fraction": 0.2}
    lines = said(data).splitlines()
    assert lines[0] == "  train: 16 images of 2 classes; rarest 'dog' 4, commonest 'cat' 12"
    assert lines[1] == "  search: 4 images of 2 classes; rarest 'dog' 1, commonest 'cat' 3"
    assert lines[2] == "  report: 11 images of 2 classes; rarest 'dog' 5, commonest 'cat' 6"
    assert lines[3] == "  images: 4x4 (20), 6x6 (11) pixels, RGB (30), L (1); the model sees 4x4x3"
    assert lines[4].startswith("  decoded as a sample: ")
    assert "  1 image is grey: the one channel is repeated" in lines
    warned = [line for line in lines if line.startswith("  warning: ")]
    counts = [int(line.split()[1]) for line in warned]
    assert sum(counts) == 3
    assert all("of 11 images of the report split are in the" in line for line in warned)
    assert "byte for byte: " in warned[0]
    assert "data/test/cat/" in warned[0]


def test_a_class_that_a_split_lacks_is_a_warning(tmp_path: Path) -> None:
    images = {name: one for name, one in two_classes().items() if not name.startswith("test/dog")}
    assert "warning: the report split has no image of 1 of 2 classes: 'dog'" in said(folder(tmp_path / "data", images))


def test_limits_count(tmp_path: Path) -> None:
    data = {**folder(tmp_path / "data", two_classes()), "train_limit": 3, "report_limit": 2}
    assert [split.images for split in tasks.describe(data).splits] == [3, 2, 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train/dog/3.png": b"no image"}, r"train/dog/3\.png: must be a PNG or JPEG image"),
        (
            {"test/dog/3.png": colour(3, size=5)},
            r"test/dog/3\.png: images must have one size, this is 5x5, .* 1 of the report",
        ),
    ],
)
def test_what_would_be_found_while_it_runs_is_found_by_the_plan(
    more: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    data = folder(tmp_path / "data", two_classes() | more)
    with pytest.raises(TaskError, match=message):
        tasks.describe(data)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tiny_study(data=data)))
    for command in ("plan", "run"):
        done = call(command, str(file), storage=tmp_path / "results")
        assert done.exit_code == 2, done.stderr
        assert re.search(message, done.stderr.splitlines()[-1]), done.stderr


def test_mean_of_another_number_of_channels_is_found_by_the_plan() -> None:
    with pytest.raises(TaskError, match=r"data\.mean must have one value for each of 1 channels"):
        tasks.describe({"kind": "digits", "mean": [8.0, 8.0, 8.0]})


def test_pictures_with_texts(tmp_path: Path) -> None:
    data = vl_layouts.entailment(tmp_path / "data")
    lines = said(data)
    assert "  train: " in lines
    assert " examples with " in lines
    assert "of 3 classes; rarest " in lines
    assert "images: 4x8 pixels, RGB; the model sees " in lines


def test_the_digits_have_no_copies() -> None:
    found = tasks.describe({"kind": "digits"})
    assert [split.images for split in found.splits] == [1151, 287, 359]
    assert found.warnings == found.notes == ()
