"""Where a study lives: one small interface over a local folder or an object store.

Four calls carry everything: ``put_atomic`` (a reader sees the old bytes or the new, never a part), ``put_if_absent`` (exactly
one of several writers wins: leases), ``read`` and ``files``. Names are relative, ``/``-separated paths. What every storage
answers is in ``contract.py``, why it is so in docs/decisions/0020-storage.md.
"""

from __future__ import annotations

from pathlib import Path

from workers.node.storage.contract import Storage, StorageFault
from workers.node.storage.local import LocalStorage
from workers.node.storage.probe import probe

__all__ = ["LocalStorage", "Storage", "StorageFault", "open_storage", "probe"]


def open_storage(url: str | Path) -> Storage:
    """Returns the storage at a path or URL (``results``, ``/shared/sweeps``, ``s3://bucket/sweeps``).

    Raises:
        ValueError: no storage is known for the URL's scheme.
        StorageFault: the object store's client cannot be set up.
    """
    text = str(url)
    if "://" in text and not text.startswith("file://"):
        # Installed where object stores are used; a folder needs none.
        from workers.node.storage.objects import ObjectStorage

        return ObjectStorage(text)
    return LocalStorage(text.removeprefix("file://"))
