"""What a person sees while a study runs: a few live lines on a terminal, a line now and then in a log. On stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from orchestrator.ledger.status import format_failures
from orchestrator.sweep.pace import Pace
from orchestrator.sweep.state import Sweep
from orchestrator.sweep.work import Snapshot
from orchestrator.words.printable import printable
from orchestrator.words.units import format_seconds, format_value

LIVE_S = 0.5
LOG_S = (10.0, 300.0)
"""Seconds between two lines in a log: the first while a study is young, then a twentieth of its age, at most the second."""

LOG_WIDTH = 160
"""Characters of a line in a log."""


class Progress:
    """Shows a sweep's snapshot; a context manager. ``quiet`` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(file=sys.stderr, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal and not quiet else None
        self._pace = Pace(LIVE_S)

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            with suppress(OSError):  # the terminal is gone
                self.live.stop()

    def show(self, sweep: Sweep) -> None:
        """Draws the state of ``sweep`` if enough time has passed since the last drawing."""
        if self.quiet or not self._pace.due:
            return
        with self._pace.turn():
            self._show(sweep)

    def _show(self, sweep: Sweep) -> None:
        snapshot = sweep.snapshot()
        head, values, recipes = describe(snapshot, has_baseline=sweep.baseline is not None)
        if self.live:
            lines = [Text(printable(line), no_wrap=True, overflow="ellipsis") for line in (head, *recipes)]
            self._write(partial(self.live.update, Group(*lines), refresh=True))
        else:
            self._pace.shortest_s = min(LOG_S[1], max(LOG_S[0], snapshot.elapsed_s / 20))
            line = f"{head}; {values}" if values else head
            self.note(line if len(line) <= LOG_WIDTH else line[: LOG_WIDTH - 1] + "…")

    def note(self, text: str) -> None:
        """Prints one line."""
        if not self.quiet:
            self._write(partial(self.console.print, Text(printable(text))))

    def _write(self, write: Callable[[], None]) -> None:
        """A terminal that is gone costs what would be shown, and no more."""
        try:
            write()
        except OSError:
            self.quiet = True


def describe(snapshot: Snapshot, *, has_baseline: bool) -> tuple[str, str, list[str]]:
    """Says how a study is going: in one line, the best value of each objective in one, and the recipes that have them."""
    head = f"[{format_seconds(snapshot.elapsed_s)}] "
    if not has_baseline:
        return head + "making and measuring the baseline", "", []
    head += f"{snapshot.done}/{snapshot.budget} trials, {snapshot.running} running, "
    head += f"{snapshot.waiting} waiting, " if snapshot.waiting else ""
    head += f"{snapshot.paused} at a rung, " if snapshot.paused else ""
    head += f"failed: {format_failures(snapshot.failed)}"
    if snapshot.note:
        head += f", stopping: {snapshot.note}"
    elif snapshot.left_s is not None:
        head += f", about {format_seconds(snapshot.left_s)} left"
    if snapshot.hypervolume is not None:
        head += f", hypervolume {snapshot.hypervolume:.4f}"
    best = {name: (format_value(name, value), label) for name, (value, label) in snapshot.best.items()}
    values = "best " + ", ".join(f"{name} {value}" for name, (value, _) in best.items()) if best else ""
    return head, values, [f"best {name} {value}: {label}" for name, (value, label) in best.items()]
