"""Constraints of a study: ``metric op number``, parsed and judged; standard library only.

Besides the objectives a constraint may name ``<accuracy>_drop`` (the baseline's accuracy minus the trial's, in percentage
points) and ``<objective>_ratio`` (the trial's value over the baseline's).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from workers.metrics import ACCURACIES, OBJECTIVES

DROPS = {f"{name}_drop": name for name in ACCURACIES}
"""Metric to the accuracy of which it is the baseline's minus the trial's, in percentage points."""

METRICS = (*OBJECTIVES, *DROPS, *(f"{name}_ratio" for name in OBJECTIVES))
"""What a constraint may name."""

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_PATTERN = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


class ConstraintError(ValueError):
    """A text is no constraint: ``rule`` says what it must be, ``remedy`` what to do."""

    def __init__(self, rule: str, remedy: str) -> None:
        self.rule, self.remedy = rule, remedy
        super().__init__(f"{rule}; {remedy}")


@dataclass(frozen=True)
class Constraint:
    """``metric op bound``; ``op`` is one of ``<= >= < >``."""

    metric: str
    op: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric} {self.op} {self.bound:g}"

    def satisfied(self, metrics: Mapping[str, float]) -> bool:
        """Says whether the constraint holds; NaN never does.

        Raises:
            KeyError: if ``metrics`` lacks the metric (:func:`derived` adds the drop and the ratios).
        """
        return bool(_OPERATORS[self.op](metrics[self.metric], self.bound))

    def violation(self, metrics: Mapping[str, float]) -> float:
        """Returns by how much the constraint is broken, in the metric's unit: above 0 broken, otherwise the slack.

        Raises:
            KeyError: if ``metrics`` lacks the metric.
        """
        value = metrics[self.metric]
        if math.isnan(value):
            return math.inf
        amount = value - self.bound if self.op.startswith("<") else self.bound - value
        if amount == 0 and not self.satisfied(metrics):
            return math.ulp(self.bound)  # a strict bound met exactly is broken, if only just
        return amount


def derived(metrics: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Returns ``metrics`` with the ``*_drop`` of accuracies and the ``*_ratio`` of every objective that both hold.

    A ratio that ``metrics`` already has (a paired measurement) stays as it is; one over a baseline of 0 is left out.
    """
    found = dict(metrics)
    both = [name for name in OBJECTIVES if name in metrics and name in baseline]
    found |= {drop: baseline[name] - metrics[name] for drop, name in DROPS.items() if name in both}
    for name in both:
        if baseline[name]:
            found.setdefault(f"{name}_ratio", metrics[name] / baseline[name])
    return found


def violation(
    facts: Mapping[str, float], baseline: Mapping[str, float], constraints: Sequence[Constraint]
) -> str | None:
    """Returns which constraint a recipe breaks by what is known of it before it is run, and with which value; None if none.

    Args:
        facts: metrics that are known exactly; a constraint on another one is left for the trial to tell.
        baseline: metrics of the uncompressed model, or what is known of it; without one a ratio to it is not known.
    """
    known = derived(facts, baseline)
    for constraint in constraints:
        if constraint.metric in known and not constraint.satisfied(known):
            value = known[constraint.metric]
            return f"must have {constraint}; its structure, known before training, has {value:,.6g}"
    return None


def parse(text: str) -> Constraint:
    """Reads ``"size_bytes < 4e6"``.

    Raises:
        ConstraintError: for another form or an unknown metric.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ConstraintError(
            "must be a metric, one of <= >= < >, and a number",
            'write it like "size_bytes < 4e6" or "top1_pct_drop <= 1"',
        )
    metric, op, bound = match.groups()
    if metric not in METRICS:
        near = get_close_matches(metric, METRICS, n=1)
        remedy = f"did you mean {near[0]}?" if near else "see vitpareto's search_spaces/README.md"
        raise ConstraintError(f"must name one of {', '.join(METRICS)}", remedy)
    return Constraint(metric, op, float(bound))
