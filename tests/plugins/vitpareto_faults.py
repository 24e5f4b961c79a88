"""A technique that fails in a chosen way, added from outside the package through an entry point.

Every process that knows the techniques imports it, workers before they run a stage: with VITPARETO_HOLD they can be made to
wait at a moment at which they are to be killed (``tests.processes.Study.hold``).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.record import Applied, Surroundings, Technique, choice, number

KINDS = (
    "none",
    "nan",
    "allocate",
    "sleep",
    "hang",
    "raise",
    "raise_once",
    "die",
    "die_once",
    "sleep_once",
    "hog",
    "uneven",
)


@dataclass(frozen=True)
class Config:
    kind: str = choice("none", KINDS, doc="how it fails")
    level: int = number(0, 0, 100, 1, doc="makes recipes distinct")


def fail(kind: str) -> None:
    if kind == "allocate":
        torch.empty(1 << 52)
    elif kind == "sleep":
        for _ in range(360_000):
            time.sleep(0.01)
    elif kind == "hang":  # in native code: no Python signal handler runs
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(3600)
    elif kind == "raise":
        raise RuntimeError("the fault technique was told to raise")
    elif kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind.endswith("_once"):
        mark = Path(os.environ["VITPARETO_FAULT_MARK"])
        if not mark.exists():
            mark.touch()
            fail(kind.removesuffix("_once"))
    elif kind == "hog":
        held = []
        while True:
            held.append(torch.ones(32 << 20, dtype=torch.float32))  # 128 MiB, touched
            time.sleep(0.05)


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Scales the last bias a little, so that something changes, or fails."""
    fail(config.kind)
    with torch.no_grad():
        head = model.get_submodule("head")
        head.bias.add_(float("nan") if config.kind == "nan" else config.level * 1e-3)
    resolved = {"uneven": config.kind == "uneven", "level": config.level}
    return Applied(_rebuild(model, resolved), resolved, ["head.bias"])


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Copies of one model, each measured for itself: what nothing computes with still parts their structures."""
    model.register_buffer("level", torch.zeros(resolved["level"]), persistent=False)
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
    apply=_apply,
    rebuild=_rebuild,
    source="none; for tests",
)


def wait_while(due: Callable[[str], bool]) -> None:
    """Waits while the file that VITPARETO_HOLD names is there with a text that is ``due``; notes this process beside it."""
    file = Path(os.environ["VITPARETO_HOLD"])
    with suppress(FileNotFoundError):
        while due(file.read_text()):
            file.with_suffix(f".{os.getpid()}").touch()
            time.sleep(0.02)


def add_holds() -> None:
    """Makes trainings wait at their first look up where the file says so, and writers of rows from a number of rows on."""
    from orchestrator.ledger import Ledger
    from workers.training import loop

    train, write = loop.train, Ledger.write_attempt

    def held_train(*arguments: Any, tick: Callable[[], None], **more: Any) -> loop.TrainingReport:
        def held_tick() -> None:
            tick()
            wait_while(lambda text: text == "training")

        return train(*arguments, tick=held_tick, **more)

    def held_write(ledger: Ledger, row: Mapping[str, Any]) -> bool:
        created = write(ledger, row)
        wait_while(lambda text: text.isdigit() and ledger.attempts(["attempt_id"]).num_rows >= int(text))
        return created

    loop.train, Ledger.write_attempt = held_train, held_write


if "VITPARETO_HOLD" in os.environ:
    add_holds()
