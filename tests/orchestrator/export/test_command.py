"""The folder that an export writes, and the command that writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.export import folder, loading_code
from orchestrator.export.folder import CARD, RECORD, export_trial
from tests import exports
from tests.exports import NAME, REPOSITORY, Study
from workers import artefact
from workers.artefact import export, export_formats
from workers.artefact.export_formats import ExportFormat, ExportRefused

study = exports.study


def test_an_earlier_export_is_replaced_only_when_asked(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    study.export("baseline", out, "artefact")  # an empty folder is as good as none
    (out / "stale").touch()
    with pytest.raises(ExportRefused, match=r"holds an export already; .*--overwrite"):
        study.export("fp16", out, "artefact")
    before = (out / RECORD).read_bytes()
    with pytest.raises(ExportRefused, match="cannot carry"):
        study.export("int8", out, "onnx", overwrite=True)
    assert (out / RECORD).read_bytes() == before
    study.export("fp16", out, "artefact", overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == [CARD, RECORD, artefact.MANIFEST, artefact.TENSORS]
    assert json.loads((out / RECORD).read_text())["trial_id"] == study.trials["fp16"]
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_no_export_is_never_replaced(study: Study, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(ExportRefused, match=r"holds no export\.json, so it is something else; name another"):
            study.export("baseline", precious, "artefact", overwrite=overwrite)
    with pytest.raises(ExportRefused, match="must be a folder, it is a file"):
        study.export("baseline", precious / "thesis.tex", "artefact", overwrite=True)
    with pytest.raises(ExportRefused, match="must be a folder on this machine"):
        export_trial(NAME, study.trials["baseline"], "s3://bucket/out", storage=study.storage.url)
    assert (precious / "thesis.tex").read_text() == "years"


def test_the_command_says_only_what_it_has_to_say(study: Study, tmp_path: Path) -> None:
    arguments = ["export", NAME, study.trials["fp16"][:8], "--format", "onnx", "out", "--storage", study.storage.url]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "out" / n) for n in (CARD, RECORD, "model.onnx")]
    (line,) = done.stderr.splitlines()
    assert line.startswith("checked on search split of the study, batches of 8, 3, 1: logits differ by ")
    assert line.endswith("0 of 12 predictions differ")


@pytest.mark.parametrize(
    ("recipe", "more", "status", "words"),
    [
        ("bf16", ["--format", "onnx"], 2, "cannot carry precision(dtype=bf16)"),
        ("failed", [], 2, "has no model"),
        (None, [], 2, "no trial has an id that starts so"),
    ],
)
def test_exit_status_of_what_does_not_work(
    recipe: str | None, more: list[str], status: int, words: str, study: Study, tmp_path: Path
) -> None:
    trial = study.trials[recipe] if recipe else "nonsense"
    arguments = ["export", NAME, trial, str(tmp_path / "out"), *more, "--storage", study.storage.url]
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_failed_export_exits_with_1(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_formats, "REFUSALS", ())
    arguments = ["export", NAME, study.trials["int8"], str(tmp_path / "out"), "--format", "torch-export"]
    result = CliRunner().invoke(cli.app, [*arguments, "--storage", study.storage.url])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert "did not work for magnitude_prune + tome + dynamic_int8" in result.stderr


def test_every_format_has_a_writer_packages_and_code() -> None:
    for table in (export._WRITERS, folder._PACKAGES, loading_code._LOADING):
        assert set(table) == set(ExportFormat)
