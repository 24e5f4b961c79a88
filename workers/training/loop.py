"""Training: the baseline, and the one joint recovery of a recipe in which all of its techniques' losses take part."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers import evaluation
from workers.inputs import Inputs
from workers.node.deadline import DeadlineExceeded
from workers.tasks.batches import LabelledData, Reader, Split
from workers.techniques.record import LossInputs
from workers.training.augmentation import Augmentation
from workers.training.checkpoint import Checkpoints
from workers.training.grad_checkpointing import grad_checkpointing
from workers.training.optimisers import Steps, WeightAverage, make_optimizer, schedule
from workers.training.settings import TrainingSettings, whole_epochs
from workers.training.state import TrainingState

log = logging.getLogger("vitpareto")

CHUNK_S = 0.2
"""Seconds of training between two calls of ``tick``."""

_AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingDiverged(Exception):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainingReport:
    """What a training did.

    Attributes:
        epochs, steps: those that were run, in all processes that took part.
        final_loss: mean total loss of the last epoch.
        seconds: in this process.
        progress: share of the whole training that is done; less than 1 also where it ended for want of patience.
        own_epochs: that this process has run; a part of one after a kill in its middle.
        paused: it is to go on, from the state that was written last.
        best_epoch: the one, from 1, whose weights were kept; None where the last were.
        resumed_at: steps that another process had done already.
    """

    epochs: int
    steps: int
    final_loss: float
    seconds: float
    best_epoch: int | None = None
    resumed_at: int = 0
    progress: float = 1.0
    own_epochs: float = 0.0
    paused: bool = False


def train(
    model: nn.Module,
    split: LabelledData,
    settings: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device | str,
    steps: Steps = (),
    teacher_logits: Tensor | None = None,
    teacher: nn.Module | None = None,
    validation: LabelledData | None = None,
    checkpoints: Checkpoints | None = None,
    tick: Callable[[], None] = lambda: None,
    until: float | None = None,
) -> TrainingReport:
    """Trains ``model`` in place.

    The same seed gives the same weights on a CPU with the same number of threads, also where another process goes on
    after a kill.

    Args:
        model: on ``device``; the split's inputs -> (B, classes), or two such, of class and distillation token, while it trains
            with both. Left in eval mode.
        split: training examples.
        settings: see :class:`workers.training.settings.TrainingSettings`.
        steps: techniques of the recipe with their configs; each may add a loss, parameter groups and a progress hook.
        teacher_logits: (N, classes) float32, row i belongs to image i of ``split``; for images as they are.
        teacher: on ``device``, in eval mode; runs on every batch, which images that are changed need.
        validation: images that decide when to stop; needed with ``patience``.
        checkpoints: where states of this training are kept and looked for.
        tick: called about every :data:`CHUNK_S` seconds, when the device is idle.
        until: share of the training, rounded up to whole epochs, after which it pauses: its state is kept in ``checkpoints``,
            whatever ``checkpoint_s`` says, and ``model`` is left as the training would hand it over if it ended there (the mean
            weights, or with ``patience`` the best ones). A state that is further already is left as it is. None: to the end.

    Raises:
        TrainingDiverged: the loss is not finite.
        DeadlineExceeded: ``tick`` did, with how far the training came; its state is kept in ``checkpoints``.
        ValueError: settings that are unknown or do not go with the arguments.
    """
    found = TrainingSettings.read(settings)
    if teacher_logits is not None and found.changes_images:
        raise ValueError(
            "teacher_logits are of the images as they are, the settings change them: give the teacher itself"
        )
    if split.task != "image_classification" and (found.changes_images or found.label_smoothing):
        raise ValueError(
            f"augment, mixup, cutmix and label_smoothing are for image classification: {split.task} cannot have them, "
            "since a text may speak of what they change"
        )
    if found.patience is not None and validation is None:
        raise ValueError("patience needs validation images")
    if until is not None and checkpoints is None:
        raise ValueError("until needs checkpoints, where the training goes on from")
    run = _Training(model, split, found, seed, torch.device(device), steps, tick)
    run.teacher, run.teacher_logits, run.validation = teacher, teacher_logits, validation
    run.checkpoints = checkpoints
    if until is not None:
        run.last_epoch = whole_epochs(until, found.epochs)
    return run.run()


class _Training:
    """One training under way."""

    teacher: nn.Module | None
    teacher_logits: Tensor | None
    validation: LabelledData | None
    checkpoints: Checkpoints | None

    def __init__(
        self,
        model: nn.Module,
        split: LabelledData,
        settings: TrainingSettings,
        seed: int,
        device: torch.device,
        steps: Steps,
        tick: Callable[[], None],
    ) -> None:
        self.model, self.split, self.settings, self.seed, self.device = model, split, settings, seed, device
        self.steps, self.tick = steps, tick
        self.factor = schedule(settings.schedule, settings.warmup_fraction)
        classes = int(getattr(model, "num_classes", split.labels.max() + 1))
        self.augmentation = Augmentation(settings, seed, split, classes)
        self.state = TrainingState(
            model,
            make_optimizer(model, settings, steps),
            torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16"),
            None if settings.ema_decay is None else WeightAverage(model, settings.ema_decay),
            device,
            total=settings.epochs * math.ceil(len(split) / settings.batch_size),
        )
        self.last_epoch = settings.epochs
        self._looked = time.monotonic()
        self._kept = 0

    def run(self) -> TrainingReport:
        started, state, resumed_at = time.monotonic(), self.state, 0
        loader = self._loader()
        self.model.train()
        try:
            with _seeded(self.seed, self.device), grad_checkpointing(self.model, self.settings.grad_checkpointing):
                resumed_at = self._kept = self._resume()
                while state.epoch < self.last_epoch and not self._out_of_patience():
                    self._run_epoch(loader)
                    self._end_epoch()
                paused = state.epoch < self.settings.epochs and not self._out_of_patience()
                if paused and state.done > resumed_at:
                    self._keep()
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{error}; {self._reached(time.monotonic() - started, resumed_at)}") from None
        except TrainingDiverged:
            if self.checkpoints is not None:
                self.checkpoints.clear()  # going on from there would only diverge again
            raise
        finally:
            loader.close()
            vit: Any = self.model
            if hasattr(vit, "set_distilled_training"):
                vit.set_distilled_training(False)
        self._keep_best_weights()
        self.model.eval()
        best = state.best.epoch if self.settings.patience is not None else None
        return TrainingReport(
            state.epoch,
            state.done,
            state.loss_mean,
            time.monotonic() - started,
            best,
            resumed_at,
            state.progress,
            (state.done - resumed_at) * self.settings.epochs / state.total,
            paused,
        )

    def _loader(self) -> Reader:
        if isinstance(self.split, Split):
            distort = self.augmentation.distortion
            return self.split.loader(self.settings.batch_size, device=self.device, distort=distort)
        return self.split.loader(self.settings.batch_size, device=self.device)

    # --- epochs and steps ---------------------------------------------------------------------------------------------

    def _run_epoch(self, loader: Reader) -> None:
        state = self.state
        shuffle = self.seed * 1_000_003 + state.epoch
        for indices, inputs, labels in loader.epoch(shuffle_seed=shuffle, number=state.epoch, start=state.batch):
            self._on_progress(state.progress)
            for group in state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.factor((state.done + 0.5) / state.total)
            inputs, aims = self.augmentation(inputs, labels, state.epoch, state.batch)
            state.loss_sum += self._gradients(indices, inputs, labels, aims)
            self._step()
            state.done += 1
            state.batch += 1
            state.loss_count += 1
            if state.average is not None:
                state.average.update(state.done)
            if time.monotonic() - self._looked >= CHUNK_S:
                self._look()
            every_s = self.settings.checkpoint_s
            if self.checkpoints is not None and every_s is not None and self.checkpoints.due(every_s):
                self._look()  # a state that has diverged is of no use
                self._keep()

    def _on_progress(self, progress: float) -> None:
        for technique, config in self.steps:
            if technique.on_progress is not None:
                technique.on_progress(self.model, config, progress)

    def _gradients(self, indices: Tensor, inputs: Tensor | Inputs, labels: Tensor, aims: Tensor) -> Tensor:
        """Adds up the gradients of the batch, part by part, and returns its loss: a scalar."""
        self.state.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        parts = (t.tensor_split(self.settings.accumulate) for t in (indices, inputs, labels, aims))
        for part in zip(*parts, strict=True):
            share = len(part[0]) / len(indices)
            if share:
                loss = self._loss(*part) * share
                self.state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        return total

    def _step(self) -> None:
        optimizer, scaler = self.state.optimizer, self.state.scaler
        if self.settings.grad_clip:
            scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.settings.grad_clip)
        scaler.step(optimizer)
        scaler.update()

    def _loss(self, indices: Tensor, inputs: Tensor | Inputs, labels: Tensor, aims: Tensor) -> Tensor:
        """Returns task loss x product of the techniques' task weights + sum of their extra losses: a scalar.

        The task loss of a model that returns the logits of both its tokens is that of the class token. Labels are smoothed
        once: where images are mixed, or here.
        """
        amp = self.settings.amp
        with torch.autocast(self.device.type, dtype=_AMP[amp]) if amp != "none" else nullcontext():
            out = self.model(inputs)
            teacher = self._teacher_logits(indices, inputs)
        logits, distil = (out[0].float(), out[1].float()) if isinstance(out, tuple) else (out.float(), None)
        smoothing = self.settings.label_smoothing if aims.ndim == 1 else 0.0
        loss = task_loss(self.split.task, logits, aims, smoothing)
        seen = LossInputs(self.model, inputs, logits, labels, teacher, self.state.progress, distil, self.teacher)
        terms = [t.loss(seen, config) for t, config in self.steps if t.loss is not None]
        loss = loss * math.prod(term.task_weight for term in terms)
        for term in terms:
            loss = loss + term.extra
        return loss

    def _teacher_logits(self, indices: Tensor, inputs: Tensor | Inputs) -> Tensor | None:
        if self.teacher_logits is not None:
            return self.teacher_logits[indices].to(self.device)
        if self.teacher is None:
            return None
        with torch.no_grad():
            logits: Tensor = self.teacher(inputs)
        return logits.float()

    def _look(self) -> None:
        """Checks the losses and lets others go first; once a chunk, because looking waits for the device."""
        if not math.isfinite(found := float(self.state.loss_sum)):
            raise TrainingDiverged(
                f"the loss must stay finite; it was {found} by step {self.state.done}; "
                "lower the learning rate or set grad_clip"
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        try:
            self.tick()
        except DeadlineExceeded:
            if self.settings.checkpoint_s is not None:
                self._keep()
            raise
        self._looked = time.monotonic()

    def _keep(self) -> None:
        """Writes the state, which is whole between two steps, for who goes on with this training."""
        if self.checkpoints is not None:
            self.checkpoints.write(self.state.tensors(), self.state.values())
            self._kept = self.state.done

    def _reached(self, spent_s: float, resumed_at: int) -> str:
        """Says how far the training came, how long it would have taken, and where the next try begins."""
        state = self.state
        own = state.done - resumed_at
        rest = f", and would take some {spent_s / own * (state.total - state.done):.0f} s more" if own else ""
        again = f"goes on from step {self._kept}" if self._kept else "begins anew"
        return (
            f"the training had done {state.done} of {state.total} steps (epoch {state.epoch + 1} of {self.settings.epochs})"
            f"{rest}; the next try {again}"
        )

    # --- the end of an epoch, and of the training; going on -----------------------------------------------------------

    def _end_epoch(self) -> None:
        self._look()
        self.state.end_epoch()
        if self.validation is None or self.settings.patience is None:
            return
        with self.state.average.in_place() if self.state.average is not None else nullcontext():
            found = evaluation.evaluate(self.model, self.validation, device=self.device, tick=self.tick)
            if found.correct > self.state.best.correct:
                self.state.keep_as_best(found.correct)

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.state.epoch - self.state.best.epoch >= self.settings.patience

    def _keep_best_weights(self) -> None:
        if self.settings.patience is not None:
            self.state.take_best()
            self._on_progress(self.state.best.progress)  # what hooks set outside tensors goes with those weights
        elif self.state.average is not None:
            self.state.average.swap()

    def _resume(self) -> int:
        """Goes on from the newest state that fits; returns the steps done in it."""
        for tensors, values in self.checkpoints.states() if self.checkpoints is not None else ():
            if self.state.restore(tensors, values):
                log.info("going on after step %d of %d", self.state.done, self.state.total)
                return self.state.done
            log.warning("a state of this training is passed over: it is of another model, device or number of steps")
        return 0


def task_loss(task: str, logits: Tensor, aims: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the loss of a task, mean over the batch: a scalar.

    Cross-entropy; in retrieval of the text that belongs to the image among those scored with it. VQA, whose questions have
    several answers of different worth: binary cross-entropy of every answer, summed over answers.

    Source: ViLT, arXiv 2102.03334, section 4.3 and its appendix, for VQA and retrieval.

    Args:
        logits: (B, classes); retrieval: (B, T).
        aims: (B,) int64, or (B, classes) shares.
    """
    if task == "vqa":
        return F.binary_cross_entropy_with_logits(logits, aims.to(logits.dtype)) * logits.shape[1]
    return F.cross_entropy(logits, aims, label_smoothing=smoothing)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws inside (dropout, gates) come from ``seed``; the random state outside is left as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
