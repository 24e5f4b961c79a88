"""The Ray that a study runs on: a connection to a cluster, or a local one for the time of a block."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from orchestrator.study.schema import StudyConfig
from orchestrator.sweep.state import StudyFailed

_LOCAL_TOKEN = secrets.token_hex(32)
"""Of local Rays; one for the process, since Ray reads it once."""


@contextmanager
def connection(config: StudyConfig, address: str | None) -> Iterator[None]:
    """A connection to ``address``, or a local Ray for the time of the block.

    The environment of the driver's process is put back afterwards.

    Raises:
        StudyFailed: this machine lacks what a trial needs.
    """
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner even at verbose=0
    }
    if address is None:
        # With a token at hand, a local Ray turns token authentication on and writes no token file that others can read.
        wanted["RAY_AUTH_TOKEN"] = _LOCAL_TOKEN
    before = {name: os.environ.get(name) for name in (*wanted, "RAY_AUTH_MODE")}
    os.environ.update({k: v for k, v in wanted.items() if before[k] is None})
    try:
        if address is None:
            ray.init(
                "local",  # None would join whatever cluster was last started on this machine
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                num_cpus=_local_cpus(config),
            )
            _check_local_resources(config)
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _check_local_resources(config: StudyConfig) -> None:
    """A local Ray does not grow: what it lacks would be waited for until the end of time."""
    wanted = {"GPU": config.resources.gpus, "memory": float(config.resources.memory or 0)}
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, amount in wanted.items():
        if amount > there.get(name, 0.0):
            raise StudyFailed(
                f"resources: a trial needs {amount:g} of {name}, this machine offers {there.get(name, 0.0):g}; ask for "
                "less or run it on a cluster with --address"
            )


def _local_cpus(config: StudyConfig) -> int:
    return max(os.cpu_count() or 1, config.resources.cpus)


def at_once(config: StudyConfig, address: str | None) -> int:
    """Trials in flight at once; 0 lets a cluster, which may grow, take as many as it has room for."""
    if config.resources.max_concurrent is not None or address is not None:
        return config.resources.max_concurrent or 0
    return max(1, _local_cpus(config) // config.resources.cpus)
