"""The marks of tests: what `./dev test` runs two at a time must not be what needs the machine for itself."""

from __future__ import annotations

import pytest
import ray


def test_ray_does_not_start_where_the_mark_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)  # so that none is written into the home folder
    with pytest.raises(NotADirectoryError, match="a test that starts Ray is marked ray"):
        ray.init("local", include_dashboard=False)
