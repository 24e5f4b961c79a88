"""Shipped studies, damaged at random: each is a study or a list of faults, at once and without taking the machine."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from orchestrator.study.load import StudyError, StudyRefused, load_study, shipped_studies
from orchestrator.sweep.plan import describe_plan
from workers.techniques import registry

MOST_S, MOST_BYTES = 2.0, 500_000_000
"""Processor time of one study, since other tests run beside; and the growth of memory over all of them."""

VALUES: list[Any] = [
    *(
        0,
        -1,
        1,
        2,
        3.5,
        -0.0,
        1e308,
        5e-324,
        float("nan"),
        float("inf"),
        2**31,
        2**32,
        2**53 + 1,
        2**63,
        2**64,
        -(2**63),
    ),
    *(
        int("9" * 400),
        True,
        False,
        None,
        "",
        " ",
        "nan",
        "1e400",
        "9" * 400 + "h",
        "0x10",
        "x" * 5_000,
        "a\x00b",
        "a\x1b[31mb",
    ),
    *(
        "\ud800",
        "é",
        "../..",
        "/",
        "quick",
        "digits",
        "tome",
        "top1_pct",
        "top1_pct_drop <= " + "9" * 400,
        "params < nan",
    ),
    *(
        "size_bytes < 1e400",
        date(2024, 2, 29),
        b"\xff\x00",
        [],
        {},
        [[]],
        [{}],
        {"": None},
        {1: 2},
        {None: None},
        {"tome": {}},
    ),
    *(
        ["tome", "tome"],
        {"low": 0, "high": int("9" * 400), "step": 1e-320},
        {"low": None},
        {"low": "a", "high": [], "step": {}},
    ),
    *(
        ["x"] * 3_000,
        {"low": 1, "high": 2, "step": 0},
        {(1, 2): 3},
        {"a": {"b": {"c": {}}}},
        [None],
        [float("nan")] * 2,
    ),
]
SPLICES = [
    *(
        "\x00",
        "\x07",
        "\x1b",
        "\x85",
        "\u2028",
        "\ufeff",
        "\ud7ff",
        "\t",
        "\n",
        "  ",
        ": ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
    ),
    *(
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "!x ",
        "<<: ",
        "? ",
        "|",
        ">",
        "%",
        "@",
        "`",
        "#",
        "---",
        "...",
        ",",
        "010",
        "1:30",
    ),
]


@contextmanager
def soon() -> Iterator[None]:
    """Ends what takes more than :data:`MOST_S` of the processor."""

    def ring(*_: object) -> None:
        raise AssertionError(f"over {MOST_S} s of processor time")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, MOST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def small() -> Iterator[None]:
    """Checks that the most memory this process ever had did not grow by over :data:`MOST_BYTES`."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def judge(source: Any, storage: Path, *, plan: bool = False) -> None:
    """Loads a study, plans it too where asked."""
    with soon(), suppress(StudyError, StudyRefused):
        config = load_study(source, check_files=False, here=True)
        if plan and config.data.kind == "digits":
            list(describe_plan(config, str(storage), here=True))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every value below."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, below in inner for place in places(below, (*at, key)))]


def damaged(study: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Changes, removes, renames or adds one to three values."""
    for _ in range(draw.randint(1, 3)):
        *at, key = draw.choice([place for place in places(study) if place])
        parent = study
        for step in at:
            parent = parent[step]
        match draw.choice(["change", "change", "change", "remove", "rename", "add"]):
            case "change":
                parent[key] = deepcopy(draw.choice(VALUES))
            case "remove":
                del parent[key]
            case _ if not isinstance(parent, dict):
                parent.append(deepcopy(draw.choice(VALUES)))
            case "rename":
                parent[f"{key}e"] = parent.pop(key)
            case "add":
                parent[draw.choice(["extra", 1, None, "", "name", "options", *registry()])] = deepcopy(
                    draw.choice(VALUES)
                )
    return study


def spliced(text: str, draw: random.Random) -> str:
    """Cuts, doubles, moves or puts something into one to four places of a text."""
    for _ in range(draw.randint(1, 4)):
        one, two = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        two = min(two, one + draw.choice([1, 8, 200]))
        word = draw.choice(["tome", "magnitude_prune", "low", "high", "cpu"])
        match draw.choice(["put", "put", "put", "cut", "double", "misspell"]):
            case "put":
                text = text[:one] + draw.choice(SPLICES) + text[one:]
            case "cut":
                text = text[:one] + text[two:]
            case "double":
                text = text[:two] + text[one:]
            case "misspell":
                text = text.replace(word, word + word[-1])
    return text


def rounds(default: int) -> Any:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=default, deadline=None, suppress_health_check=checks, phases=[Phase.generate])


@pytest.fixture(autouse=True, scope="module")
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported once, torch and data among it, counts for nobody."""
    list(describe_plan(load_study("quick"), str(tmp_path_factory.mktemp("storage")), here=True))
    load_study("pumer_meter_vqa", check_files=False)


@rounds(300)
@given(st.randoms(use_true_random=False))
def test_values(tmp_path: Path, draw: random.Random) -> None:
    study = damaged(yaml.safe_load(draw.choice(list(shipped_studies().values())).read_text()), draw)
    with small():
        judge(study, tmp_path, plan=True)


@rounds(300)
@given(st.randoms(use_true_random=False))
def test_texts(tmp_path: Path, draw: random.Random) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(spliced(draw.choice(list(shipped_studies().values())).read_text(), draw), "utf-8", "surrogatepass")
    with small():
        judge(file, tmp_path, plan=True)


@rounds(100)
@given(st.binary(max_size=300))
def test_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(StudyError):
        load_study(tmp_path / "study.yaml")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@rounds(5_000)
@given(st.randoms(use_true_random=False), st.booleans())
def test_many(tmp_path: Path, draw: random.Random, text: bool) -> None:
    (test_texts if text else test_values).hypothesis.inner_test(tmp_path, draw)
