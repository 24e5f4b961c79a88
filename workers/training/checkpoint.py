"""States of a training that runs, so that a kill costs minutes: safetensors and JSON in the storage, deleted at the end.

A state is ``<n>.<random>.safetensors`` and, written after it, ``<n>.json``, which names the tensors' file and its SHA-256.
The last two generations are kept; what is damaged, or belongs to another training, is passed over with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from workers.node.storage import Storage

log = logging.getLogger("vitpareto")

FORMAT = 1
"""Raised when an older state would be read wrongly; those of another format are passed over."""

KEPT = 2
"""Generations that stay: the newest, and one to fall back on."""

MOST_SHARE = 0.05
"""Most of the time that goes into writing states: where that takes long, they are written less often than asked."""

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and plain values."""


class Checkpoints:
    """The states of one training in a folder of a storage."""

    def __init__(self, storage: Storage, folder: str, identity: str) -> None:
        """Looks at nothing yet.

        Args:
            identity: names the training; a state with another one is foreign.
        """
        self.storage, self.folder, self.identity = storage, folder, identity
        self._written = time.monotonic()
        self._cost_s = 0.0

    def due(self, every_s: float) -> bool:
        """Says whether it is time for the next state: ``every_s`` seconds after the last one, or after the start."""
        return time.monotonic() - self._written >= max(every_s, self._cost_s / MOST_SHARE)

    def write(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Writes the next generation and removes all but the last :data:`KEPT`."""
        start = time.monotonic()
        number = max(self._numbers(), default=0) + 1
        data = safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
        name = f"{number:06d}.{uuid.uuid4().hex[:8]}.safetensors"
        self.storage.put_atomic(f"{self.folder}/{name}", data)
        record = {
            "format": FORMAT,
            "identity": self.identity,
            "tensors": name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "values": dict(values),
        }
        self.storage.put_atomic(f"{self.folder}/{number:06d}.json", json.dumps(record).encode())
        self._remove(older_than=number - KEPT + 1)
        self._written = time.monotonic()
        self._cost_s = self._written - start

    def states(self) -> Iterator[State]:
        """Yields the sound states, the newest first."""
        for number in sorted(self._numbers(), reverse=True):
            name = f"{self.folder}/{number:06d}.json"
            try:
                record = json.loads(self.storage.read(name))
                fault = self._fault(record)
                if fault is None:
                    data = self.storage.read(f"{self.folder}/{record['tensors']}")
                    if hashlib.sha256(data).hexdigest() == record["sha256"]:
                        yield safetensors.torch.load(data), record["values"]
                        continue
                    fault = "its tensors are not what was written"
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                fault = f"it cannot be read: {type(error).__name__}: {error}"
            log.warning("%s/%s: this state of a training is passed over: %s", self.storage.url, name, fault)

    def clear(self) -> None:
        """Removes every state."""
        self._remove(older_than=None)

    def _fault(self, record: Mapping[str, Any]) -> str | None:
        if record["format"] != FORMAT:
            return f"it has format {record['format']}, this version reads {FORMAT}"
        if record["identity"] != self.identity:
            return "it belongs to another training"
        return None

    def _numbers(self) -> list[int]:
        names = [n.removesuffix(".json") for n in self.storage.files(self.folder) if n.endswith(".json")]
        return [int(n) for n in names if n.isdigit()]

    def _remove(self, older_than: int | None) -> None:
        for name in self.storage.files(self.folder):
            number = name.split(".")[0]
            if older_than is None or (number.isdigit() and int(number) < older_than):
                self.storage.delete(f"{self.folder}/{name}")
