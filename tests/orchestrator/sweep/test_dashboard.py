"""The journal that a study leaves: Optuna reads back what was told, and optuna-dashboard shows it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from orchestrator.ledger import Ledger, attempt_row
from orchestrator.sampling.samplers import Question, make_sampler
from orchestrator.study.constraints import parse
from orchestrator.study.sampler import SamplerSection
from orchestrator.study.space import SearchSpace
from orchestrator.sweep.dashboard import JOURNAL, leave_journal
from orchestrator.sweep.searcher import Proposer
from tests.orchestrator.sweep.test_searcher import OBJECTIVES
from workers.node.storage import LocalStorage
from workers.trial import Context, Recipe, Step, TrialResult, TrialSpec

WHERE = Context({"name": "one"}, {}, {}, {})
SPACE = {"tome": {"r": {"low": 1, "high": 9, "step": 1}}}
FAILURE = "Infeasible: no tokens left\nTraceback ..."
STARTED = 1_700_000_000.0
ATTEMPTS = 3
"""To start a server on a port that was free a moment before."""


def outcome(number: int) -> tuple[str, dict[str, float]]:
    if number == 2:
        return "infeasible", {}
    if number == 3:
        return "worker_died", {}
    return "ok", {"top1_pct": 90.0 + number, "size_bytes": 100.0 * number}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of eight proposals over two seeds, the last one in flight, and a row of another context."""
    storage = LocalStorage(tmp_path_factory.mktemp("results"))
    ledger = Ledger(storage, "digits", context=WHERE.digest)
    first = [Recipe((Step("tome", {"r": r}),)) for r in range(1, 9)]
    space = SearchSpace(SPACE)
    sampler = make_sampler(SamplerSection(name="random"), Question(space, tuple(OBJECTIVES)))
    proposer = Proposer(space, OBJECTIVES, [parse("size_bytes < 450")], sampler, first=first)
    for number in range(8):
        proposal, _ = proposer.ask()
        assert proposal is not None
        assert proposal.number == number
        status, metrics = outcome(proposal.number)
        other = Context({"name": "other"}, {}, {}, {})
        for where, seed in [(WHERE, 1), (WHERE, 0), (other, 0)]:
            identity = f"{where.model['name']}-{proposal.number}-{seed}"
            spec = TrialSpec("digits", identity, proposal.recipe, seed, where, storage.url)
            result = TrialResult(
                trial_id=identity,
                attempt_id="a",
                status=status,
                failure=None if status == "ok" else FAILURE,
                metrics=metrics,
                started_at=STARTED + 60 * proposal.number + seed,
                duration_s=2.0,
            )
            ledger.write_attempt(attempt_row(spec, result, dict(proposal.state)))
        if proposal.number < 7:
            proposer.tell(proposal.number, [status] * 2, [metrics] * 2)
    told = [(t.state, t.values) for t in proposer.study.trials]
    leave_journal(ledger, proposer)
    leave_journal(ledger, proposer)  # a resumed study leaves it again
    assert [(t.state, t.values) for t in proposer.study.trials] == told
    assert not any(t.user_attrs for t in proposer.study.trials)
    return Path(storage.url) / "digits"


def test_optuna_reads_back_what_was_told(folder: Path) -> None:
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.load_study(study_name="digits", storage=storage)
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["top1_pct", "size_bytes"]
    ended = study.trials
    assert [t.number for t in ended] == list(range(8))
    assert ended[4].values == [94.0, 400.0]
    assert ended[4].user_attrs["trial_ids"] == ["one-4-0", "one-4-1"]
    assert ended[4].user_attrs["status"] == "ok"
    assert ended[4].user_attrs["recipe"].startswith("tome(r=5")
    assert ended[4].constraints["size_bytes < 450"] == -50.0
    assert ended[5].constraints["size_bytes < 450"] == 50.0
    assert ended[4].datetime_start == datetime.fromtimestamp(STARTED + 240)
    assert ended[4].duration is not None
    assert ended[4].duration.total_seconds() == 3.0
    assert ended[2].state == TrialState.PRUNED
    assert ended[2].user_attrs["status"] == "infeasible"
    assert ended[2].user_attrs["failure"] == "Infeasible: no tokens left"
    assert ended[3].state == TrialState.FAIL
    assert ended[3].user_attrs["status"] == "worker_died"
    assert ended[7].state == TrialState.RUNNING
    assert {t.values[0] for t in study.best_trials} <= {90.0, 91.0, 94.0}


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The real dashboard, started as its manual says; on another port where somebody took the one that was free."""
    program = str(Path(sys.executable).with_name("optuna-dashboard"))
    for _ in range(ATTEMPTS):
        with closing(socket.socket()) as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        command = [program, str(folder / JOURNAL), "--port", str(port), "--server", "wsgiref"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
            try:
                if _answers(server, port):
                    yield f"http://127.0.0.1:{port}"
                    return
            finally:
                server.terminate()
            assert server.stdout is not None
            output = server.stdout.read()
    pytest.fail(f"no optuna-dashboard came up in {ATTEMPTS} attempts, the last one said: {output}")


def _answers(server: subprocess.Popen[str], port: int) -> bool:
    """Waits until the server listens; False where it ended instead."""
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return True
        except OSError:
            time.sleep(0.1)
    return False


def get(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def test_the_dashboard_shows_the_study(address: str) -> None:
    (study,) = get(f"{address}/api/studies")["study_summaries"]
    assert study["study_name"] == "digits"
    shown = get(f"{address}/api/studies/{study['study_id']}?after=0")
    assert shown["objective_names"] == ["top1_pct", "size_bytes"]
    trials = {t["number"]: t for t in shown["trials"]}
    assert len(trials) == 8
    assert trials[4]["state"] == "Complete"
    assert trials[4]["values"] == [94.0, 400.0]
    assert [trials[n]["constraints"] for n in (4, 5)] == [[-50.0], [50.0]]
    assert trials[4]["params"]
    attributes = {a["key"]: a["value"] for a in trials[2]["user_attrs"]}
    assert attributes["status"] == "infeasible"
    assert json.loads(attributes["trial_ids"]) == ["one-2-0", "one-2-1"]
    assert trials[2]["state"] == "Pruned"
