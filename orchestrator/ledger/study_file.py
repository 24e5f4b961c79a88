"""``study.json``: what a study is. Checked as far as commands that read look into it, so that older studies stay readable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.ledger.files import LedgerError
from orchestrator.study.constraints import ConstraintError, parse
from workers.metrics import OBJECTIVES


def read_study(name: str, data: bytes) -> dict[str, Any]:
    """Returns the record in ``study.json``.

    Raises:
        LedgerError: it is none; the text names the file and says what to do.
    """
    try:
        record: dict[str, Any] = json.loads(data)
        fault = _fault(record)
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise LedgerError(
            f"{name} is damaged: {fault}; put it back from a copy, or move it away and `vitpareto run` the study's file again, "
            "which writes it anew: what has ended is not run again"
        )
    return record


def _fault(record: object) -> str | None:
    if not isinstance(record, dict) or not isinstance(config := record.get("config"), dict):
        return "it holds no study"
    if not isinstance(record.get("context"), str) or not isinstance(record.get("token", ""), str):
        return "context and token must be texts"
    if not isinstance(config.get("trials"), int):
        return "config.trials must be a number"
    objectives, techniques = config.get("objectives"), config.get("techniques")
    if (
        not isinstance(objectives, dict)
        or not objectives
        or not all(direction in ("minimize", "maximize") for direction in objectives.values())
    ):
        return "config.objectives must say minimize or maximize of each"
    if not objectives.keys() <= OBJECTIVES.keys():
        return f"config.objectives: there is no {', '.join(sorted(objectives.keys() - OBJECTIVES.keys()))}"
    if not isinstance(techniques, dict) or not all(map(_is_space, techniques.values())):
        return "config.techniques must be parameters by technique, each a list or low, high and step"
    return _constraints_fault(config.get("constraints"))


def _is_space(parameters: object) -> bool:
    return isinstance(parameters, Mapping) and all(
        isinstance(domain, list)
        or (
            isinstance(domain, Mapping) and all(isinstance(domain.get(k), int | float) for k in ("low", "high", "step"))
        )
        for domain in parameters.values()
    )


def _constraints_fault(constraints: object) -> str | None:
    if not isinstance(constraints, list) or not all(isinstance(text, str) for text in constraints):
        return "config.constraints must be texts"
    try:
        for text in constraints:
            parse(text)
    except ConstraintError as error:
        return f"config.constraints: {error}"
    return None
