"""Opens the data that a section names, by the opener of its kind, and knows it again by its digest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.tasks.kinds import kind_of
from workers.tasks.task_info import TaskError


def opened(data: Mapping[str, Any]) -> Any:
    """Returns what the opener of the section's kind makes of it.

    Raises:
        TaskError: the kind is unknown, its path is not given, or the data is missing or broken.
    """
    kind = kind_of(data)
    if kind.needs_path and data.get("path") is None:
        raise TaskError(f"data.path must say where the {kind.name} data lies")
    return kind.open(data)


def place(data: Mapping[str, Any]) -> str:
    """Returns how messages name the data: by its path, or else its kind."""
    return str(data.get("path") or data["kind"])


def check_digest(data: Mapping[str, Any], found: str) -> None:
    """Checks that the content is that of the section's ``digest``, where it has one.

    Raises:
        TaskError: it is not.
    """
    expected = data.get("digest")
    if expected and expected != found:
        raise TaskError(
            f"{place(data)}: content must be the study's (digest {expected}), this node's has digest {found}; "
            "copy the same data to every node, or start a new study for the new data"
        )


def given(data: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...] | None:
    """Returns the section's own ``mean`` or ``std``, None where it says none.

    Raises:
        TaskError: it has another number of values than images have channels, or a deviation is none.
    """
    values = data.get(name)
    if values is None:
        return None
    if len(values) != channels or (name == "std" and min(values) <= 0):
        raise TaskError(f"data.{name} must have one value for each of {channels} channels (std above 0), got {values}")
    return tuple(float(value) for value in values)
