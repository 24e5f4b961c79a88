"""The Ray that a study runs on: a connection to a cluster, or a local one for the time of a block."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import ray

from orchestrator.study.schema import StudyConfig
from orchestrator.sweep.marked import MARK, end_marked
from orchestrator.sweep.outcome import StudyFailed
from orchestrator.sweep.watch import Watch

_LOCAL_TOKEN = secrets.token_hex(32)
"""Of local Rays; one for the process, since Ray reads it once."""

STARTS = 3
"""Times that a local Ray is started before the run gives up: a busy machine is too slow for Ray's own limits."""

PAUSE_S = 5.0
"""Seconds between two starts."""

SHUTDOWN_S = 30.0
"""Longest that Ray may take to shut down before the watch takes it for lost; it takes two."""

log = logging.getLogger("vitpareto")


@contextmanager
def connection(config: StudyConfig, address: str | None, watch: Watch | None = None) -> Iterator[None]:
    """A connection to ``address``, or a local Ray for the time of the block.

    The environment of the driver's process is put back afterwards.

    Args:
        watch: watches over Ray during the block; None where nobody could act on what it sees.

    Raises:
        StudyFailed: this machine lacks what a trial needs, or Ray cannot be started or reached.
    """
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner even at verbose=0
    }
    if address is None:
        # With a token at hand, a local Ray turns token authentication on and writes no token file that others can read.
        wanted |= {"RAY_AUTH_TOKEN": _LOCAL_TOKEN, MARK: secrets.token_hex(8)}
    before = {name: os.environ.get(name) for name in (*wanted, "RAY_AUTH_MODE")}
    os.environ.update({k: v for k, v in wanted.items() if before[k] is None})
    # Tune logs each lost trial with a traceback; what happened is a row, and a line where a person must know.
    tune, level = logging.getLogger("ray.tune"), logging.getLogger("ray.tune").level
    tune.setLevel(logging.CRITICAL)
    try:
        if address is None:
            _start(config)
            _check_local_resources(config)
        else:
            _connect(address)
        with nullcontext() if watch is None else watch.over(_places()):
            yield
    finally:
        tune.setLevel(level)
        _shut_down(watch, local=address is None)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _start(config: StudyConfig) -> None:
    """Starts a local Ray; one that comes up too slowly is cleared away and started again.

    Raises:
        StudyFailed: it did not come up.
    """
    for left in reversed(range(STARTS)):
        try:
            with _own_termination():
                ray.init(
                    "local",  # None would join whatever cluster was last started on this machine
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    num_cpus=_local_cpus(config),
                )
            return
        except Exception as error:  # Ray raises bare Exception here
            _shut_down(None, local=True)
            why = _first_line(error)
            if not left:
                raise StudyFailed(
                    f"Ray did not start on this machine, tried {STARTS} times: {why}; free the machine of other work and "
                    "try again, or use a Ray that runs with --address"
                ) from error
            log.warning("Ray did not start (%s); trying again in %.0f s", why, PAUSE_S)
            time.sleep(PAUSE_S)


def _connect(address: str) -> None:
    try:
        with _own_termination():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise StudyFailed(
            f"--address {address}: Ray cannot be reached there: {_first_line(error)}; `ray status` knows more"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _own_termination() -> Iterator[None]:
    """Puts back what SIGTERM does: Ray's start replaces it by an exit in the middle of whatever runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _places() -> dict[str, tuple[str, int]]:
    """Where the parts of the cluster listen without which this driver can do nothing."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    places = {"Ray's GCS": (host.strip("[]"), int(port))}
    mine = own_node()
    if mine is not None:
        places["the raylet of this node"] = (mine["NodeManagerAddress"], int(mine["NodeManagerPort"]))
    return places


def own_node() -> dict[str, Any] | None:
    """Returns what Ray says of the driver's node, None where it does not know it any more."""
    node = ray.get_runtime_context().get_node_id()
    return next((n for n in ray.nodes() if n["NodeID"] == node), None)  # type: ignore[no-untyped-call]


def _shut_down(watch: Watch | None, *, local: bool) -> None:
    """Ends the connection, and what a local Ray leaves; a shutdown that hangs is a loss."""
    hangs = threading.Timer(SHUTDOWN_S, watch.lose, ["Ray does not shut down"]) if watch else None
    if hangs is not None:
        hangs.daemon = True
        hangs.start()
    try:
        with suppress(Exception) if local else nullcontext():  # whatever it was, its processes are ended below
            ray.shutdown()
    finally:
        if hangs is not None:
            hangs.cancel()
    if local:
        end_marked(os.environ[MARK])


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
