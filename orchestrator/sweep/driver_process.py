"""The driver in a process of its own, which its keeper (keeper.py) may end at any moment.

It reads one line of JSON from stdin, what to run, and answers with lines of JSON on a file of its own, the last of which says how
it ended. Stdin stays open as long as the keeper lives; when it closes, this process ends at once, as if both were one.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from typing import Any

from orchestrator.sweep.signals import Interruption, taken
from orchestrator.sweep.watch import Watch

LOST = 75
"""Exit status after the cluster was lost."""


class Line:
    """The way to the keeper."""

    def __init__(self, file: int) -> None:
        os.set_inheritable(file, False)
        self._file = file
        self._lock = threading.Lock()

    def say(self, **record: Any) -> None:
        """Sends one record."""
        with self._lock:
            os.write(self._file, json.dumps(record).encode() + b"\n")

    def lost(self, reason: str) -> None:
        """Ends the process, whatever its threads wait for: what ended is in the ledger, and the keeper takes care of the rest."""
        self.say(lost=reason)
        os._exit(LOST)


def main(request: Mapping[str, Any]) -> None:
    """Runs what the keeper asks for.

    Args:
        request: ``file`` (a descriptor for the answers), ``call`` (a function of ``orchestrator.sweep.driver``), ``config`` (of
            the study) and ``arguments``, plain values.
    """
    line, interruption = Line(int(request["file"])), Interruption()
    threading.Thread(target=_die_with_keeper, name="keeper", daemon=True).start()
    with taken(interruption):
        try:
            line.say(at="ready")
            value = _run(request, line, interruption)
            interruption.ignore()
            line.say(value=value)
        except BaseException as error:  # noqa: BLE001 - the boundary: whatever happens is told
            stopped = interruption.signal is not None or isinstance(error, KeyboardInterrupt | SystemExit)
            interruption.ignore()
            line.say(interrupted=interruption.signal or signal.SIGINT) if stopped else line.say(error=told(error))


def _run(request: Mapping[str, Any], line: Line, interruption: Interruption) -> Any:
    from orchestrator.study.schema import StudyConfig  # after the handlers: with torch, Ray and Tune it takes seconds
    from orchestrator.sweep import driver

    def at(phase: str) -> None:
        if phase == "saves":
            interruption.ignore()
        line.say(at=phase)

    config = StudyConfig.from_dict(request["config"])
    arguments = {**request["arguments"], "watch": Watch(line.lost)}
    if request["call"] == "remeasure_study":
        return driver.remeasure_study(config, **arguments)
    done = driver.run_study(config, **arguments, at=at)
    return {**asdict(done), "failed": dict(done.failed), "signal": interruption.signal}


def _die_with_keeper() -> None:
    """Waits for the keeper's end. Reads past Python's buffer: another thread may not hold its lock at exit."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def told(error: BaseException) -> dict[str, Any]:
    """Returns an exception as plain values; :func:`raised` makes one of its class again."""
    values = [error.errno, error.strerror, error.filename] if isinstance(error, OSError) else []
    return {
        "module": type(error).__module__,
        "name": type(error).__qualname__,
        "values": values if values and values[0] is not None else [str(error)],
        "trace": "".join(traceback.format_exception(error)),
    }


def raised(record: Mapping[str, Any]) -> Exception:
    """Returns the exception that :func:`told` told of, or a RuntimeError with its words where it cannot be made again."""
    error: Exception = RuntimeError(f"{record['name']}: {record['values'][-1]}")
    with suppress(Exception):  # a class that wants other arguments
        again = getattr(import_module(record["module"]), record["name"])(*record["values"])
        error = again if isinstance(again, Exception) else error
    error.add_note(f"In the driver's process:\n{record['trace']}")
    return error


def start_code() -> str:
    """Returns the program of the process: the keeper's import path comes first, then everything else."""
    return (
        "import json, sys; request = json.loads(sys.stdin.buffer.raw.readline()); sys.path[:] = request['path']; "
        f"from {__name__} import main; main(request)"
    )
