"""A recipe that takes all the memory that the run is allowed costs that recipe, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Study
from tests.studies import fault_study

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

LIMIT_BYTES = 6 << 30
"""What a driver, its keeper, Ray and two workers take is half of it; the hog takes 128 MiB at a time."""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Makes a control group with that much memory; the test is skipped where this process may not."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"vitpareto-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(LIMIT_BYTES))
        except OSError:
            group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("making a control group needs the rights of root")


def test_a_hog_in_a_control_group_costs_its_recipe_alone(tmp_path: Path, cgroup: Path) -> None:
    study = Study(tmp_path, fault_study("hogs", ["hog", "none"], retries=1, resources={"max_concurrent": 1}))
    enter = f"import os, sys; open({str(cgroup / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); os.execv(sys.argv[1], sys.argv[1:])"
    study.prefix = [sys.executable, "-c", enter]
    study.run()
    kinds = study.kinds()
    assert set(kinds["hog"]) <= {"host_oom", "worker_died"}, "Ray's monitor ends it, or the kernel does"
    assert kinds["none"][-1] == kinds["baseline"][-1] == "ok"
    assert study.left() == []
