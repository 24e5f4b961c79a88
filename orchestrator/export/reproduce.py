"""Runs one row again from its spec alone, from nothing: a storage of its own, no cached stage, no Ray."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.frontier.verdicts import Difference, Run, Verdict, differences, judge
from orchestrator.ledger import Ledger
from orchestrator.ledger.schema import metric_of
from orchestrator.ledger.show import find_trial
from orchestrator.words.units import format_seconds
from workers import artefact, tasks
from workers.metrics import DEVICE_BOUND, SPEEDS
from workers.models import checkpoint_digest
from workers.node.storage import LocalStorage, Storage
from workers.run import run_trial
from workers.stages.graph import Infeasible, Stage, compile_recipe, prefix
from workers.techniques import registry, versions
from workers.trial import TrialSpec, trial_id

POLL_S = 0.2

Say = Callable[[str], None]


class ReproduceRefused(Exception):
    """The row cannot be run again here; the message says why and what to do."""


@dataclass(frozen=True)
class Reproduction:
    """How the second run of a row compares with it.

    Attributes:
        failure: first line of why the run here failed, None where it did not.
        verdicts: one an objective; empty where one of the runs failed.
        folder: the storage of the run here, None where it was not kept.
    """

    study: str
    trial_id: str
    attempt_id: str
    recipe: str
    row_status: str
    status: str
    failure: str | None
    verdicts: tuple[Verdict, ...]
    differences: tuple[Difference, ...]
    folder: str | None

    @property
    def reproduced(self) -> bool:
        """The run ended as the row says, and no number that can be judged is outside."""
        return self.status == self.row_status and all(v.verdict != "outside" for v in self.verdicts)


def reproduce(ledger: Ledger, trial: str, *, keep: str | Path | None = None, say: Say = lambda _: None) -> Reproduction:
    """Runs the trial whose id starts with ``trial`` again and compares.

    Args:
        keep: folder that becomes the storage of the run and stays; must be empty or absent. None: a temporary one.
        say: takes lines about what is being done.

    Raises:
        LookupError: no trial, or several.
        ReproduceRefused: its techniques, data or checkpoint are not here, or ``keep`` is in use.
        TaskError, ModelError: the data or checkpoint cannot be read, or is not that of the row.
    """
    row = find_trial(ledger, trial)
    given = TrialSpec.from_dict(row["spec"])
    say(f"trial {row['trial_id']} of {ledger.study}, seed {given.seed}: {given.recipe.label()}")
    spec = _for_here(given, row["status"], say)
    plan = _checked(spec)
    folder = _kept(keep) if keep is not None else tempfile.TemporaryDirectory(prefix="vitpareto-reproduce-")
    with folder as place:
        say(f"running it from nothing in {place}")
        started = time.monotonic()
        with _watched(LocalStorage(place), plan, say):
            result = run_trial(replace(spec, storage=str(place)))
        say(f"ended after {format_seconds(time.monotonic() - started)}: {result.status}")
    found = result.to_dict()
    here = _run(found, spec.context.device, found["measurements"])
    before = _run(row, given.context.device, _measured(ledger, row))
    return Reproduction(
        study=ledger.study,
        trial_id=row["trial_id"],
        attempt_id=row["attempt_id"],
        recipe=given.recipe.label(),
        row_status=row["status"],
        status=result.status,
        failure=result.failure.splitlines()[0] if result.failure else None,
        verdicts=tuple(judge(before, here)),
        differences=(*_techniques(given), *differences(row["provenance"] or {}, result.provenance)),
        folder=str(place) if keep is not None else None,
    )


# --- before -----------------------------------------------------------------------------------------------------------


def _for_here(spec: TrialSpec, status: str, say: Say) -> TrialSpec:
    """Returns the spec without the study's storage; on the CPU where its device is not here.

    Its time limit is left out: the row may have found its stages in the cache. A row that ran out of time keeps it.
    """
    spec = replace(spec, storage_token="", timeout_s=spec.timeout_s if status == "timeout" else None)
    if spec.context.device != "cuda" or torch.cuda.is_available():
        return spec
    say("it was run on cuda, which this machine has not: it is run on cpu, speed and memory are not judged")
    exact = tuple(name for name in spec.objectives if name not in DEVICE_BOUND)
    return replace(spec, context=replace(spec.context, device="cpu"), objectives=exact, gpus=0.0)


def _checked(spec: TrialSpec) -> tuple[Stage, ...]:
    """Returns the stages of the run, after making sure that it can begin."""
    unknown = [name for name in spec.recipe.techniques if name not in registry()]
    if unknown:
        raise ReproduceRefused(
            f"the recipe uses {', '.join(unknown)}, which is not installed here; install the package that has it"
        )
    tasks.info(spec.context.data)  # which refuses data of another digest
    checkpoint = spec.context.model.get("checkpoint")
    if checkpoint is not None and checkpoint_digest(checkpoint) != spec.context.model.get("checkpoint_digest"):
        raise ReproduceRefused(
            f"checkpoint {checkpoint}: its content must be the row's, but its SHA-256 is another one; "
            "put the original file there"
        )
    try:
        return compile_recipe(spec.recipe, spec.seed, spec.context)
    except Infeasible:  # the run will say so
        return ()


def _kept(keep: str | Path) -> Any:
    folder = Path(keep)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ReproduceRefused(f"--keep {folder}: must be an empty folder or none yet, so that nothing in it is reused")
    folder.mkdir(parents=True, exist_ok=True)
    return nullcontext(str(folder.resolve()))


@contextmanager
def _watched(storage: Storage, plan: Sequence[Stage], say: Say) -> Iterator[None]:
    """Says when each stage is done, as its manifest appears."""
    started, over = time.monotonic(), threading.Event()
    left = list(plan)

    def look() -> None:
        while left and storage.exists(f"{prefix(left[0].key)}/{artefact.MANIFEST}"):
            stage = left.pop(0)
            say(f"{stage.kind} done after {format_seconds(time.monotonic() - started)}")
            if not left:
                say("evaluating and measuring")

    def watch() -> None:
        while not over.wait(POLL_S):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        look()


# --- after ------------------------------------------------------------------------------------------------------------


def _measured(ledger: Ledger, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the measurement records of the row's own attempt."""
    this = row["trial_id"], row["attempt_id"]
    found = [m for m in ledger.measurements().to_pylist() if (m["trial_id"], m["attempt_id"]) == this]
    return [{**m, "conditions": json.loads(m["conditions"] or "{}")} for m in found]


def _run(found: Mapping[str, Any], device: str, measurements: Sequence[Mapping[str, Any]]) -> Run:
    """Returns what is compared of a row or of a result."""
    records = {m["kind"]: m["conditions"] for m in measurements}
    accuracies = {metric_of(c): c for c in (m["conditions"] for m in measurements if m["kind"] == "accuracy_search")}
    provenance = found["provenance"] or {}
    names = (records.get(kind, {}).get("device_name") for kind in SPEEDS)
    return Run(
        status=found["status"],
        failure=found["failure"],
        metrics=found["metrics"] or {},
        device=device,
        device_name=provenance.get("device_name") or next((n for n in names if n), None),
        predictions={name: c[key] for name, c in accuracies.items() for key in ("correct_bits", "levels") if key in c},
        logits={name: c["logits_digest"] for name, c in accuracies.items() if "logits_digest" in c},
        ways={kind: c["way"] for kind, c in records.items() if "way" in c},
    )


def _techniques(spec: TrialSpec) -> list[Difference]:
    """A trial's id holds its techniques' versions: another id for the same question means that one has changed."""
    now = trial_id(spec.recipe, spec.seed, spec.context, versions())
    if now == spec.trial_id:
        return []
    here = ", ".join(f"{name} {versions()[name]}" for name in spec.recipe.techniques) or "those of the baseline"
    return [Difference("techniques", "other versions", here)]
