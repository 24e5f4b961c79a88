"""A technique that fails in a chosen way, added from outside the package through an entry point."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.record import Applied, Surroundings, Technique, choice, number

KINDS = ("none", "nan", "allocate", "sleep", "hang", "raise", "die", "die_once", "sleep_once", "hog", "uneven")


@dataclass(frozen=True)
class Config:
    kind: str = choice("none", KINDS, doc="how it fails")
    level: int = number(0, 0, 100, 1, doc="makes recipes distinct")


def fail(kind: str) -> None:
    if kind == "allocate":
        torch.empty(1 << 52)
    elif kind == "sleep":
        for _ in range(6000):
            time.sleep(0.01)
    elif kind == "hang":  # in native code: no Python signal handler runs
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(600)
    elif kind == "raise":
        raise RuntimeError("the fault technique was told to raise")
    elif kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind in ("die_once", "sleep_once"):
        mark = Path(os.environ["VITPARETO_FAULT_MARK"])
        if not mark.exists():
            mark.touch()
            fail(kind.removesuffix("_once"))
    elif kind == "hog":
        held = []
        while True:
            held.append(torch.ones(32 << 20, dtype=torch.float32))  # 128 MiB, touched
            time.sleep(0.02)


def apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Scales the last bias a little, so that something changes, or fails."""
    fail(config.kind)
    with torch.no_grad():
        head = model.get_submodule("head")
        head.bias.add_(float("nan") if config.kind == "nan" else config.level * 1e-3)
    resolved = {"uneven": config.kind == "uneven"}
    return Applied(rebuild(model, resolved), resolved, ["head.bias"])


def rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    if resolved["uneven"]:
        model.forward = MethodType(uneven, model)
    return model


def uneven(model: nn.Module, inputs: Tensor) -> Tensor:
    """Answers every other call with the same inputs from memory: correct, and of uncertain speed on any machine."""
    known = getattr(model, "known", None)
    if known is not None and known[0] is inputs:
        model.known = None
        return known[1]
    output = type(model).forward(model, inputs)
    model.known = (inputs, output)
    return output


TECHNIQUE = Technique(
    name="fault",
    family="pruning",
    version=1,
    Config=Config,
    stage="surgery",
    apply=apply,
    rebuild=rebuild,
    source="none; for tests",
)
