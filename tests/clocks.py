"""A clock that tests move, for what is arithmetic over time: the clock of a busy machine would decide such tests."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Self

import pytest


class Clock:
    """Stands in for the module ``time`` of ``modules``: nothing but :meth:`sleep` makes time pass.

    Exact where durations are sums of a few powers of two. It does not start at 0, which code could take for "never".
    """

    START = 1024.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.passed_s = 0.0
        for module in modules:
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.START + self.passed_s

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.passed_s += seconds

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # the copy of a model lives in the same time
