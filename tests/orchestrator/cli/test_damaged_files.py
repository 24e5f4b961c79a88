"""Whatever happens to a file of a study, every command answers or names the file: no traceback, and no silent loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ledger import Ledger, attempt_row
from orchestrator.ledger.parquet_files import KINDS, read_parquet
from orchestrator.sweep import driver, keeper
from tests.cli_calls import call
from tests.ledger_rows import settle
from workers.node.storage import LocalStorage
from workers.trial import TrialResult, TrialSpec

WRITTEN = Path(__file__).parents[1] / "before_the_wings"
NAME = "before_the_wings"
OTHER = "another"

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("status", "--format", "json"),
    ("status", NAME, "--format", "json"),
    ("pareto", NAME, "--format", "json"),
    ("pareto", NAME, "--objectives", "top1_pct,size_bytes"),
    ("query", NAME, "SELECT * FROM trials JOIN measurements USING (trial_id)", "--format", "json"),
    ("show", NAME, "98ad"),
    ("show", NAME, "98ad", "--json"),
    ("compare", NAME, "98ad", "484b"),
    ("report", NAME, "-o", "OUT/report.svg", "--objectives", "top1_pct,size_bytes"),
    ("plan", "OUT/study.yaml"),
    ("repair", NAME),
    ("repair", NAME, "--apply"),
    ("resume", NAME, "--quiet"),
)

JSON_VALUES: tuple[Any, ...] = (None, True, -7, 1e300, "x", [], [7], {}, {"a": None})


@dataclass(frozen=True)
class Study:
    """A finished study of three recipes in a storage with another one, and a copy of it that is damaged."""

    original: Path
    copy: Path
    out: Path

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.original)) for p in self.original.rglob("*") if p.is_file())

    def restore(self) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.original, self.copy)

    def untouched(self, file: str) -> bool:
        """A damage may leave the bytes as they are."""
        copy = self.copy / file
        return copy.is_file() and copy.read_bytes() == (self.original / file).read_bytes()

    def run(self, command: tuple[str, ...]) -> Result:
        arguments = [part.replace("OUT", str(self.out)) for part in command]
        return call(*arguments, storage=self.copy)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    folder = tmp_path_factory.mktemp("damaged")
    storage = Path(shutil.copytree(WRITTEN, folder / "original"))
    store, ledger = LocalStorage(storage), Ledger(LocalStorage(storage), NAME)
    tables = [read_parquet(store, f"{NAME}/ledger/{kind}-000001-d349deab.parquet", kind) for kind in KINDS]
    ledger.rebuild([], *tables)  # with what manifests have said since
    settle(store, NAME)
    row = next(r for r in ledger.attempts().to_pylist() if r["number"] == 0)
    spec = TrialSpec.from_dict(json.loads(row["spec"]))
    lost = TrialResult(spec.trial_id, "worker_died-1", "worker_died", "it died", {}, 1796072000.0, 1.0)
    ledger.write_attempt(attempt_row(spec, lost, json.loads(row["optuna"])))
    ledger.mark_running(spec.trial_id, {"host": "gone", "pid": 1, "started_at": 1796072000.0})
    shutil.copytree(storage / NAME, storage / OTHER)
    (folder / "out").mkdir()
    config = json.loads((storage / NAME / "study.json").read_text())["config"]
    (folder / "out" / "study.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        # What resume checks and writes is real; nothing is run, so that it needs no process of its own.
        patch.setattr(keeper, "run_study", driver.run_study)
        patch.setattr(driver, "supervise", lambda *_: None)
        yield Study(storage, folder / "copy", folder / "out")


# --- what happens to a file -------------------------------------------------------------------------------------------


Damage = Callable[[Path, float], None]


def cut(file: Path, where: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * where)])


def flipped(file: Path, where: float) -> None:
    data = bytearray(file.read_bytes())
    if data:
        place = min(int(len(data) * where), len(data) - 1)
        data[place] ^= 1 << (place % 8)
        file.write_bytes(bytes(data))


def replaced(file: Path, where: float) -> None:
    """The whole content is JSON of another type."""
    file.write_text(json.dumps(JSON_VALUES[int(where * len(JSON_VALUES)) % len(JSON_VALUES)]))


def retyped(file: Path, where: float) -> None:
    """One value inside is JSON of another type, or gone."""
    if file.suffix != ".json":
        flipped(file, where)
        return
    record = json.loads(file.read_text())
    places = list(_places(record))
    holder, key = places[int(where * len(places)) % len(places)] if places else ([record], 0)
    choice = int(where * 7919) % (len(JSON_VALUES) + 1)
    if choice < len(JSON_VALUES):
        holder[key] = JSON_VALUES[choice]
    else:
        del holder[key]
    file.write_text(json.dumps(record))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def newer(file: Path, where: float) -> None:
    if file.suffix == ".json":
        record = json.loads(file.read_text())
        file.write_text(json.dumps({**record, "schema_version": 99}))
    else:
        file.write_bytes(file.read_bytes().replace(b'"schema_version": 1', b'"schema_version": 9'))


def gone(file: Path, where: float) -> None:
    file.unlink()


def a_folder(file: Path, where: float) -> None:
    file.unlink()
    (file / "inside").mkdir(parents=True)


def beside(file: Path, where: float) -> None:
    """Foreign files lie beside it."""
    (file.parent / "notes.txt").write_text("my notes")
    (file.parent / "zz.json").write_text("{}")
    (file.parent / f"{file.name}.orig").write_bytes(file.read_bytes())


DAMAGES = (cut, flipped, replaced, retyped, newer, gone, a_folder, beside)


def check(study: Study, file: str, damage: Damage, where: float, command: tuple[str, ...]) -> Result:
    """Runs a command on a damaged copy: it answers, or says in lines of its own what is wrong with which file."""
    study.restore()
    damage(study.copy / file, where)
    done = study.run(command)
    what = f"{damage.__name__} {where} {file}: {' '.join(command)}\n{done.output}\n{done.exception!r}"
    assert done.exception is None or isinstance(done.exception, SystemExit), what
    assert done.exit_code in (0, 1, 2), what
    assert "Traceback" not in done.output, what
    lines = done.stderr.splitlines()
    if done.exit_code:
        assert lines, what
        named = any(part in done.stderr for part in (Path(file).name, str(Path(file).parent)))
        assert named or any("stopped early" in line for line in lines), what  # a resume that found something to run
    if command[0] == "status" and file.startswith(f"{NAME}/ledger/") and damage is not beside:
        assert done.exit_code == 1 or study.untouched(file), what
    return done


CASES = st.tuples(st.integers(0, 10_000), st.sampled_from(DAMAGES), st.floats(0, 1), st.sampled_from(COMMANDS))


def any_case(study: Study, case: tuple[int, Damage, float, tuple[str, ...]]) -> None:
    number, damage, where, command = case
    files = study.files()
    check(study, files[number % len(files)], damage, where, command)


@given(CASES)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_a_command_answers_or_names_the_file(study: Study, case: tuple[int, Damage, float, tuple[str, ...]]) -> None:
    any_case(study, case)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@given(CASES)
@settings(max_examples=5000, deadline=None, database=None)
def test_a_command_answers_or_names_the_file_much_longer(
    study: Study, case: tuple[int, Damage, float, tuple[str, ...]]
) -> None:
    any_case(study, case)


# --- one damaged part, command by command ------------------------------------------------------------------------------


def measured(study: Study) -> Path:
    (file,) = (study.copy / NAME / "ledger").glob("measurements-*.parquet")
    return file


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("pareto", NAME, "--objectives", "top1_pct,size_bytes", "--format", "json"), 1),
        (("show", NAME, "98ad"), 1),
        (("compare", NAME, "98ad", "484b"), 1),
        (("query", NAME, "SELECT count(*) FROM measurements"), 1),
        (("query", NAME, "SELECT trial_id FROM trials", "--format", "json"), 0),
        (("status", NAME), 1),
    ],
)
def test_an_answer_without_rows_is_told_and_ends_with_1(study: Study, command: tuple[str, ...], status: int) -> None:
    study.restore()
    measured(study).write_bytes(b"")
    done = study.run(command)
    assert done.exit_code == status, done.output
    assert done.stdout
    assert (measured(study).name in done.stderr, "`vitpareto repair before_the_wings`" in done.stderr) == (
        bool(status),
    ) * 2
    if command[0] in ("pareto", "query") and "json" in command:
        assert len(json.loads(done.stdout)) >= 1, "what is intact is used"


def test_after_a_repair_all_is_well_and_resume_has_lost_trials_to_run(study: Study) -> None:
    study.restore()
    (attempts,) = (study.copy / NAME / "ledger").glob("attempts-*.parquet")
    attempts.write_bytes(attempts.read_bytes()[:-9])
    refused = study.run(("resume", NAME, "--quiet"))
    assert (refused.exit_code, attempts.name in refused.stderr) == (1, True)
    assert "nothing was changed; do it with --apply" in study.run(("repair", NAME)).stdout
    done = study.run(("repair", NAME, "--apply"))
    assert (done.exit_code, "lost: 3 trials" in done.stdout) == (0, True)
    (status,) = json.loads(study.run(("status", NAME, "--format", "json")).stdout)
    assert (status["problems"], status["state"]) == ([], "stopped")
    resumed = study.run(("resume", NAME, "--quiet"))
    assert "stopped early: interrupted" in resumed.stderr, resumed.output  # the search is not run here
    assert study.run(("status", NAME)).exit_code == 0


def test_trials_with_a_plus_are_so_many_more(study: Study) -> None:
    def budget() -> int:
        (status,) = json.loads(study.run(("status", NAME, "--format", "json")).stdout)
        return int(status["budget"])

    study.restore()
    before = budget()
    for trials, expected in (("+2", before + 2), ("+3", before + 5), (str(before + 9), before + 9)):
        study.run(("resume", NAME, "--quiet", "--trials", trials))  # the search is not run here
        assert budget() == expected


def test_a_study_called_stages_can_still_be_read_but_not_run(study: Study) -> None:
    study.restore()
    shutil.copytree(study.copy / NAME, study.copy / "stages", dirs_exist_ok=True)
    record = json.loads((study.copy / "stages" / "study.json").read_text())
    record["config"]["name"] = "stages"
    (study.copy / "stages" / "study.json").write_text(json.dumps(record))
    assert study.run(("query", "stages", "SELECT count(*) FROM trials")).exit_code == 0
    said = study.run(("resume", "stages", "--quiet"))
    assert (said.exit_code, "stages/study.json: name: must not be stages" in said.stderr) == (2, True)
