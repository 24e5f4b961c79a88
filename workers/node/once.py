"""What is calculated once a study, whoever needs it first, and kept beside the baseline's artefact for everybody."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workers.node.deadline import Deadline
from workers.node.lane import Lane
from workers.node.lease import acquire
from workers.node.storage import Storage


@dataclass(frozen=True)
class OnceAStudy:
    """Makes a file of the study where it is absent; others wait for it meanwhile, and no trial pays for it.

    Attributes:
        folder: of the baseline's stage in ``storage``.
        batches: yields (images, labels) of training, in one order whatever the trial's seed.
        lane: may be held shared by the caller, who lets a measurement go first while it waits.
    """

    storage: Storage
    folder: str
    batches: Callable[[], Iterator[tuple[Any, Tensor]]]
    lane: Lane
    deadline: Deadline

    def __call__(self, name: str, make: Callable[[Callable[[], Iterator[tuple[Any, Tensor]]]], bytes]) -> bytes:
        """Returns the file ``name``, JSON, which ``make`` gives from batches of (images, labels) if nobody has yet.

        A file that is no JSON is damaged and made again.
        """
        path = f"{self.folder}/{name}"
        self._make(path, make)
        try:
            found = self.storage.read(path)
            json.loads(found)
        except (ValueError, FileNotFoundError):
            self.storage.delete(path)
            self._make(path, make)
            found = self.storage.read(path)
        return found

    def _make(self, path: str, make: Callable[[Callable[[], Iterator[tuple[Any, Tensor]]]], bytes]) -> None:

        def done() -> bool:
            # The holder of the lease may wait for a measurement, and that for us.
            self.lane.tick()
            return self.storage.exists(path)

        with self.deadline.paused():
            lease = acquire(self.storage, f"{path}.leases", wait=done)
            if lease is not None:
                with lease:
                    if not done():
                        data = make(self.batches)
                        self.storage.put_if_absent(path, data)  # not over a successor's, which others read
