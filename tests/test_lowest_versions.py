"""The lower bounds of pyproject.toml: with each dependency at its lowest, artefacts made here load and commands work.

torch and torchvision alone stay as they are here: another one is gigabytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.orchestrator.test_old_results import NAME, WRITTEN
from tests.places import ROOT
from tests.processes import environment
from tests.studies import tiny_study
from tests.workers.artefact.test_artefact import compress, images, save
from tests.workers.artefact.test_hostile_manifests import CHAINS
from workers import artefact
from workers.techniques.contract.models import JOINT, VARIANTS, build, describe, inputs

AS_HERE = ("torch", "torchvision")

LOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from workers import artefact
from workers.techniques.contract.models import inputs
images = load_file("images.safetensors")["images"]
for folder in sorted(Path("artefacts").iterdir()):
    given = images if folder.name.isdigit() else inputs(folder.name)
    with torch.inference_mode():
        save_file({"logits": artefact.load(folder)(given)}, f"{folder.name}.safetensors")
"""


def lowest() -> dict[str, str]:
    """Returns every dependency with its lowest version, extras in its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = dict(re.fullmatch(r"([\w\-\[\],]+)>=([\d.]+)", text).groups() for text in project["dependencies"])  # type: ignore[union-attr]
    return {name: version for name, version in found.items() if name not in AS_HERE}


def test_every_dependency_has_a_lower_bound() -> None:
    assert {"timm", "transformers", "safetensors", "duckdb"} <= lowest().keys()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees the lowest versions first, then what is installed here."""
    place = tmp_path_factory.mktemp("lowest") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text("\n".join({sysconfig.get_path(kind) for kind in ("purelib", "platlib")}))
    wanted = [f"{name}=={version}" for name, version in lowest().items()]
    done = subprocess.run(
        [str(place / "bin/python"), "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return place / "bin/python"


def call(python: Path, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_artefacts_made_here_load_there_and_compute_the_same(python: Path, tmp_path: Path) -> None:
    expected = {}
    for number, chain in enumerate(((), *CHAINS)):
        model, steps = compress(*chain)
        save(model, tmp_path / "artefacts" / str(number), steps)
        expected[str(number)] = (model, images())
    for variant in (*VARIANTS, *JOINT):
        model = build(variant).eval()
        artefact.save(model, tmp_path / "artefacts" / variant, model_description=describe(variant), steps=[])
        expected[variant] = (model, inputs(variant))
    save_file({"images": images()}, tmp_path / "images.safetensors")
    call(python, "-c", LOAD, folder=tmp_path)
    for name, (model, given) in expected.items():
        with torch.inference_mode():
            torch.testing.assert_close(load_file(tmp_path / f"{name}.safetensors")["logits"], model(given), msg=name)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_commands_work_there(python: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_study(trials=2, recipes=[["precision"], ["dynamic_int8"]])))

    def vitpareto(*arguments: str) -> str:
        return call(python, "-m", "orchestrator.cli", *arguments, folder=tmp_path)

    assert "Example: vitpareto query" in vitpareto("query", "--help")
    assert "search space" in vitpareto("plan", "tiny.yaml")
    assert f"results: {tmp_path}/results/tiny" in vitpareto("run", "tiny.yaml")
    for name, storage in (("tiny", "results"), (NAME, str(WRITTEN))):
        stored = ("--storage", storage)
        assert json.loads(vitpareto("pareto", name, "--objectives", "top1_pct,size_bytes", "--format", "json", *stored))
        assert "ok" in vitpareto("query", name, "select status, count(*) as n from trials group by status", *stored)
        assert vitpareto("status", name, *stored)
        assert vitpareto("report", name, "-o", str(tmp_path / f"{name}.html"), *stored)
        assert vitpareto("report", name, "-o", str(tmp_path / f"{name}.png"), *stored)
