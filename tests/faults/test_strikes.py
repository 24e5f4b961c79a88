"""A sweep that is struck at random moments loses nothing, repeats nothing, hangs nowhere and says what happened."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.strikes import STRIKES, Struck
from tests.mounts import mounted
from tests.processes import Study
from tests.studies import tiny_study

pytestmark = pytest.mark.ray

TECHNIQUES = {
    "fault": {"kind": ["none"], "level": {"low": 0, "high": 100, "step": 1}},
    "magnitude_prune": {"head_ratio": [0.0], "mlp_ratio": {"low": 0.1, "high": 0.6, "step": 0.1}, "round_to": [1]},
    "dynamic_int8": {},
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a small file system, and the same again where the study's storage is, so that it can be taken away and given
    back."""
    with mounted(tmp_path / "disk", "64m") as mount:
        results = tmp_path / "results"
        results.mkdir()
        subprocess.run(["mount", "--bind", str(mount.folder), str(results)], check=True)
        try:
            yield mount.folder
        finally:
            subprocess.run(["umount", "--lazy", str(results)], check=False)


def strike(struck: Struck, names: list[str]) -> None:
    """Strikes the study with all of these, one after the other, at moments of the seed's choosing, and runs it to its end."""
    trials = 6
    left = list(names)
    while left:
        if not struck.alive:
            if struck.process is not None:
                struck.look("its own end")
                assert "vitpareto repair" not in struck.text(), struck.text()
            trials = max(trials, len(struck.ended()) + 6)
            struck.start(trials)
        time.sleep(struck.chance.uniform(0, 8))
        if struck.strike(left[0]):
            print(f"{len(names) - len(left) + 1:4d} {left[0]}", flush=True)
            del left[0]
    struck.wait(f"all of {', '.join(names[-3:])}")
    for _ in range(5):  # a study that paused goes on where it is told to
        struck.start(trials)
        struck.wait("the last run")
        if struck.process is not None and struck.process.returncode == 0:
            return
    struck.count.hung.append(f"does not come to an end: {struck.text()[-3000:]}")


def run(tmp_path: Path, disk: Path | None, names: list[str], seed: int) -> Struck:
    struck = Struck(Study(tmp_path, tiny_study("struck", techniques=TECHNIQUES, retries=3)), seed, disk)
    try:
        strike(struck, names)
    finally:
        struck.tidy()
    print(dict(struck.audit().done), struck.count.faults)
    return struck


FEW = ["worker killed", "disk full", "artefact cut", "run and workers killed"]


@pytest.mark.timeout(900)
def test_a_few_strikes(tmp_path: Path, disk: Path) -> None:
    struck = run(tmp_path, disk, FEW, seed=1)
    assert struck.count.faults == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2, 6))
def test_a_hundred_strikes(tmp_path: Path, disk: Path, seed: int) -> None:
    """Four studies, twenty-five strikes each."""
    chance = random.Random(seed)
    often = sorted(STRIKES.keys() - {"part rotten"})  # of two generations in a row nothing is left to read
    names = ["part rotten", *(name for _ in range(2) for name in chance.sample(often, len(often)))][:25]
    struck = run(tmp_path, disk, chance.sample(names, len(names)), seed)
    assert sum(struck.count.done.values()) == 25
    assert struck.count.faults == {}
