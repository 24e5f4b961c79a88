"""Provenance: what a row came from is in the row, names this machine, costs next to nothing, and is there after a failure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import timm
import torch

from orchestrator.study.load import load_study
from tests.processes import environment
from tests.studies import tiny_study
from workers.node import provenance as module
from workers.node.provenance import provenance
from workers.run import run_trial
from workers.trial import Recipe, TrialSpec


@pytest.fixture(scope="module")
def spec() -> TrialSpec:
    return TrialSpec("s", "t", Recipe(), 3, load_study(tiny_study()).context(), "/nowhere")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    for cached in (module._git, module._machine, module._versions):
        cached.cache_clear()
    yield
    for cached in (module._git, module._machine, module._versions):
        cached.cache_clear()


def test_it_names_versions_machine_data_and_seeds(spec: TrialSpec) -> None:
    found = provenance(spec, "a1")
    assert json.loads(json.dumps(found)) == found
    assert found["attempt"] == "a1"
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["timm"] == timm.__version__
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["seeds"] == {"trial": 3, "baseline": 0, "split": 0}
    assert found["data_digest"] == spec.context.data["digest"]
    assert found["protocol"] == spec.context.measurement["protocol"]
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["device_name"]


def test_a_failed_trial_has_one_too(spec: TrialSpec, tmp_path: Path) -> None:
    result = run_trial(replace(spec, storage=str(tmp_path), storage_token="of another storage"))
    assert result.status != "ok"
    assert result.provenance["attempt"] == result.attempt_id
    assert result.provenance["versions"]["torch"] == torch.__version__


ELSEWHERE = """
import json, sys
from workers.trial import TrialSpec
from workers.node.provenance import provenance
print(json.dumps(provenance(TrialSpec.from_dict(json.load(sys.stdin)), "a1")["device_name"]))
"""


def test_a_device_that_is_not_there_raises_nothing(spec: TrialSpec) -> None:
    asked = json.dumps(replace(spec, context=replace(spec.context, device="cuda")).to_dict())
    env = environment(CUDA_VISIBLE_DEVICES="")  # this machine may have one
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, input=asked, env=env, capture_output=True, text=True, timeout=200, check=True)
    assert json.loads(done.stdout) is None


def git(folder: Path, *arguments: str) -> None:
    own = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *own, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in which this module lies."""
    folder = tmp_path / "code" / "workers" / "node"
    folder.mkdir(parents=True)
    file = Path(shutil.copy(module.__file__, folder))
    git(tmp_path / "code", "init", "-q")
    git(tmp_path / "code", "add", ".")
    git(tmp_path / "code", "commit", "-qm", "first")
    monkeypatch.setattr(module, "__file__", str(file))
    return tmp_path / "code"


def test_the_commit_and_whether_the_tree_is_that_of_it(repository: Path) -> None:
    clean = module._git()
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert clean == {"git_commit": head.stdout.strip(), "git_dirty": False}
    (repository / "workers" / "new.py").write_text("")
    assert module._git() == clean  # what the process has imported is what counts
    module._git.cache_clear()
    assert module._git() == {**clean, "git_dirty": True}


def test_code_outside_a_repository_and_a_machine_without_git(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._git() == {"git_commit": None, "git_dirty": None}
    monkeypatch.undo()
    shutil.rmtree(repository / ".git")
    monkeypatch.setattr(module, "__file__", str(repository / "workers" / "node" / "provenance.py"))
    module._git.cache_clear()
    assert module._git() == {"git_commit": None, "git_dirty": None}
