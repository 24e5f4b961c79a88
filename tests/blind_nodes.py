"""Runs studies on Ray nodes of which some do not see the storage: `python -m tests.blind_nodes STUDY.yaml STORAGE`.

Three nodes of one machine, two of them in mount namespaces of their own: from one the storage is hidden from the start, from
the other after the baseline. A second study then has only these two. Prints both runs as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import ray
from ray.cluster_utils import Cluster

from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from orchestrator.sweep.driver import run_study
from workers.node.storage import open_storage

STORE_BYTES = 100_000_000


START_S = 60.0
"""Longest wait for a node to join: two that start at once on one machine may take each other's ports."""


def add_node(address: str, hide: str | None) -> subprocess.Popen[bytes]:
    """Starts a node and waits until it has joined; another try where it does not."""
    before = ray.cluster_resources().get("CPU", 0)
    for _ in range(3):
        node = start_node(address, hide)
        until = time.monotonic() + START_S
        while time.monotonic() < until and node.poll() is None:
            if ray.cluster_resources().get("CPU", 0) > before:
                return node
            time.sleep(0.1)
        node.kill()
    raise RuntimeError("a Ray node did not join in three tries")


def start_node(address: str, hide: str | None) -> subprocess.Popen[bytes]:
    """Starts a Ray node in a mount namespace of its own, in which an empty folder may lie over ``hide``."""
    start = f"{sys.executable} -m ray.scripts.scripts start --address={address} --num-cpus=1 --block"
    start += f" --object-store-memory={STORE_BYTES} --disable-usage-stats"
    mount = f"mount -t tmpfs tmpfs '{hide}' && " if hide else ""
    command = ["unshare", "--mount", "bash", "-c", f"{mount} exec {start}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def hide_after_the_baseline(node: subprocess.Popen[bytes], ledger: Ledger, storage: str) -> None:
    while not len(ledger.attempts(["attempt_id"])):
        time.sleep(0.1)
    subprocess.run(["nsenter", f"--target={node.pid}", "--mount", "mount", "-t", "tmpfs", "tmpfs", storage], check=True)


def main(study: str, storage: str) -> None:
    config = load_study(study)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    sighted = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        nodes += [add_node(cluster.address, hide) for hide in (storage, None)]
        ray.shutdown()
        ledger = Ledger(open_storage(storage), config.name)
        threading.Thread(target=hide_after_the_baseline, args=(nodes[1], ledger, storage), daemon=True).start()
        runs = [run_study(config, storage=storage, address=cluster.address, quiet=True)]
        cluster.remove_node(sighted)
        alone = config.model_copy(update={"name": f"{config.name}_alone"})
        runs.append(run_study(alone, storage=storage, address=cluster.address, quiet=True))
    finally:
        for node in nodes:
            node.terminate()
        cluster.shutdown()
    print(json.dumps([asdict(run) for run in runs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
