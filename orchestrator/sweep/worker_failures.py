"""Why a worker was lost, told from Ray's words and from whether its node still answers."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

NODE_ANSWER_S = 2.0
"""Longest wait for a node's answer after one of its workers was lost."""

_BLIND = re.compile(r"StorageNotSeen: (.*) \[Ray node ([0-9a-f]+)\]")


def loss_reason(trial: Any) -> str:
    """Returns why Tune lost a trial's actor. From the file that Tune has just written: it hands the exception to nobody."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    return text.partition("\n")[2].strip() or "the worker is gone, Ray gives no reason"


def loss_class(reason: str, marks: Sequence[Mapping[str, Any]]) -> str:
    """Returns the failure class of a lost worker: preempted, node_lost, host_oom or worker_died.

    Args:
        reason: Ray's own words.
        marks: where the trials of the worker ran. Ray's memory monitor kills innocent workers beside the culprit.
    """
    if any(words in reason for words in ("OutOfMemory", "low on memory")):
        culprit = memory_culprit(reason)
        return "host_oom" if culprit is None or culprit in {m.get("pid") for m in marks} else "worker_died"
    if "node was preempted" in reason:
        return "preempted"
    if "node has died" in reason:
        return "node_lost"
    nodes = {m.get("node") for m in marks}
    mine = [n for n in ray.nodes() if n["NodeID"] in nodes]  # type: ignore[no-untyped-call]
    return "node_lost" if any(not _answers(node) for node in mine) else "worker_died"


def _answers(node: Mapping[str, Any]) -> bool:
    """Says whether a node is there. Ray itself notices a lost one only after half a minute; its closed port tells at once."""
    if not node["Alive"]:
        return False
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), NODE_ANSWER_S).close()
    except OSError:
        return False
    return True


def memory_culprit(reason: str) -> int | None:
    """Returns the process that used most memory of those that Ray's memory monitor killed; None where Ray does not say."""
    killed = re.findall(r"Selected to kill: .*pid=(\d+), actual memory used=([\d.]+)GB", reason)
    return int(max(killed, key=lambda found: float(found[1]))[0]) if killed else None


def blind_words(reason: str, node: str | None) -> str:
    """Returns what a trial's process says through Ray where it does not see the storage; :func:`blind_node` reads it."""
    return f"{reason} [Ray node {node}]" if node else reason


def blind_node(text: str) -> tuple[str, str] | None:
    """Returns (node, reason) where Ray's words about a lost worker are those of a node that does not see the storage."""
    found = _BLIND.search(text)
    return (found[2], found[1]) if found else None
