"""What lies in the storage for a lease: one record a generation, the newest of which counts. Taking and holding: lease.py."""

from __future__ import annotations

import json
import re
from typing import Any

from workers.node.identity import alive
from workers.node.storage import Storage


def generations(storage: Storage, name: str) -> int:
    """Returns how often the lease was taken so far: how often the thing it guards was started."""
    return len(_numbers(storage, name))


def holder(storage: Storage, name: str) -> dict[str, Any] | None:
    """Returns who holds the lease; None where nobody does, or a process of this machine that is gone."""
    record = parse(newest(storage, name)[1])
    return record if record.get("state") == "held" and alive(record) is not False else None


def generation_file(name: str, generation: int) -> str:
    """Returns the name of a generation's file."""
    return f"{name}/{generation:06d}.json"


def _numbers(storage: Storage, name: str) -> list[int]:
    return [int(file[:-5]) for file in storage.files(name) if re.fullmatch(r"[0-9]{6,}\.json", file)]


def newest(storage: Storage, name: str, asked: int = 0) -> tuple[int, bytes]:
    """Returns the newest generation and its record; (0, b"") where there is none.

    Args:
        asked: a generation that was written, perhaps. It is read by its name, since a listing may be late (NFS).
    """
    listed = max(_numbers(storage, name), default=0)
    for number in sorted({listed, max(asked, listed)} - {0}, reverse=True):
        try:
            return number, storage.read(generation_file(name, number))
        except FileNotFoundError:
            continue
    return listed, b""


def parse(content: bytes) -> dict[str, Any]:
    """Returns a generation's record; {} where it is damaged, which is nobody's."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def who(owner: dict[str, Any]) -> str:
    """Names a record's process for people."""
    return f"process {owner.get('pid')} on {owner.get('host')}"
