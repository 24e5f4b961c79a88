"""What a person sees while a study runs: one live line on a terminal, a line now and then in a log. On stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from orchestrator.sweep import Snapshot, Sweep
from orchestrator.units import format_seconds, format_value

LIVE_S = 0.5
LOG_S = 10.0


class Progress:
    """Shows a sweep's snapshot; a context manager. ``quiet`` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(file=sys.stderr, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal and not quiet else None
        self._shown = 0.0
        self._last: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def show(self, sweep: Sweep) -> None:
        """Draws the state of ``sweep`` if enough time has passed since the last drawing."""
        now = time.monotonic()
        if self.quiet or now - self._shown < (LIVE_S if self.live else LOG_S):
            return
        self._shown = now
        snapshot = sweep.snapshot()
        if self.live:
            self.live.update(Group(*(Text(line) for line in describe(snapshot, sweep))), refresh=True)
        else:
            self.console.print(Text("; ".join(describe(snapshot, sweep))))

    def note(self, text: str) -> None:
        """Prints one line."""
        if not self.quiet:
            self.console.print(Text(text))


def describe(snapshot: Snapshot, sweep: Sweep) -> list[str]:
    """Returns the lines that tell a person how a study is going."""
    failed = ", ".join(f"{count} {status}" for status, count in sorted(snapshot.failed.items())) or "none"
    head = f"{snapshot.done}/{snapshot.budget} trials done, {snapshot.running} running, failed: {failed}"
    if sweep.baseline is None:
        head = "making and measuring the baseline"
    lines = [f"[{format_seconds(snapshot.elapsed_s)}] {head}"]
    if snapshot.left_s is not None:
        lines[0] += f", about {format_seconds(snapshot.left_s)} left"
    if snapshot.hypervolume is not None:
        lines[0] += f", hypervolume {snapshot.hypervolume:.4f}"
    for name, (value, label) in snapshot.best.items():
        lines.append(f"best {name} {format_value(name, value)}: {label}")
    if snapshot.note:
        lines.append(f"stopping: {snapshot.note}")
    return lines
