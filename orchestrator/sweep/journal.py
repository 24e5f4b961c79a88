"""An Optuna study as a file of its journal storage, which other tools open."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial

from orchestrator.sweep.searcher import Proposer


@dataclass(frozen=True)
class TrialNote:
    """What Optuna does not know of a trial: ``attributes`` are plain values, the times local ones without a zone."""

    attributes: Mapping[str, Any]
    started: datetime
    ended: datetime


class _Entries(BaseJournalBackend):
    """A journal in memory: the one in a file synchronises after each entry, 10 ms a trial."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self.logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs.extend(logs)


def journal_bytes(proposer: Proposer, name: str, notes: Mapping[int, TrialNote] | None = None) -> bytes:
    """Returns the Optuna study as a file of its journal storage, which optuna-dashboard opens; the study stays as it is.

    Args:
        proposer: whose study it is.
        name: of the study in that file.
        notes: number to what Optuna does not know of a trial.
    """
    entries = _Entries()
    copy = optuna.create_study(storage=JournalStorage(entries), study_name=name, directions=proposer.study.directions)
    with warnings.catch_warnings():  # experimental since Optuna 3.2; the dashboard's axes have no other names
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        copy.set_metric_names(list(proposer.objectives))
    for trial in proposer.study.get_trials(deepcopy=True):
        copy.add_trial(_noted(proposer, trial, (notes or {}).get(trial.number)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "optuna.journal")
        JournalFileBackend(str(file)).append_logs(entries.logs)
        return file.read_bytes()


def _noted(proposer: Proposer, trial: FrozenTrial, note: TrialNote | None) -> FrozenTrial:
    """Adds to a trial what a person looks for."""
    if trial.number in proposer.asked:
        trial.set_user_attr("recipe", proposer.asked[trial.number].label())
    if trial.constraints:
        # Optuna 5 keeps them by name; optuna-dashboard 0.21 reads the list that older versions kept.
        trial.system_attrs = {**trial.system_attrs, "constraints": list(trial.constraints.values())}
    if note is not None:
        for key, value in note.attributes.items():
            trial.set_user_attr(key, value)
        if trial.state.is_finished():
            trial.datetime_start, trial.datetime_complete = note.started, note.ended
    return trial
