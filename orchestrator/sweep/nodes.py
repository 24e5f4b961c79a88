"""Which nodes of a cluster see the study's storage: each is asked before it gets work, and left out where it does not.

A node's own word for it comes through Ray, since what it writes nobody would find. A trial's process asks again before and
after each trial (trainable.py), for the mount that is lost later. Ray Tune cannot leave a node out; Ray can, by the label that
every node has: see :func:`request`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from orchestrator.sweep.state import Sweep
from workers.node.storage_faults import why_not_seen

NODE_LABEL = "ray.io/node-id"
"""Ray puts it on every node."""

ANSWER_S = 60.0
"""Longest wait for the answers of the nodes that are there at the start; who is later is asked all the same."""

LOOK_S = 5.0
"""Seconds between two looks for nodes that have joined."""

log = logging.getLogger("vitpareto")


def request(resources: dict[str, float], blind: list[str]) -> tune.PlacementGroupFactory:
    """Returns what Tune is to reserve for a trial, on none of the nodes ``blind``."""
    where = [_elsewhere(blind)] if blind else None
    return tune.PlacementGroupFactory([resources], bundle_label_selector=where)


class Nodes:
    """The nodes that do not see the storage of a sweep, and the questions to the others that are not answered yet."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.blind: dict[str, str] = {}
        self._asked: set[str] = set()
        self._open: dict[Any, str] = {}
        self._looked = time.monotonic()

    def ask_all(self) -> None:
        """Asks every node of the cluster and waits for the answers."""
        self._ask_new()
        self._take(ANSWER_S)

    def look(self) -> None:
        """Asks nodes that have joined and takes the answers that are there; waits for nothing."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        self._ask_new()
        self._take(0.0)

    def leave_out(self, node: str, reason: str) -> None:
        """Gives a node no more work. Where no other could do it, the study pauses."""
        if node not in self.blind:
            self.blind[node] = reason
            log.warning("Ray node %s gets no work: %s", node[:12], reason)
        if not any(n["NodeID"] not in self.blind for n in self._able()):
            self.sweep.pause(f"no node sees the study's storage: {reason}")

    def options(self) -> dict[str, Any]:
        """Returns the options of a Ray task that keep it away from blind nodes."""
        return {"label_selector": _elsewhere(sorted(self.blind))} if self.blind else {}

    def _able(self) -> list[dict[str, Any]]:
        """The living nodes that are large enough for a trial."""
        wanted = self.sweep.config.resources
        return [
            node
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
            and node["Resources"].get("CPU", 0.0) >= wanted.cpus
            and node["Resources"].get("GPU", 0.0) >= wanted.gpus
        ]

    def _ask_new(self) -> None:
        for node in self._able():
            identity = node["NodeID"]
            if identity not in self._asked:
                self._asked.add(identity)
                question = ray.remote(num_cpus=0, max_retries=0, label_selector={NODE_LABEL: identity})(why_not_seen)
                self._open[question.remote(self.sweep.storage_url, self.sweep.config.name, self.sweep.token)] = identity

    def _take(self, wait_s: float) -> None:
        if not self._open:
            return
        for answer in ray.wait(list(self._open), num_returns=len(self._open), timeout=wait_s)[0]:
            node = self._open.pop(answer)
            try:
                reason = ray.get(answer)
            except RayError:
                continue  # the node is gone, or cannot start a process: Tune will meet that too
            if reason is not None:
                self.leave_out(node, reason)


def _elsewhere(blind: list[str]) -> dict[str, str]:
    return {NODE_LABEL: f"!in({','.join(blind)})"}
