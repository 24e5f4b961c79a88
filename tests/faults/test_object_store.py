"""Studies in an object store whose answers are lost, repeated, refused and late: nothing lost, nothing twice."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.ledger import Ledger
from tests.object_store import Proxy, s3_server, use
from tests.processes import environment
from tests.studies import tiny_study
from workers.node.lease import generations
from workers.node.storage import open_storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

PASSING = ("refuse", "lose", "lose and fail", "duplicate", "delay", "500", "503")


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with s3_server() as url:
        made = Proxy(url)
        yield made
        made.close()


def test_a_study_over_a_bad_connection(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two studies that share stages run at once, in one bucket, while every twentieth request meets a fault."""
    chance = random.Random(3)
    proxy.faults = lambda method, path: chance.choice(PASSING) if chance.random() < 0.05 else None
    url = use(monkeypatch, proxy.url)
    names = ["one", "other"]
    for name in names:
        config = tiny_study(name, trials=3, resources={"max_concurrent": 1})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    drivers = [command(tmp_path, url, "run", str(tmp_path / f"{name}.yaml"), "--quiet") for name in names]
    for driver in drivers:
        output = driver.communicate()[0]
        assert driver.returncode == 0, output
        assert "Traceback" not in output
    assert len(proxy.met) == len(PASSING), "every fault was met"
    storage = open_storage(url)
    for name in names:
        rows = Ledger(storage, name).attempts(["trial_id", "status"]).to_pylist()
        assert [row["status"] for row in rows] == ["ok"] * 4
        assert len({row["trial_id"] for row in rows}) == 4
    started = {key: generations(storage, f"stages/{key}/leases") for key in storage.folders("stages")}
    assert set(started.values()) == {1}, "each stage was run once, by whichever study came first"
    status = command(tmp_path, url, "status")
    assert "3/3" in status.communicate()[0]
    assert status.returncode == 0


def command(folder: Path, url: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts `vitpareto` on the object store at ``url``, named by what the test's environment says of it."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *arguments, "--storage", url],
        env=environment(),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
