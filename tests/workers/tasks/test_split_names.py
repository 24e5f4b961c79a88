"""Which part a file is of: as Hugging Face datasets tells it, or refused; never left out, never in two parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.tasks import TaskError
from workers.tasks.split_names import Use, is_hidden, parts_of_files, use_of_parts


def parts(root: Path, names: tuple[str, ...], card: str = "") -> dict[str, set[str]]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if card:
        (root / "README.md").write_text(card)
    found = parts_of_files(root, sorted(root / name for name in names))
    return {part: {file.relative_to(root).as_posix() for file in files} for part, files in found.files.items()}


def shard(name: str, number: int = 0, of: int = 1) -> str:
    return f"{name}-{number:05d}-of-{of:05d}.parquet"


DATASETS_5_2 = (
    ("train: data/default/train/0000.parquet", "test: data/default/test/0000.parquet"),
    ("train: d/train/0.parquet", "validation: d/validation/0.parquet", "test: d/test/0.parquet"),
    (f"train: plain_text/{shard('train')}", f"test: plain_text/{shard('test')}"),
    (f"train: {shard('train', 0, 2)}", f"train: {shard('train', 1, 2)}", f"test: {shard('test')}"),
    (f"train: data/{shard('train')}", f"unsupervised: data/{shard('unsupervised')}", f"test: data/{shard('test')}"),
    (f"a.b: data/{shard('a.b')}", f"test: data/{shard('test')}"),
    ("train: cifar10-train.parquet", "test: cifar10-test.parquet"),
    ("train: cifar10_train_0.parquet", "validation: cifar10_valid_0.parquet"),
    ("train: my.train.parquet", "validation: my.val.parquet"),
    ("train: my_train/a.parquet", "validation: my_dev/a.parquet"),
    ("train: training/a.parquet", "test: testing/a.parquet"),
    ("train: x/training0/a.parquet", "test: x/evaluation_1/a.parquet"),
    ("test: eval.parquet", "train: train.parquet", "validation: valid.parquet"),
    ("train: train1.parquet", "test: test1.parquet"),
    ("train: 0train.parquet", "test: 0test.parquet"),
    ("train: train/x/y/a.parquet", "test: test/x/y/a.parquet"),
    ("train: a/train/0.parquet", "train: b/train/0.parquet", "test: a/test/0.parquet"),
    ("train: train/test-0.parquet", "test: test/train-0.parquet"),
    ("test: test/0.parquet", "test: test/1.parquet"),
    ("train: train/0.parquet", "train: train/1.parquet"),
    ("train: training set/0.parquet", "test: test set/0.parquet"),
    ("train: split-train/0.parquet", "test: split-test/0.parquet"),
    ("validation: val.parquet", "validation: validation.parquet", "train: train.parquet"),
    (": a.parquet", ": b.parquet"),
    (": device.parquet",),
    (": contest/0.parquet", ": devices/0.parquet"),
)
"""Layouts, each file with its part as ``datasets`` 5.2 told it; where that took all for training without a word for it, none."""


@pytest.mark.parametrize("layout", DATASETS_5_2, ids=lambda layout: layout[0].partition(": ")[2])
def test_parts_are_those_of_hugging_face_datasets(layout: tuple[str, ...], tmp_path: Path) -> None:
    told = [one.partition(": ")[::2] for one in layout]
    expected: dict[str, set[str]] = {}
    for part, name in told:
        expected.setdefault(part, set()).add(name)
    assert parts(tmp_path, tuple(name for _, name in told)) == expected


def test_folders_of_a_partitioned_table_tell_the_part(tmp_path: Path) -> None:
    found = parts(tmp_path, ("split=train/0.parquet", "x/split=val/0.parquet", "split=holdout/0.parquet"))
    assert {part: len(files) for part, files in found.items()} == {"train": 1, "validation": 1, "holdout": 1}


@pytest.mark.parametrize("name", ["dev.parquet", "test/0.parquet", "train_val.parquet"])
def test_one_file_is_no_part(name: str, tmp_path: Path) -> None:
    assert parts(tmp_path, (name,)) == {"": {name}}


CONFIGS = """---
configs:
- config_name: one
  data_files:
  - {split: train, path: one/a*}
- config_name: default
  data_files:
  - {split: train, path: 'two/**/x[0-9].parquet'}
  - {split: test, path: ['two/t?.parquet']}
---
# A card
"""


def test_the_card_comes_first(tmp_path: Path) -> None:
    names = ("one/a.parquet", "two/x1.parquet", "two/q/r/x2.parquet", "two/t3.parquet", "two/t33.parquet")
    found = parts(tmp_path, names, CONFIGS)
    assert found == {"train": {"two/x1.parquet", "two/q/r/x2.parquet"}, "test": {"two/t3.parquet"}}
    left_out = parts_of_files(tmp_path, [tmp_path / name for name in names]).left_out
    assert [file.name for file in left_out] == ["a.parquet", "t33.parquet"]


@pytest.mark.parametrize(
    ("names", "card", "message"),
    [
        (
            ("trainA.parquet", "testA.parquet"),
            "",
            "trainA.parquet and testA.parquet do neither; write train, validation",
        ),
        (("Train/0.parquet", "Test/0.parquet"), "", "must tell the parts of the data apart or say nothing"),
        (("x/split=Train/0.parquet", "x/split=test/0.parquet"), "", None),
        (
            ("test/train/0.parquet", "train/0.parquet"),
            "",
            "test/train/0.parquet must be of one part, is of train and test",
        ),
        (("train_val/0.parquet", "test/0.parquet"), "", "train_val/0.parquet must be of one part"),
        (("data/train.parquet", "other/0.parquet"), "", "other/0.parquet must be of a part, as other files are"),
        ((f"data/{shard('train')}", "extra.parquet"), "", "extra.parquet must be of a part"),
        (("a.parquet",), "---\nconfigs: 3\n---", "configs must be a list"),
        (("a.parquet",), "---\nconfigs: [\n---\n", "its header must be YAML"),
        (("a.parquet",), "---\nconfigs: [{config_name: a, data_files: {}}]\n---\n", "data_files of a must be patterns"),
        (
            ("a/0.parquet", "b/0.parquet"),
            "---\nconfigs: [{config_name: a, data_dir: a}, {config_name: b, data_dir: b}]\n---\n",
            "must have one configuration or mark one as the default, has a, b; set data.path",
        ),
        (("a/0.parquet",), "---\nconfigs: [{config_name: a, data_dir: a}]\n---\n", "set data.path to .*a"),
        (
            ("train.parquet", "test.parquet"),
            "---\nconfigs: [{config_name: a, data_files: '*.parquet'}]\n---\n",
            "must tell the parts of the data apart",
        ),
        (
            ("a.parquet", "b.parquet"),
            "---\nconfigs: [{config_name: a, data_files: [{split: train, path: a*}, {split: test, path: c*}]}]\n---\n",
            r"part 'test' \(c\*\) must fit a file",
        ),
    ],
)
def test_what_would_be_read_twice_or_left_out_is_refused(
    names: tuple[str, ...], card: str, message: str | None, tmp_path: Path
) -> None:
    if message is None:
        assert set(parts(tmp_path, names, card)) == {"Train", "test"}  # judged with the names of a column, below
        return
    with pytest.raises(TaskError, match=message):
        parts(tmp_path, names, card)


@pytest.mark.parametrize(
    ("names", "train", "report", "unused"),
    [
        ("train test", "train", "test", ""),
        ("train validation test", "train", "test", "validation"),
        ("training val", "training", "val", ""),
        ("train val dev extra", "train", "dev val", "extra"),
        ("train test unsupervised test2", "train", "test", "test2 unsupervised"),
        ("train", "", "", ""),
        ("", "", "", ""),
    ],
)
def test_what_parts_are_for(names: str, train: str, report: str, unused: str) -> None:
    found = use_of_parts("here", dict.fromkeys(names.split() or [""], "row 3"), "column 'split'")
    assert found == Use(*(frozenset(one.split()) for one in (train, report, unused)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train", "holdout"], "must hold 'train' and one of test, .*; it holds holdout, train"),
        (["test"], "must hold 'train'"),
        (["Train", "test"], "row 3: the part 'Train' must be written 'train'"),
        (["train", "testt"], "the part 'testt' must be written 'test'"),
        (["train ", "test"], "the part 'train ' must be written 'train'"),
        (["train", "test", ""], "row 3: column 'split' must say of every image which part it is of"),
    ],
)
def test_parts_that_mean_nothing_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        use_of_parts("here", dict.fromkeys(names, "row 3"), "column 'split'")


def test_hidden_names() -> None:
    hidden = (".ipynb_checkpoints", "__MACOSX", "__pycache__", ".DS_Store", "._0.jpg", "@eaDir", "$RECYCLE.BIN")
    assert all(map(is_hidden, hidden))
    assert not any(map(is_hidden, ("cat", "_cat", "cat.", "eaDir")))
