"""Asks a storage, before anything rests on it, whether it does what the contract says."""

from __future__ import annotations

import uuid

from workers.node.storage.contract import Storage, StorageFault


def probe(storage: Storage) -> None:
    """Writes and removes a small file, and looks whether a second writer of it is refused.

    Raises:
        StorageFault: the storage cannot be written, does not show what was written, or lets two writers win (an object store
            without conditional writes, which some servers and gateways ignore in silence).
    """
    name = f".probe-{uuid.uuid4().hex}"
    try:
        first = storage.put_if_absent(name, b"first")
        second = storage.put_if_absent(name, b"second")
        seen = storage.read(name)
    except FileNotFoundError:
        raise StorageFault(f"storage {storage.url}: does not show what was just written to it") from None
    finally:
        storage.delete(name)
    if (first, second, seen) != (True, False, b"first"):
        raise StorageFault(
            f"storage {storage.url}: of two writers of one new file both won, so studies could not be kept apart; it needs "
            "conditional writes (If-None-Match: * on PUT): use a server that has them, or a folder"
        )
