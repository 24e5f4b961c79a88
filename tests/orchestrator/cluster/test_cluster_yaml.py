"""cluster.yaml: Ray's own validation, and what that lets through: the commands, the pins, the exposure. No AWS, no boto3."""

from __future__ import annotations

import copy
import itertools
import re
import shlex
import subprocess
from typing import Any

import click
import pytest
import yaml

from orchestrator.cluster.submit import stop_settings
from tests.places import ROOT

TEXT = (ROOT / "cluster.yaml").read_text()
COMMANDS = (
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@pytest.fixture
def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(TEXT)
    return config


def all_commands(config: dict[str, Any]) -> list[str]:
    return [command for key in COMMANDS for command in config[key]]


def ray_starts(config: dict[str, Any]) -> list[list[str]]:
    """Returns the arguments of every ``ray start``."""
    found = []
    for command in all_commands(config):
        words = shlex.shlex(command, posix=True, punctuation_chars=";&|")
        words.whitespace_split = True
        for separator, group in itertools.groupby(words, key=lambda word: set(word) <= set(";&|")):
            part = list(group)
            if not separator and part[:2] == ["ray", "start"]:
                found.append(part[2:])
    return found


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Returns the options of a ``ray start`` as Ray's own parser reads them.

    Raises:
        click.ClickException: Ray would refuse them.
    """
    from ray.scripts.scripts import start

    return start.make_context("ray start", list(arguments)).params


def exported(command: str) -> dict[str, str]:
    """Returns what a command exports."""
    words = [w for part in command.split(";") if part.strip().startswith("export ") for w in shlex.split(part)[1:]]
    return dict(word.split("=", 1) for word in words)


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu_spot"]["min_workers"] == 0
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    merged = [c for key in COMMANDS for c in prepared[key]]
    assert not [c for c in merged if "nightly" in c or "ray-wheels" in c or "0.0.0.0" in c]  # Ray's defaults for AWS


def test_ray_refuses_an_unknown_key(cluster: dict[str, Any]) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster["max_wokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(prepare_config(cluster))


def test_every_ray_start_parses(cluster: dict[str, Any]) -> None:
    head, worker = map(parsed, ray_starts(cluster))
    assert head["head"]
    assert not worker["head"]
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"


def test_a_misspelt_flag_is_found(cluster: dict[str, Any]) -> None:
    wrong = copy.deepcopy(cluster)
    wrong["head_start_ray_commands"][-1] = wrong["head_start_ray_commands"][-1].replace(
        "--dashboard-host", "--dashbord-host"
    )
    with pytest.raises(click.NoSuchOption, match="--dashbord-host"):
        [parsed(arguments) for arguments in ray_starts(wrong)]


@pytest.mark.parametrize("command", all_commands(yaml.safe_load(TEXT)))
def test_commands_are_shell(command: str) -> None:
    done = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, done.stderr


def test_shell_check_finds_a_fault() -> None:
    done = subprocess.run(["bash", "-n"], input="ray start || { echo x", capture_output=True, text=True, timeout=10)
    assert done.returncode != 0


def test_dashboard_is_on_loopback(cluster: dict[str, Any]) -> None:
    assert parsed(ray_starts(cluster)[0])["dashboard_host"] == "127.0.0.1"


def test_token_authentication_is_shipped(cluster: dict[str, Any]) -> None:
    starts = [c for c in all_commands(cluster) if "ray start" in c]
    assert len(starts) == 2
    assert all(exported(c)["RAY_AUTH_MODE"] == "token" for c in starts)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert cluster["setup_commands"][0].startswith("chmod 600 ~/.ray/auth_token")


def test_jobs_stop_cleanly(cluster: dict[str, Any]) -> None:
    head = next(c for c in cluster["head_start_ray_commands"] if "ray start" in c)
    assert stop_settings().items() <= exported(head).items()


def test_ray_is_pinned_as_in_the_constraints(cluster: dict[str, Any]) -> None:
    pin = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert re.findall(r"\bray\[[\w,]+\]\s*([=<>~!]=?\S*?)\"", " ".join(all_commands(cluster))) == [f"=={pin[1]}"]
    assert (ROOT / cluster["file_mounts"]["~/vitpareto/constraints.txt"]).is_file()


def test_workers_are_spot_from_zero_and_heads_are_not(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head, worker = types[cluster["head_node_type"]], types["gpu_spot"]
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["min_workers"] == 0
    assert worker["resources"]["GPU"] >= 1
    assert worker["max_workers"] <= cluster["max_workers"]
    assert re.fullmatch(r"(m|c|t)\d\w*\.(\d*x)?large", head["node_config"]["InstanceType"])
    assert re.fullmatch(r"(g|p)\d\w*\.\d*xlarge", worker["node_config"]["InstanceType"])


def test_region_is_one_everywhere(cluster: dict[str, Any]) -> None:
    region = cluster["provider"]["region"]
    assert all(zone.startswith(region) for zone in cluster["provider"]["availability_zone"].split(","))
    assert set(re.findall(r"\.efs\.([\w-]+)\.amazonaws", TEXT)) == {region}


def test_no_secrets_and_no_ids_of_an_account() -> None:
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|RAY_AUTH_TOKEN=|aws_secret|password", TEXT, re.IGNORECASE
    )
    assert set(re.findall(r"\b(?:ami|fs|sg|subnet|vpc)-([0-9a-f]{8,17})\b", TEXT)) == {"0" * 17}
