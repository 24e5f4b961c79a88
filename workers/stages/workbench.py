"""What one trial works with: where the artefacts of its stages lie, and how they are loaded, checked and written.

A runner whose lease went to a successor, because it was cut off or stopped, may go on for a while. It writes files of its own
names, and the manifest, which commits them, is created and never replaced: the first of the two stays whole, whichever it is.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from workers import artefact, evaluation, tasks
from workers.artefact import parity
from workers.inputs import Inputs
from workers.node.deadline import Deadline
from workers.node.lane import Lane
from workers.node.lease import Lease, LeaseLost
from workers.node.once import OnceAStudy
from workers.node.storage import Storage, StorageFault
from workers.stages.graph import Stage, compile_recipe, prefix
from workers.tasks.batches import TaskData
from workers.techniques.record import Surroundings
from workers.training.checkpoint import Checkpoints
from workers.trial import Context, Recipe, canonical_json

PROBE = "probe.safetensors"
"""Beside an artefact: logits of a few images, which every later load is checked against."""

log = logging.getLogger("vitpareto")


class DamagedStage(StorageFault):
    """What lies in the storage for a stage is not what was saved. ``key`` names the stage, which can be made again."""

    def __init__(self, key: str, fault: object) -> None:
        self.key = key
        super().__init__(f"stage {key}: {fault}")


def probe_name(tensors: str) -> str:
    """Returns the name of the logits' file beside the tensors' file of that name."""
    return tensors.replace("model", "probe", 1)


@lru_cache(maxsize=2)
def _load_task(data: str) -> TaskData:
    return tasks.load(json.loads(data))


@dataclass
class Workbench:
    """What one trial works with: its storage, device, lane and deadline, where its time went, and the stage that it runs.

    ``until`` is the share of a recovery training after which it pauses, None for its end.
    """

    context: Context
    seed: int
    storage: Storage
    device: torch.device
    lane: Lane
    deadline: Deadline
    seconds: dict[str, float]
    lease: Lease | None = None
    until: float | None = None

    @property
    def task(self) -> TaskData:
        """The data, loaded once a process. Decoding, or waiting for who decodes, is work for the node, not the trial's."""
        with self.deadline.paused():
            return _load_task(canonical_json(dict(self.context.data)))

    def tick(self) -> None:
        """Between chunks of work: honours the deadline, lets a waiting measurement go first, ends what a successor does."""
        self.deadline.check()
        if self.lease is not None and self.lease.lost:
            self.lease.check()
        self.lane.tick()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``seconds[name]``, waiting for the lane excluded."""
        start, waited = time.monotonic(), self.lane.waited_s
        try:
            yield
        finally:
            spent = time.monotonic() - start - (self.lane.waited_s - waited)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def is_done(self, key: str) -> bool:
        """Says whether the artefact of a stage is in the storage."""
        return self.storage.exists(f"{prefix(key)}/{artefact.MANIFEST}")

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[None]:
        """Runs a stage under its lease: a tick that sees a successor ends it, and what is saved bears its generation."""
        self.lease = lease
        try:
            yield
        finally:
            self.lease = None

    def folder(self, key: str) -> str:
        """The path or URL of a stage's artefact."""
        return f"{self.storage.url}/{prefix(key)}"

    def load(self, key: str) -> nn.Module:
        """Loads the artefact of a stage in eval mode on the trial's device.

        Raises:
            DamagedStage: a file is absent, or not what was saved.
        """
        try:
            self._check_notes(key)
            return artefact.load(self.folder(key), device=self.device)
        except artefact.ArtefactDamaged as error:
            raise DamagedStage(key, error) from error

    def _check_notes(self, key: str) -> None:
        """Compares what lies beside an artefact's tensors, manifest and logits, with the digests kept of both."""
        name = self._probe_file(key)
        try:
            kept, manifest = (self.storage.read(n) for n in (name, f"{prefix(key)}/{artefact.MANIFEST}"))
        except FileNotFoundError as error:
            raise DamagedStage(key, f"its manifest or its logits are absent: {error}") from error
        fault = parity.verify(kept, manifest)
        if fault is not None:
            raise DamagedStage(key, fault)

    def _probe_file(self, key: str) -> str:
        tensors = artefact.manifest(self.folder(key))["tensors"].get("file", artefact.TENSORS)
        return f"{prefix(key)}/{probe_name(tensors)}"

    def is_damaged(self, key: str) -> bool:
        """Says whether the artefact of a stage is there and not what was saved."""
        if not self.is_done(key):
            return False
        try:
            self._check_notes(key)
            artefact.verify(self.folder(key))
        except (DamagedStage, artefact.ArtefactDamaged):
            return True
        return False

    def surroundings(self) -> Surroundings:
        """What a technique may use: training images, the teacher, a seeded generator."""

        def batches(count: int, seed: int) -> Iterator[tuple[Tensor | Inputs, Tensor]]:
            for _, inputs, targets in self.task.train.batches(count, shuffle_seed=seed, device=self.device):
                yield inputs, targets

        generator = torch.Generator().manual_seed(self.seed)
        of_study, of_trial = partial(batches, 32, 0), partial(batches, 64, self.seed)
        once = OnceAStudy(self.storage, prefix(self.baseline_key), of_study, self.lane, self.deadline)
        teacher = partial(self.load, self.baseline_key)
        return Surroundings(self.device, self.seed, generator, of_trial, teacher, self.tick, once)

    def checkpoints(self, stage: Stage) -> Checkpoints:
        """The states of a stage's training, which whoever runs the stage again goes on from."""
        return Checkpoints(self.storage, f"{prefix(stage.key)}/training", stage.key)

    @property
    def baseline_key(self) -> str:
        """Stage key of the uncompressed baseline, which is also the teacher."""
        return compile_recipe(Recipe(), self.seed, self.context)[0].key

    # --- the artefact and the check of what it computes ---------------------------------------------------------------

    def _logits(self, model: nn.Module, count: int) -> Tensor:
        """Returns the logits of the first ``count`` search examples in one call: (B, classes) float32 on the CPU."""
        _, inputs, _ = next(self.task.search.batches(count, device=self.device))
        with torch.inference_mode(), self.lane.shared():
            logits: Tensor = model.eval()(inputs)
            return logits.float().cpu()

    def save(self, stage: Stage, model: nn.Module, description: Mapping[str, Any], steps: list[dict[str, Any]]) -> None:
        """Writes the artefact and, before it, the logits that every load of it is checked against.

        Raises:
            LeaseLost: a successor runs the stage, or has finished it.
        """
        if self.lease is None:
            raise RuntimeError(f"stage {stage.key}: only who holds its lease writes it")
        model.eval()
        counts = sorted({min(count, len(self.task.search)) for count in parity.BATCHES})
        logits = [self._logits(model, count) for count in counts]
        tensors = artefact.tensors_name(self.lease.generation)
        files = artefact.pack(
            model,
            model_description=description,
            steps=steps,
            extra={"preprocessing": self.task.preprocessing()},
            tensors=tensors,
        )
        manifest = files.pop(artefact.MANIFEST)
        kept = parity.probe(logits, self.device, manifest)
        self.storage.put_atomic(f"{prefix(stage.key)}/{probe_name(tensors)}", kept)
        artefact.save_to(self.storage, prefix(stage.key), files)
        self._commit(stage, manifest, self.lease)

    def _commit(self, stage: Stage, manifest: bytes, lease: Lease) -> None:
        """Writes the manifest, unless another runner's is there or will be, and removes what earlier runners left."""
        name = f"{prefix(stage.key)}/{artefact.MANIFEST}"
        lease.check()
        if not self.storage.put_if_absent(name, manifest) and self.storage.read(name) != manifest:
            raise LeaseLost(f"{lease.name}: another runner has finished it")
        for start in range(1, lease.generation):
            self.remove_start(stage, start)

    def remove_start(self, stage: Stage, start: int) -> None:
        """Removes the files of a runner that has not committed them; what stays costs space only."""
        tensors = artefact.tensors_name(start)
        try:
            for name in (tensors, probe_name(tensors)):
                self.storage.delete(f"{prefix(stage.key)}/{name}")
        except OSError as error:
            log.warning("stage %s: files of an earlier start stay: %s", stage.key, error)

    def check_parity(self, stage: Stage, model: nn.Module) -> parity.Parity:
        """Compares a reloaded model with the one that was packed.

        Raises:
            ArtefactMismatch: it computes something else.
            NotFiniteOutput: a logit is NaN or infinite.
        """

        def finite(count: int) -> Tensor:
            logits = self._logits(model, count)
            if not torch.isfinite(logits).all():
                raise evaluation.NotFiniteOutput("the model's logits hold NaN or infinity")
            return logits

        kept = self.storage.read(self._probe_file(stage.key))
        try:
            return parity.compare(kept, model, finite, self.device)
        except parity.ArtefactMismatch as error:
            raise parity.ArtefactMismatch(f"artefact {stage.key}: {error}") from None
