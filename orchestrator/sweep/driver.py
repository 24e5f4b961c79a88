"""The driver of a study: holds its folder, has its trials run (supervision.py), and ends with the frontier.

What survives is the ledger's: after a crash of the driver another one takes over from there.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from orchestrator.ledger import Ledger, LedgerError
from orchestrator.study.load import (
    StudyRefused,
    check_measurable,
    check_runs_here,
    check_same_study,
    check_study_name,
)
from orchestrator.study.schema import StudyConfig, model_info
from orchestrator.study.space import SearchSpace
from orchestrator.study.weights import weights_notes
from orchestrator.sweep import after_search
from orchestrator.sweep.dashboard import leave_journal
from orchestrator.sweep.facts import BackgroundFacts
from orchestrator.sweep.frontier_history import write_frontier
from orchestrator.sweep.opening import open_sweep
from orchestrator.sweep.outcome import StudyBusy, StudyFailed, StudyRun
from orchestrator.sweep.plan import describe_data
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.ray_session import connection
from orchestrator.sweep.state import RUNNER, Sweep
from orchestrator.sweep.supervision import supervise
from orchestrator.sweep.watch import Watch
from workers.node.identity import alive
from workers.node.lease import Lease, LeaseHeld, acquire
from workers.node.storage import Storage, open_storage, probe
from workers.node.storage_faults import StorageNotSeen, check_seen, in_a_line, storage_fault
from workers.techniques import versions

__all__ = ["StudyBusy", "StudyFailed", "StudyRun", "remeasure_study", "run_study"]

ORPHANS_S = 20.0
"""Longest wait for the workers of a killed driver; they take about two."""

log = logging.getLogger("vitpareto")


def run_study(
    config: StudyConfig,
    *,
    storage: str | Path = "results",
    address: str | None = None,
    quiet: bool = False,
    runner: str = RUNNER,
    retry: Collection[str] = (),
    finish: Collection[str] = (),
    spent_s: float = 0.0,
    ended: str | None = None,
    watch: Watch | None = None,
    at: Callable[[str], None] = lambda phase: None,
) -> StudyRun:
    """Runs a study in this process: what :func:`orchestrator.sweep.keeper.run_study` runs in another one.

    Args:
        config, storage, address, quiet, runner, retry, finish: see there.
        spent_s: seconds that drivers before this one have spent of the time budget.
        ended: why nothing is run: what a driver before this one has found is only brought to its end. None runs.
        watch: watches over Ray.
        at: is told that the study is taken, ``holds``, and that its results are being written, ``saves``.

    Raises:
        StudyBusy: another live driver runs it.
        LeaseLost: another driver has taken it over, because this one could not renew its lease; nothing is lost.
        StudyError: the name is one that a storage keeps for itself.
        LedgerError: rows of the study are known to be missing.
        StudyFailed: the baseline failed, or the run broke down again and again without a trial ending in between, or
            ``address`` is one of Ray Client.
        StudyRefused: the folder holds a study with another question under the name, an objective cannot be measured, or no
            technique can work on the model.
        KeyboardInterrupt: a signal came before there was anything to save.
    """
    if address is not None and address.startswith("ray://"):  # Tune would run elsewhere, without the sweep's state
        raise StudyFailed(
            f"a study cannot be driven through Ray Client ({address}); run it on a node of the cluster with "
            "--address auto, or send it there with `vitpareto submit`"
        )
    check_study_name(config.name)
    store = open_storage(storage)
    context = config.context()
    info = model_info(context)
    described = describe_data(context.data)
    if notes := weights_notes(config, context):
        context = replace(context, model={**context.model, "weights_notes": notes})
    check_measurable(config, info)
    if address is None:
        check_runs_here(config, info.params)
    if not SearchSpace(config.techniques, info, max_techniques=config.max_techniques).size():
        raise StudyRefused(
            f"study {config.name}: none of its techniques can work on {info.name}; `vitpareto plan` says why"
        )
    facts = BackgroundFacts(context, config.seeds, store, config.name) if runner == RUNNER else None
    with _held(store, config.name) as lease, facts or nullcontext():
        ledger = Ledger(store, config.name, config.parsed_constraints(), context.digest)
        said = {"notes": list(described.notes), "warnings": list(described.warnings)}
        token = _open_folder(ledger, config, context.digest, said)
        _await_orphans(ledger)
        sweep = open_sweep(
            config,
            context,
            info,
            ledger,
            storage_url=store.url,
            token=token,
            versions=versions(),
            retry=retry,
            finish=finish,
            facts=facts,
        )
        sweep.lease, sweep.stopping = lease, ended
        sweep.started -= spent_s
        try:
            at("holds")
            with Progress(quiet=quiet) as progress:
                if ended is None:
                    supervise(sweep, lease, address, progress, runner, watch)
            at("saves")
        except KeyboardInterrupt:
            at("saves")
            sweep.stopping = "interrupted"
        except OSError as error:
            if not storage_fault(error):
                raise
            at("saves")
            sweep.pause(in_a_line(error))
        _wind_up(sweep, lease)
        return _finish(sweep, store.url)


def remeasure_study(
    config: StudyConfig,
    *,
    times: int,
    storage: str | Path = "results",
    address: str | None = None,
    quiet: bool = False,
    watch: Watch | None = None,
) -> int:
    """Measures in this process: what :func:`orchestrator.sweep.keeper.remeasure_study` measures from another one.

    Args:
        config, times, storage, address, quiet: see there.
        watch: watches over Ray.

    Raises:
        StudyBusy: another live driver runs it.
        LeaseLost: another driver has taken it over.
        StudyFailed: the machine or cluster lacks what a trial needs.
        StudyRefused: data or checkpoint are not those that the study was run with.
    """
    store, context = open_storage(storage), config.context()
    ledger = Ledger(store, config.name, config.parsed_constraints(), context.digest)
    stored = ledger.study_record() or {}
    if stored.get("context") != context.digest:
        raise StudyRefused(
            f"study {config.name}: the data or the checkpoint has changed since it was run; what would be measured now is "
            "another model"
        )
    with (
        _held(store, config.name) as lease,
        Progress(quiet=quiet) as progress,
        connection(config, address, watch),
    ):
        sweep = open_sweep(
            config,
            context,
            model_info(context),
            ledger,
            storage_url=store.url,
            token=stored.get("token", ""),
            versions=versions(),
        )
        sweep.lease = lease
        spent = after_search.remeasure(sweep, times, progress, watch=watch)
        if spent:
            write_frontier(sweep)
        return spent


@contextmanager
def _held(store: Storage, name: str) -> Iterator[Lease]:
    """Holds the study's lease for the block.

    Raises:
        StudyBusy: another live driver holds it.
        StorageFault: the storage cannot keep two drivers apart, or cannot be written.
    """
    probe(store)
    try:
        lease = acquire(store, f"{name}/lease", note={"study": name})
    except LeaseHeld as error:
        raise StudyBusy(
            f"study {name} in {store.url} is being run by process {error.owner.get('pid')} on "
            f"{error.owner.get('host')}; wait for it or stop it, then resume"
        ) from None
    assert lease is not None  # only a waiting acquire returns None
    with lease:
        yield lease


def _wind_up(sweep: Sweep, lease: Lease) -> None:
    """Leaves the folder as readers like it. What the storage does not take now, the next run leaves.

    Where the storage is gone nothing is written: it would land below the place where it is mounted again.

    Raises:
        LeaseLost: what follows is the successor's.
    """
    try:
        lease.check()
        check_seen(sweep.ledger.storage, sweep.config.name, sweep.token)
        sweep.hand_back()
        _clear_marks(sweep.ledger)
        sweep.ledger.compact()
        if sweep.baseline is not None:
            write_frontier(sweep)
        _leave_journal(sweep)
    except StorageNotSeen as error:
        sweep.pause(str(error))
    except OSError as error:
        if not storage_fault(error):
            raise
        sweep.pause(in_a_line(error))


def _leave_journal(sweep: Sweep) -> None:
    """Leaves the Optuna study where optuna-dashboard finds it; a failure costs nothing that was found."""
    try:
        leave_journal(sweep.ledger, sweep.proposer)
    except (OSError, LedgerError) as error:
        log.warning("the journal for optuna-dashboard could not be written: %s", error)


def _open_folder(ledger: Ledger, config: StudyConfig, context: str, data: Mapping[str, list[str]]) -> str:
    """Writes the study and its token, or checks that the folder holds the same study; returns the token.

    Args:
        data: what is to be said of the data, for the report.
    """
    stored = ledger.study_record()
    if stored is not None:
        check_same_study(config, stored["config"], ledger.folder)
    ledger.check_whole()
    token = (stored or {}).get("token") or secrets.token_hex(8)
    ledger.write_study({"config": config.to_dict(), "token": token, "context": context, "data": dict(data)})
    return token


def _await_orphans(ledger: Ledger) -> None:
    """Waits for workers on this machine that outlived their killed driver: they still write for a second or two."""
    until = time.monotonic() + ORPHANS_S
    while time.monotonic() < until and any(alive(mark) for mark in ledger.running().values()):
        time.sleep(0.2)
    _clear_marks(ledger)


def _clear_marks(ledger: Ledger) -> None:
    for trial in ledger.running():
        ledger.clear_running(trial)


def _finish(sweep: Sweep, url: str) -> StudyRun:
    snapshot = sweep.snapshot()
    if sweep.baseline is None and sweep.stopping and "baseline" in sweep.stopping:
        row = sweep.ledger.trials(columns=["is_baseline", "status", "failure"]).to_pylist()
        why = next((r["failure"] for r in row if r["is_baseline"] and r["failure"]), "")
        raise StudyFailed(f"{sweep.stopping}: {why.splitlines()[0] if why else 'no reason recorded'}")
    complete = sweep.finished and sweep.stopping is None
    if complete:  # an exhausted space is done before its budget is
        sweep.ledger.write_study({**(sweep.ledger.study_record() or {}), "complete": True})
    return StudyRun(
        name=sweep.config.name,
        folder=f"{url}/{sweep.config.name}",
        done=snapshot.done,
        budget=sweep.config.trials,
        failed=dict(snapshot.failed),
        complete=complete,
        reason="" if complete else (sweep.stopping or "interrupted"),
        hypervolume=snapshot.hypervolume,
        elapsed_s=snapshot.elapsed_s,
        paused=snapshot.paused,
    )
