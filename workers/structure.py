"""What is known of a recipe's artefact before anything is trained: its bytes, weights and multiply-accumulates.

They follow from the structure, so the structure alone is built: every technique of the recipe is applied to a model without values
(:mod:`workers.techniques.foresight`), what it resolved is rebuilt as a reload would, and that is counted and laid out by the code that
counts and writes the real one. Where a technique asks for a value there are two more sources, both as true: what a finished stage of
the same cut has resolved, and, for a cut of trained weights that asks for no image, the baseline's own artefact.
What none of them tells is left out: a number that is here is the one that the trial will have.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from workers import artefact, models, tasks
from workers.artefact.foreseen_size import foreseen_bytes
from workers.measuring import counting
from workers.measuring.made_inputs import make_inputs
from workers.node.storage import Storage
from workers.stages.graph import Stage, compile_recipe, prefix, resolve
from workers.techniques import foresight, registry
from workers.techniques.foresight import NotForeseen
from workers.techniques.quantisation.shared_affine import unquantised
from workers.techniques.record import Surroundings, Technique
from workers.trial import Context, Recipe, Step, digest

MODELS = 64
"""Models that are kept for the steps that may follow them; they have no values, hence cost little."""

log = logging.getLogger("vitpareto")

Records = tuple[dict[str, Any], ...]
"""In recipe order ``{"technique", "version", "resolved"}``, as an artefact's manifest has them."""


@dataclass(frozen=True)
class Built:
    """A structure: the model on the meta device, and what makes it of the context's own. ``name`` is a digest of the latter."""

    model: nn.Module
    records: Records

    @cached_property
    def name(self) -> str:
        return digest(self.records)


class Structures:
    """The structures of the recipes of one context. Not for several threads at once.

    Recipes that begin alike, and configs that resolve to the same, share what was found.

    Args:
        context: of the study's trials.
        storage: where finished stages are looked for; None looks for none.
        load_data: load the data for what manifests say of it, where no baseline is there to tell. Without, a size lacks the few
            hundred bytes of it.
    """

    def __init__(self, context: Context, storage: Storage | None = None, *, load_data: bool = True) -> None:
        self.context, self.storage = context, storage
        self.info = tasks.info(context.data)
        self.description = models.describe(context.model, self.info)
        self._load_data = load_data
        self._followed: dict[str, Records | NotForeseen] = {}
        self._models: OrderedDict[str, Built] = OrderedDict()
        self._cuts: dict[str, Records] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self._sizes: dict[str, int] = {}

    def facts(self, recipe: Recipe, seed: int) -> dict[str, float]:
        """Returns those of :data:`workers.metrics.EXACT` that are known of a recipe under a seed: exactly what its trial will find.

        Raises:
            Exception: the recipe makes no model, or its data cannot be read.
        """
        stages = compile_recipe(recipe, seed, self.context)
        try:
            cut = self._cut(stages, seed)
        except NotForeseen as error:
            log.debug("not known beforehand: %s", error)
            return {}
        params, macs = self._counts(cut)
        found = {"params": float(params), "macs": float(macs)}
        try:
            whole = self._converted(cut, stages[-1], seed)
        except NotForeseen as error:
            log.debug("size not known beforehand: %s", error)
            return found
        return {"size_bytes": float(self._size(whole)), **found}

    def _counts(self, cut: Built) -> tuple[int, int]:
        """Returns weights and multiply-accumulates of a structure before its conversion."""
        if cut.name not in self._counted:
            counted = unquantised(cut.model)
            macs = counting.count_macs(counted, make_inputs(self.info, "cpu", 1))
            self._counted[cut.name] = counting.count_params(counted), macs
        return self._counted[cut.name]

    def _size(self, whole: Built) -> int:
        if whole.name not in self._sizes:
            self._sizes[whole.name] = foreseen_bytes(
                whole.model, model_description=self.description, steps=whole.records, extra=self.extra
            )
        return self._sizes[whole.name]

    @cached_property
    def extra(self) -> Mapping[str, Any]:
        """What the manifest of every artefact of the context says besides its structure."""
        if kept := self._kept(self._baseline.key):
            return dict(kept["extra"])
        return {"preprocessing": tasks.load(self.context.data).preprocessing()} if self._load_data else {}

    @cached_property
    def _baseline(self) -> Stage:
        return compile_recipe(Recipe(), 0, self.context)[0]

    # --- surgery ------------------------------------------------------------------------------------------------------

    def _cut(self, stages: Sequence[Stage], seed: int) -> Built:
        """Returns what the surgery of a recipe leaves, its training included."""
        own = [stage for stage in stages if stage.kind in ("surgery", "recovery")]
        if not own:
            return self._own
        if own[-1].key not in self._cuts:
            self._cuts[own[-1].key] = self._surgery(own, seed).records
        return self._with_model(self._cuts[own[-1].key])

    def _surgery(self, own: Sequence[Stage], seed: int) -> Built:
        steps, trains = own[0].steps, own[-1].kind == "recovery"
        try:
            cut = self._foreseen(self._own, steps, seed)
            return self._trained(cut, steps) if trains else cut
        except NotForeseen:
            if kept := self._kept(own[-1].key):
                return self._with_model(tuple(kept["steps"]))
            cut = self._with_model(self._cut_from_weights(steps, seed))
            return self._trained(cut, steps) if trains else cut

    def _trained(self, cut: Built, steps: Sequence[Step]) -> Built:
        known = resolve(tuple(steps))
        if all(technique.finalise is None for technique, _ in known):
            return cut
        model = self._rebuilt(cut.records)  # the training starts from a reload
        resolved = foresight.finish(model, known, [r["resolved"] for r in cut.records])
        return self._with_model(tuple({**r, "resolved": new} for r, new in zip(cut.records, resolved, strict=True)))

    def _cut_from_weights(self, steps: Sequence[Step], seed: int) -> Records:
        """Does the surgery with the baseline's weights, as its stage will, and without any image.

        Raises:
            NotForeseen: there is no baseline yet, it will be cut on another device, whose sums may differ in the last bit, or an
                image is asked for.
        """
        if self.context.device != "cpu" or self._kept(self._baseline.key) is None:
            raise NotForeseen("weights decide, and the trained ones are not here")
        model, records = self._load_baseline(), tuple[dict[str, Any], ...]()
        for technique, config in resolve(tuple(steps)):
            self._check(technique, config, model)
            around = self._around(torch.device("cpu"), seed, self._load_baseline)
            try:
                applied = technique.apply(model, config, around)
            except Exception as error:
                raise NotForeseen(f"{technique.name}: {type(error).__name__}: {error}") from error
            if not applied.changed:
                raise NotForeseen(f"{technique.name}: changed nothing in this model")
            model = applied.model
            records = (*records, _record(technique, applied.resolved))
        return records

    def _load_baseline(self) -> nn.Module:
        assert self.storage is not None  # _kept has found its manifest there
        return artefact.load(f"{self.storage.url}/{prefix(self._baseline.key)}")

    # --- conversion ---------------------------------------------------------------------------------------------------

    def _converted(self, cut: Built, last: Stage, seed: int) -> Built:
        if last.kind != "conversion":
            return cut
        try:
            return self._foreseen(cut, last.steps, seed)
        except NotForeseen:
            if (kept := self._kept(last.key)) is None:
                raise
            return self._with_model(tuple(kept["steps"]))

    # --- models without values ----------------------------------------------------------------------------------------

    @cached_property
    def _own(self) -> Built:
        """The context's model, uncompressed."""
        return Built(models.skeleton(self.description), ())

    def _skeleton(self) -> nn.Module:
        return copy.deepcopy(self._own.model)

    def _foreseen(self, built: Built, steps: Sequence[Step], seed: int) -> Built:
        for step in steps:
            built = self._after(built, step, seed)
        return built

    def _after(self, built: Built, step: Step, seed: int) -> Built:
        """Returns what a step makes of a structure; found once.

        Raises:
            NotForeseen: it cannot be told, or not be done.
        """
        key = digest([built.name, step.technique, dict(step.config), seed])
        if key not in self._followed:
            self._followed[key] = self._follow(built, step, seed)
        found = self._followed[key]
        if isinstance(found, NotForeseen):
            raise found
        return self._with_model(found)

    def _follow(self, built: Built, step: Step, seed: int) -> Records | NotForeseen:
        ((technique, config),) = resolve((step,))
        around = self._around(torch.device("meta"), seed, self._skeleton)
        try:
            self._check(technique, config, built.model)
            model, resolved = foresight.foresee(technique, copy.deepcopy(built.model), config, around)
        except NotForeseen as error:
            return error.with_traceback(None)
        records = (*built.records, _record(technique, resolved))
        self._with_model(records, model.eval())
        return records

    def _with_model(self, records: Records, model: nn.Module | None = None) -> Built:
        """Returns the structure of these records: kept, as ``model`` is, or made again."""
        name = digest(records)
        if name not in self._models:
            self._models[name] = Built(self._rebuilt(records) if model is None else model, records)
            while len(self._models) > MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(name)
        return self._models[name]

    def _rebuilt(self, records: Records) -> nn.Module:
        """Returns the structure that a reload makes of what was resolved."""
        model, known = self._skeleton(), registry()
        for record in records:
            model = known[record["technique"]].rebuild(model, record["resolved"])
        return model.eval()

    def _check(self, technique: Technique, config: Any, model: nn.Module) -> None:
        info = models.model_info(model, self.context.device)
        reason = technique.check(info, config) if info.family in technique.models else f"not for {info.family}"
        if reason:
            raise NotForeseen(f"{technique.name}: {reason}")

    def _around(self, device: torch.device, seed: int, teacher: Any) -> Surroundings:
        """What a technique may use here: no images, and on the meta device batches of their shapes."""

        def batches() -> Iterator[tuple[Any, torch.Tensor]]:
            if device.type != "meta":
                raise NotForeseen("training images decide")
            classes = torch.zeros(2, dtype=torch.int64, device=device)
            while True:
                yield make_inputs(self.info, device, 2), classes

        return Surroundings(device, seed, torch.Generator().manual_seed(seed), batches, teacher)

    # --- stages that are there ----------------------------------------------------------------------------------------

    def _kept(self, key: str) -> dict[str, Any] | None:
        """Returns the manifest of a stage's artefact, None where there is none, or none that can be read."""
        if self.storage is None:
            return None
        try:
            return artefact.manifest(f"{self.storage.url}/{prefix(key)}")
        except (artefact.ArtefactError, OSError):
            return None


def _record(technique: Technique, resolved: Mapping[str, Any]) -> dict[str, Any]:
    return {"technique": technique.name, "version": technique.version, "resolved": dict(resolved)}
