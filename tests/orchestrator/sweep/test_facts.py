"""What is known of recipes comes in the background, is kept, and never costs a study more than the knowledge."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.study.load import load_study
from orchestrator.sweep.facts import BackgroundFacts
from orchestrator.sweep.facts_process import mean
from tests.processes import environment
from tests.studies import recipe, tiny_study
from workers.metrics import EXACT
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.structure import Structures
from workers.techniques import versions
from workers.trial import Context, Recipe, TrialSpec, trial_id

TOME, PRUNED = (
    recipe(("tome", {"r": 1})),
    recipe(("magnitude_prune", {"mlp_ratio": 0.5, "head_ratio": 0.0, "round_to": 1})),
)
LEARNED = recipe(("importance_prune", {"mlp_ratio": 0.5, "head_ratio": 0.0, "round_to": 1}))
WAIT_S = 120.0
"""The process imports torch first."""


@pytest.fixture(scope="module")
def context() -> Context:
    return load_study(tiny_study()).context()


def until(true: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < WAIT_S, "it did not come true"
        time.sleep(0.02)


def test_answers_come_in_the_background_and_are_kept(tmp_path: Path, context: Context) -> None:
    storage, structures = LocalStorage(tmp_path), Structures(context)
    with BackgroundFacts(context, (0,), storage, "s") as facts:
        assert facts.of(TOME) is None
        facts.ask_for([TOME, PRUNED, Recipe(), LEARNED])
        until(lambda: facts.of(LEARNED) is not None)
        for asked in (TOME, PRUNED, Recipe()):
            assert facts.of(asked) == structures.facts(asked, 0)
            assert set(facts.of(asked) or ()) == set(EXACT) == facts.names
        assert facts.of(LEARNED) == {}
    again = BackgroundFacts(context, (0,), storage, "s")
    assert again.of(TOME) == structures.facts(TOME, 0)
    assert again.of(LEARNED) is None  # may be known by now
    assert BackgroundFacts(context, (0, 1), storage, "s").of(TOME) is None  # another question


def test_what_a_trial_has_learned_is_known_of_its_conversions(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    packed = Recipe((*LEARNED.steps, *recipe(("precision", {})).steps))
    with BackgroundFacts(context, (0,), storage, "s") as facts:
        facts.ask_for([packed])
        until(lambda: facts.of(packed) is not None)
        assert facts.of(packed) == {}
        name = trial_id(LEARNED, 0, context, versions())
        spec = TrialSpec("s", name, LEARNED, 0, context, storage.url, objectives=("size_bytes",))
        assert run_trial(spec).status == "ok"
        facts.learnt(PRUNED)
        assert facts.of(packed) == {}  # another surgery tells nothing of it
        facts.learnt(LEARNED)
        assert facts.of(packed) is None
        facts.ask_for([packed])
        until(lambda: facts.of(packed) is not None)
        assert set(facts.of(packed) or ()) == set(EXACT)


def test_the_death_of_the_process_costs_the_knowledge_alone(
    tmp_path: Path, context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vitpareto")
    with BackgroundFacts(context, (0,), LocalStorage(tmp_path), "s") as facts:
        facts.ask_for([TOME])
        until(lambda: facts.of(TOME) is not None)
        assert facts._process is not None
        facts._process.kill()
        until(lambda: bool(caplog.records))
        facts.ask_for([PRUNED])
        assert facts.of(PRUNED) is None
        assert facts.of(TOME) is not None
    assert [record.message for record in caplog.records] == [
        "nothing more is known of recipes before they are trained: the process that calculates it has ended; the study goes on "
        "without it"
    ]


def test_a_recipe_that_cannot_be_told_costs_no_other(tmp_path: Path, context: Context) -> None:
    nobody = Recipe.from_json('[{"technique": "nobody_knows", "config": {}}]')
    with BackgroundFacts(context, (0,), LocalStorage(tmp_path), "s") as facts:
        facts.ask_for([nobody, TOME])
        until(lambda: facts.of(TOME) is not None)
        assert facts.of(nobody) == {}


def test_a_damaged_file_is_calculated_again(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    facts = BackgroundFacts(context, (0,), storage, "s")
    good = {"size_bytes": 1.0, "params": 2.0, "macs": 3.0}
    for number, text in enumerate(
        ("{", "[]", '{"a": 1}', '{"b": {"size_bytes": "large"}}', '{"c": {"size_bytes": 1, "params": 2, "macs": 3}}')
    ):
        storage.put_atomic(f"s/facts/{facts._key}-{number}.json", text.encode())
    assert BackgroundFacts(context, (0,), storage, "s")._known == {"c": good}


DRIVER = """
import sys
from orchestrator.study.load import load_study
from orchestrator.sweep.facts import BackgroundFacts
from tests.studies import recipe, tiny_study
from workers.node.storage import LocalStorage
facts = BackgroundFacts(load_study(tiny_study()).context(), (0,), LocalStorage(sys.argv[1]), "s")
facts.ask_for([recipe(("tome", {"r": 1}))])
print(facts._process.pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_its_driver_however_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True
    ) as driver:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())
        os.kill(child, 0)
        driver.send_signal(signal.SIGKILL)
        driver.wait()

        def gone() -> bool:
            stat = Path(f"/proc/{child}/stat")
            return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

        until(gone)


def test_with_several_seeds_only_what_all_know_is_known() -> None:
    assert mean([{"size_bytes": 1.0, "macs": 4.0}, {"size_bytes": 2.0}]) == {"size_bytes": 1.5}
