"""What a driver's lease means for its sweep, said to the person; no Ray."""

from __future__ import annotations

import logging

from orchestrator.sweep.state import Sweep
from workers.node.lease import Lease

log = logging.getLogger("vitpareto")


class LeaseWatch:
    """Says why nothing is issued (``Sweep.next_work`` sees to that), and ends the run where a successor is there."""

    def __init__(self, sweep: Sweep, lease: Lease) -> None:
        self.sweep, self.lease = sweep, lease
        self._holding = False

    def turn(self) -> bool:
        """Looks, without asking the storage; returns whether the study is this driver's for certain."""
        name, secure = self.sweep.config.name, self.lease.secure
        if self.lease.lost:
            self.sweep.stopping = f"another driver has taken study {name} over"
        elif not secure and not self._holding:
            log.warning(
                "study %s: its lease could not be renewed for %.0f s, since the storage does not answer; nothing new is "
                "started until it does",
                name,
                self.lease.unrenewed_s,
            )
        elif secure and self._holding:
            log.warning("study %s: the storage answers again; going on", name)
        self._holding = not secure
        return secure
