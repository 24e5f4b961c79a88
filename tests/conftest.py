"""What all tests share: one thread, a lane and a cache of their own, Ray only where the mark says so; a test marked ``gpu`` is
skipped where its device is not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Read when torch is imported. The models of the tests are so small that a second thread makes them slower (by a third on two
# busy cores); what is about threads sets their number itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")

RAY_TMPDIR = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
"""Where Ray keeps its sessions; Ray's own default, since the paths of its sockets must be short."""


@pytest.fixture(scope="session", autouse=True)
def _own_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps tests and their processes from waiting for, or reading from, what else the user runs on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, folder in (("VITPARETO_LANE_DIR", "lane"), ("VITPARETO_CACHE", "cache")):
            patch.setenv(variable, str(tmp_path_factory.mktemp(folder)))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets only tests marked ``ray`` start one, they or their fixtures: `./dev test` runs all others two at a time."""
    allowed = item.get_closest_marker("ray") is not None
    os.environ["RAY_TMPDIR"] = RAY_TMPDIR if allowed else "/dev/null/a test that starts Ray is marked ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu``, or ``gpu(capability=(8, 9))``, where there is no such CUDA device."""
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark is None:
            continue
        import torch  # seconds, which tests of the command line alone need not wait for

        least = tuple(mark.kwargs.get("capability", (0, 0)))
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < least:
            wanted = f" of compute capability {'.'.join(map(str, least))} or later" if any(least) else ""
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device{wanted}"))
