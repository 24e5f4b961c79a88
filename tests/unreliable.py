"""A storage that answers badly, as networks do: the write is executed, but what is heard of it differs."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

from workers.node.storage import Storage, StorageFault

WAYS = ("well", "answer lost", "twice", "never arrives", "late")
"""What may become of a ``put_if_absent``."""

LATE_S = 0.003


class Unreliable:
    """Stands before a storage; every ``put_if_absent`` goes one of ``ways``, a look fails with a chance of ``blind``."""

    def __init__(self, storage: Storage, seed: int, ways: Sequence[str] = WAYS, blind: float = 0.0) -> None:
        self.storage, self.ways, self.blind, self.url = storage, ways, blind, storage.url
        self._random = random.Random(seed)
        self._late: list[threading.Timer] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.storage, name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        way = self._random.choice(self.ways)
        if way == "never arrives":
            raise StorageFault(f"{name}: no connection")
        if way == "late":
            self._late.append(threading.Timer(LATE_S, self.storage.put_if_absent, [name, data]))
            self._late[-1].start()
            raise StorageFault(f"{name}: no answer in time")
        created = self.storage.put_if_absent(name, data)
        if way == "answer lost":
            raise StorageFault(f"{name}: the connection was reset")
        if way == "twice":  # a retried request: what is heard is the second answer
            return self.storage.put_if_absent(name, data)
        return created

    def read(self, name: str) -> bytes:
        self._look(name)
        return self.storage.read(name)

    def files(self, prefix: str) -> list[str]:
        self._look(prefix)
        return self.storage.files(prefix)

    def exists(self, name: str) -> bool:
        self._look(name)
        return self.storage.exists(name)

    def _look(self, name: str) -> None:
        if self._random.random() < self.blind:
            raise StorageFault(f"{name}: 503")

    def settle(self) -> None:
        """Waits until every late write has been executed."""
        for timer in self._late:
            timer.join()
