"""Vitpareto from Python: load a study, run it, read its ledger and its frontier. See docs/python-api.md.

Names are loaded on first use, so that ``import orchestrator`` imports neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.config import load_study
    from orchestrator.driver import StudyRun, remeasure_study, run_study
    from orchestrator.ledger import Ledger
    from orchestrator.query import pareto, sql
    from orchestrator.studies import open_ledger

__all__ = ["Ledger", "StudyRun", "load_study", "open_ledger", "pareto", "remeasure_study", "run_study", "sql"]

_MODULES = {
    "Ledger": "ledger",
    "StudyRun": "driver",
    "load_study": "config",
    "open_ledger": "studies",
    "pareto": "query",
    "remeasure_study": "driver",
    "run_study": "driver",
    "sql": "query",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
