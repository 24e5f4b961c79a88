"""The processes of a Ray of our own: known by a variable that they inherit, ended without asking them.

Ray's processes are no group of their own, workers change what they are called, and those of a dead raylet belong to nobody:
what they were started with is what is left to know them by.
"""

from __future__ import annotations

import os
from contextlib import suppress

import psutil

MARK = "VITPARETO_RAY"
"""Variable that every process of a local Ray inherits; its value is one run's."""

END_S = 10.0
"""Longest wait for killed processes to be gone; one that hangs in the kernel is left to it."""


def end_marked(mark: str) -> None:
    """Kills every process but this one that was started with ``mark``, with what it started, and waits until it is gone.

    A second look finds what those of the first started meanwhile.
    """
    while found := _find(mark):
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        if psutil.wait_procs(found, timeout=END_S)[1]:
            return


def _find(mark: str) -> list[psutil.Process]:
    found = [p for p in psutil.process_iter() if p.pid != os.getpid() and _marked(p, mark)]
    for process in tuple(found):
        with suppress(psutil.Error):  # one that wrote its title over its environment is known by its parent
            found += [child for child in process.children(recursive=True) if child not in found]
    return found


def _marked(process: psutil.Process, mark: str) -> bool:
    with suppress(psutil.Error, OSError):
        return bool(process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE)
    return False
