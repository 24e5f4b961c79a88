"""Runs a study on two Ray nodes and takes one away while it runs a trial: `python -m tests.lose_node STUDY.yaml STORAGE`."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from orchestrator.sweep.driver import run_study
from workers.node.storage import open_storage

STORE_BYTES = 100_000_000


def remove_node_of_the_sleeper(cluster: Cluster, ledger: Ledger) -> None:
    """Waits for the trial that says that it sleeps, then takes its node away without warning."""
    while not Path(os.environ["VITPARETO_FAULT_MARK"]).exists():
        time.sleep(0.1)
    sleeping = {row["node"] for row in ledger.running().values()}
    node = next(n for n in cluster.worker_nodes if n.node_id in sleeping)
    cluster.remove_node(node, allow_graceful=False)


def main(study: str, storage: str) -> None:
    config = load_study(study)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    ledger = Ledger(open_storage(storage), config.name)
    threading.Thread(target=remove_node_of_the_sleeper, args=(cluster, ledger), daemon=True).start()
    try:
        done = run_study(config, storage=storage, address=cluster.address, quiet=True)
    finally:
        cluster.shutdown()
    if not done.complete:
        sys.exit(f"stopped early: {done.reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
