"""Vitpareto from Python: load a study, run it, read its ledger and its frontier. See docs/python-api.md.

Names are loaded on first use, so that ``import orchestrator`` imports neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.frontier.query import pareto, sql
    from orchestrator.ledger import Ledger
    from orchestrator.ledger.studies import open_ledger
    from orchestrator.study.load import load_study
    from orchestrator.sweep.keeper import remeasure_study, run_study
    from orchestrator.sweep.outcome import StudyRun

__all__ = ["Ledger", "StudyRun", "load_study", "open_ledger", "pareto", "remeasure_study", "run_study", "sql"]

_MODULES = {
    "Ledger": "ledger",
    "StudyRun": "sweep.outcome",
    "load_study": "study.load",
    "open_ledger": "ledger.studies",
    "pareto": "frontier.query",
    "remeasure_study": "sweep.keeper",
    "run_study": "sweep.keeper",
    "sql": "frontier.query",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
