"""A Ray cluster of one node that belongs to nobody's run: `python -m tests.hold_cluster` prints its address and keeps it."""

from __future__ import annotations

import signal

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100_000_000})
    print(cluster.address, flush=True)
    signal.pause()
