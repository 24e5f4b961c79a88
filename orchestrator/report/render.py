"""The report of a study as one page that needs nothing else: no network, no file beside it.

The page carries plotly.js, its own scripts and the data. Its content security policy allows these very scripts, by their
digests, and no connection at all, so that no text from a ledger can run or fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from orchestrator.report.data import Report
from orchestrator.report.sentences import best_close, facts, verdict
from orchestrator.words.rows import plain

SCRIPTS = ("core", "filter", "frontier", "panel", "parallel", "bars", "table", "start")
"""Scripts of the page, in the order in which they run; they share one scope."""

SIGNIFICANT_DIGITS = 7
"""Of the numbers in the page, unless they are whole."""


def page(report: Report, option: str = "") -> str:
    """Returns the page as HTML.

    Args:
        option: what follows the commands that the page shows, such as `` --storage DIR``.
    """
    from plotly.offline import get_plotlyjs

    now = datetime.now(UTC)
    headline, detail = verdict(report)
    fact_rows = facts(report, now, _version())
    # "</script" may stand in a string of a library; "<\/script" is the same string and ends no element.
    scripts = [re.sub(r"</(?=script)", r"<\\/", text, flags=re.IGNORECASE) for text in (get_plotlyjs(), _own_script())]
    content = {
        "policy": _policy(scripts),
        "title": html.escape(f"{report.study} – vitpareto"),
        "study": html.escape(report.study),
        "headline": html.escape(headline).replace("top-1", '<span class="whole">top-1</span>'),
        "detail": html.escape(detail),
        "facts": "\n".join(f"<div><dt>{html.escape(k)}</dt><dd>{_pieces(v)}</dd></div>" for k, v in fact_rows),
        "style": _text("page.css"),
        "data": embedded(page_data(report, option)),
        "plotly": scripts[0],
        "script": scripts[1],
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: content[found[1]], _text("page.html"))


def page_data(report: Report, option: str) -> dict[str, Any]:
    """Returns what the page's scripts read."""
    picked = next((candidate.id for candidate, _ in best_close(report).values()), None)
    return {
        "study": report.study,
        "option": option,
        "metrics": [asdict(m) for m in report.metrics],
        "objectives": report.objectives,
        "recipes": [_compact(vars(c)) for c in report.candidates],
        "picked": picked,
        "parameters": [{"name": name, "values": values} for name, values in report.parameters.items()],
        "history": [{"trials": n, "at": at / 1000, "volume": v} for n, at, v in report.history],
        "history_over": list(report.config.get("objectives", ())),
        "techniques": report.techniques,
        "volume": report.volume,
        "failures": report.failures,
        "stopped": report.stopped,
    }


def embedded(value: Any) -> str:
    """Returns ``value`` as JSON that may stand inside a script element: no character of it can end the element or begin
    a comment."""
    text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False)  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _compact(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a candidate with rounded numbers and without what is empty, for thousands of them are embedded."""
    return {name: _rounded(value) for name, value in row.items() if value is not None and value is not False}


def _rounded(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _pieces(text: str) -> str:
    """Returns text whose lines are broken between its parts, where that will do."""
    return " ".join(f"<span>{html.escape(part)}</span>" for part in re.split(r"(?<=[,;]) ", text))


def _policy(scripts: list[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # plotly.js styles its elements in place; data and blob: its picture of the plot.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _own_script() -> str:
    parts = [_text(f"{name}.js") for name in SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"


def _text(name: str) -> str:
    return files("orchestrator.report").joinpath("page", name).read_text(encoding="utf-8")


def _version() -> str:
    try:
        return version("vitpareto")
    except PackageNotFoundError:
        return "(not installed)"
