"""What all tests share: a test marked ``gpu`` is skipped where its device is not."""

from __future__ import annotations

import pytest


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
