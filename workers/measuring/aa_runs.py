"""A/A measurements in a process of its own: one artefact, loaded twice, measured against itself as a trial is.

``python -m workers.measuring.aa_runs`` reads the question from stdin as JSON (see :func:`workers.measuring.strong_baseline.measure_itself`) and
prints the records (fields of :class:`workers.trial.Measurement`) as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from workers import artefact
from workers.measuring.against_baseline import Subject, measure_speed
from workers.measuring.strong_baseline import StrongBaseline
from workers.measuring.ways import COMPILE, as_way
from workers.node.storage_faults import fault_as_exit_status
from workers.tasks import TaskInfo


def main() -> None:
    """Answers one question."""
    question: dict[str, Any] = json.load(sys.stdin)
    device = torch.device(question["device"])
    with fault_as_exit_status():
        first, second = (artefact.load(question["folder"], device=device) for _ in range(2))
    found = []
    for record in map(StrongBaseline.from_dict, question["records"]):
        subject = Subject(
            model=as_way(first, record.way.removesuffix(COMPILE)),  # compiled inside, as a trial's model is
            baseline=second,
            artefact_key=question["folder"].rstrip("/").rsplit("/", 1)[-1],
            settings=question["settings"],
            task_info=TaskInfo.from_dict(question["task"]),
            device=device,
        )
        measured = measure_speed(subject, record)
        found.append(asdict(replace(measured, kind=f"aa_{measured.kind}")))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
