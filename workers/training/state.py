"""Everything that changes while a model is trained: collected as named tensors and plain values, and put back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workers.training.optimisers import WeightAverage


@dataclass
class Best:
    """The best state so far by accuracy on the validation images.

    Attributes:
        correct: images that were right; epoch: from 1; progress: share of the training done by then.
        tensors: of the model, on the CPU.
    """

    correct: float = -1
    epoch: int = 0
    progress: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class TrainingState:
    """Where a training stands.

    Attributes:
        total: steps of the whole training.
        epoch, batch: that come next, from 0; done: steps of the optimiser so far.
        loss_sum: over the ``loss_count`` steps of this epoch: a scalar on the device, so that nothing waits for it.
        loss_mean: of the last complete epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    device: torch.device
    total: int
    best: Best = field(default_factory=Best)
    epoch: int = 0
    batch: int = 0
    done: int = 0
    loss_sum: Tensor = field(init=False)
    loss_count: int = 0
    loss_mean: float = math.nan

    def __post_init__(self) -> None:
        self.loss_sum = torch.zeros((), device=self.device)

    @property
    def progress(self) -> float:
        """Share of the training done, 0 to 1."""
        return self.done / self.total

    def end_epoch(self) -> None:
        """Takes the mean of the losses and goes on to the next epoch."""
        self.loss_mean = float(self.loss_sum) / max(self.loss_count, 1)
        self.loss_sum.zero_()
        self.loss_count = self.batch = 0
        self.epoch += 1

    def keep_as_best(self, correct: float) -> None:
        """Copies the model as it is now. The last step saw the progress before it."""
        kept = {name: t.detach().cpu().clone() for name, t in model_tensors(self.model).items()}
        self.best = Best(correct, self.epoch, (self.done - 1) / self.total, kept)

    def take_best(self) -> None:
        """Gives the model the best weights."""
        _put_back(self.best.tensors, model_tensors(self.model))

    # --- as plain data ------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Returns every tensor as ``<part>/<name>``; the optimiser's as ``optimizer/<parameter>:<what>``."""
        parts = {
            "model": model_tensors(self.model),
            "average": self._means(),
            "best": self.best.tensors,
            "optimizer": _optimizer_tensors(self.model, self.optimizer),
            "random": {"cpu": torch.get_rng_state()},
            "losses": {"sum": self.loss_sum},
        }
        if self.device.type == "cuda":
            parts["random"]["cuda"] = torch.cuda.get_rng_state(self.device)
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def values(self) -> dict[str, Any]:
        """Returns the rest as plain values."""
        return {
            "device": self.device.type,
            "total": self.total,
            "epoch": self.epoch,
            "batch": self.batch,
            "done": self.done,
            "loss_count": self.loss_count,
            "scaler": self.scaler.state_dict(),
            "best": [self.best.correct, self.best.epoch, self.best.progress],
        }

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bool:
        """Goes back to what :meth:`tensors` and :meth:`values` returned.

        Returns:
            False where they are of another model, device or number of steps; nothing is changed then.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        own, best = model_tensors(self.model), parts.get("best", {})
        optimised = {name.rpartition(":")[0] for name in parts.get("optimizer", {})}
        if not (
            (values["device"], values["total"]) == (self.device.type, self.total)
            and _fit(parts.get("model", {}), own)
            and _fit(parts.get("average", {}), self._means())
            and (not best or _fit(best, own))
            and optimised <= set(_parameter_names(self.model, self.optimizer))
        ):
            return False
        _put_back(parts["model"], own)
        _put_back(parts.get("average", {}), self._means())
        _load_optimizer(parts.get("optimizer", {}), self.model, self.optimizer)
        self.scaler.load_state_dict(values["scaler"])
        torch.set_rng_state(parts["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.device)
        correct, epoch, progress = values["best"]
        self.best = Best(correct, epoch, progress, best)
        self.loss_sum.copy_(parts["losses"]["sum"])
        self.loss_count = values["loss_count"]
        self.epoch, self.batch, self.done = values["epoch"], values["batch"], values["done"]
        return True

    def _means(self) -> dict[str, Tensor]:
        return {} if self.average is None else dict(zip(self.average.names, self.average.means, strict=True))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns every parameter and buffer once, the buffers that a state dict leaves out among them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _fit(found: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether names, shapes and types are those of ``tensors``."""
    return found.keys() == tensors.keys() and all(
        found[n].shape == t.shape and found[n].dtype == t.dtype for n, t in tensors.items()
    )


@torch.no_grad()
def _put_back(found: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies values into ``tensors`` in place, so that an optimiser that knows them sees the change."""
    for name, tensor in tensors.items():
        tensor.copy_(found[name])


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Returns a name for each parameter of the optimiser, in its order."""
    named = {id(p): name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [named.get(id(p), f"own.{i}") for i, p in enumerate(parameters)]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimiser's tensors as ``<parameter>:<what>``; what else it holds follows from the settings."""
    names = _parameter_names(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {
        f"{names[i]}:{key}": value for i, of in state.items() for key, value in of.items() if isinstance(value, Tensor)
    }


def _load_optimizer(found: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts back what :func:`_optimizer_tensors` returned.

    Raises:
        KeyError: for a parameter that the optimiser does not have.
    """
    place = {name: i for i, name in enumerate(_parameter_names(model, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in found.items():
        parameter, _, key = name.rpartition(":")
        state.setdefault(place[parameter], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
