"""The schema of a study: types, ranges and defaults of every key. The user's view of it is search_spaces/README.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from orchestrator.study.constraints import Constraint, parse
from orchestrator.study.data import VISION_LANGUAGE_KEYS, DataSection, Section
from orchestrator.study.early_stopping import EarlyStoppingSection, rungs_of
from orchestrator.study.model import VISION_LANGUAGE, ModelSection
from orchestrator.study.sampler import SamplerSection
from orchestrator.study.scalars import (
    Duration,
    Natural,
    Parameters,
    Positive,
    RecipeStep,
    Seed,
    broken,
    constraint,
    directions,
    distinct,
    empty_for_null,
    size_bytes,
    study_name,
)
from workers.measuring.protocols import PROTOCOLS, SEEDS
from workers.trial import Context, Recipe, Step

if TYPE_CHECKING:
    from workers.model_info import ModelInfo

# --- sections ---------------------------------------------------------------------------------------------------------


class RecoverySettings(Section):
    """How a compressed model is trained; the defaults suit a short joint fine-tune. Meanings: ``TrainingSettings``."""

    epochs: Positive = 5
    batch_size: Positive = 64
    accumulate: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    amp: Literal["none", "bf16", "fp16"] = "none"
    grad_checkpointing: bool = False
    augment: Literal["none", "flip_crop", "randaugment"] = "none"
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    patience: Positive | None = None
    checkpoint_s: Duration | None = 120.0

    @model_validator(mode="before")
    @classmethod
    def _momentum_of_sgd(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("optimizer") == "sgd" and "momentum" not in values:
            return {**values, "momentum": 0.9}
        return values

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.momentum is not None and self.optimizer != "sgd":
            raise broken("momentum is of optimizer sgd", "remove momentum, or optimizer: sgd")
        if self.accumulate > self.batch_size:
            raise broken("accumulate must not exceed batch_size", "a batch has no more parts than images")
        if self.batch_size == 1 and (self.mixup > 0 or self.cutmix > 0):
            raise broken("mixup and cutmix need a batch_size of 2 or more", "images are mixed two and two")
        return self


class BaselineSettings(RecoverySettings):
    """How the baseline is trained where the study trains it."""

    epochs: Positive = 20
    lr: Annotated[float, Field(gt=0)] = 1e-3
    seed: Seed = 0


class TrainingSection(Section):
    baseline: BaselineSettings = BaselineSettings()
    recovery: RecoverySettings = RecoverySettings()


class ResourcesSection(Section):
    """Of one trial."""

    cpus: Positive = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0
    memory: Annotated[int, BeforeValidator(size_bytes), Field(gt=0, le=10**15)] | None = None
    max_concurrent: Positive | None = None


class BudgetSection(Section):
    """Wall time of the study, and of one trial (waiting for the lane does not count); most further measurements of
    frontier members whose place rests on noise (None: the protocol's)."""

    time: Duration | None = None
    trial_timeout: Duration | None = 600.0
    remeasure: Natural | None = None


class MeasurementSection(Section):
    """How speed and memory are measured; what a study leaves out is its protocol's (:mod:`workers.measuring.protocols`)."""

    protocol: Literal["quick", "standard", "thorough"] = "quick"
    window_s: Annotated[float, Field(ge=0)]
    latency_pairs: Annotated[int, Field(ge=3)]
    throughput_pairs: Annotated[int, Field(ge=3)]
    warmup: Natural
    batch_start: Positive
    batch_step: Positive
    batch_max: Positive
    noise_runs: Positive
    threads: Positive = 2
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    compile: bool = False

    @model_validator(mode="before")
    @classmethod
    def _rest_by_protocol(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        named = protocol(values)
        known = {name: value for name, value in PROTOCOLS[named].items() if name in cls.model_fields}
        return {**known, **values}

    @model_validator(mode="after")
    def _start_within_most(self) -> Self:
        if self.batch_max < self.batch_start:
            raise broken(
                "batch_max must not be less than batch_start", f"batch_start {self.batch_start}, max {self.batch_max}"
            )
        return self


def protocol(measurement: object) -> str:
    """Returns the name of the protocol that a measurement section asks for; quick where it names none that is known."""
    name = measurement.get("protocol") if isinstance(measurement, Mapping) else None
    return name if isinstance(name, str) and name in PROTOCOLS else "quick"


# --- the study --------------------------------------------------------------------------------------------------------


class StudyConfig(Section):
    """A study, complete and checked. Make one with :func:`orchestrator.study.load.load_study`.

    Attributes:
        objectives: name to direction, in the study's order.
        techniques: technique to parameter to what is searched: a list of values (one value: fixed), or
            ``{"low", "high", "step"}``. After loading, every parameter of every technique is there.
        recipes: known-good recipes, each a list of one-entry mappings technique -> complete config, in order.
        constraints: normalised texts; :meth:`parsed_constraints` has them parsed.
        early_stopping: None where the study does not say; :attr:`rungs` has what follows.
    """

    name: Annotated[str, AfterValidator(study_name)]
    model: ModelSection
    data: DataSection
    training: TrainingSection = TrainingSection()
    objectives: Annotated[dict[str, Literal["minimize", "maximize"]], BeforeValidator(directions), Field(min_length=1)]
    device: Literal["cpu", "cuda"] = "cpu"
    reference_point: dict[str, float] | None = None
    constraints: list[Annotated[str, AfterValidator(constraint)]] = Field(default_factory=list)
    techniques: Annotated[dict[str, Parameters], Field(min_length=1)]
    max_techniques: Positive = 3
    recipes: list[Annotated[list[RecipeStep], Field(min_length=1)]] = Field(default_factory=list)
    sampler: SamplerSection = SamplerSection()
    early_stopping: EarlyStoppingSection | None = None
    seeds: Annotated[list[Seed], AfterValidator(distinct), Field(min_length=1)]
    resources: ResourcesSection = ResourcesSection()
    trials: Positive = 16
    budget: BudgetSection = BudgetSection()
    retries: Natural = 2
    measurement: Annotated[MeasurementSection, BeforeValidator(empty_for_null)] = Field(
        default_factory=lambda: MeasurementSection.model_validate({})
    )

    @model_validator(mode="before")
    @classmethod
    def _seeds_by_protocol(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "seeds" not in values:
            return {**values, "seeds": list(SEEDS[protocol(values.get("measurement"))])}
        return values

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of the recovery training, whole epochs, at which it is decided who goes on; none where nothing is stopped early."""
        return rungs_of(self.early_stopping, self.training.recovery.epochs)

    @property
    def eta(self) -> float:
        """One in so many of those that reach a rung goes on."""
        return (self.early_stopping or EarlyStoppingSection()).eta

    @property
    def remeasurements(self) -> int:
        """Most further measurements of undecided frontier members."""
        stated = self.budget.remeasure
        return int(PROTOCOLS[self.measurement.protocol]["remeasure"]) if stated is None else stated

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; :meth:`from_dict` reads them back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote, without asking whether files or techniques are still there.

        Raises:
            pydantic.ValidationError: (a ValueError) if the values are no study.
        """
        return cls.model_validate(dict(values))

    def known_good(self) -> tuple[Recipe, ...]:
        """Returns the recipes that are enqueued first."""
        return tuple(Recipe(tuple(Step(*pair) for step in steps for pair in step.items())) for steps in self.recipes)

    def parsed_constraints(self) -> tuple[Constraint, ...]:
        """Returns the constraints, ready to judge metrics."""
        return tuple(map(parse, self.constraints))

    def context(self) -> Context:
        """Returns everything besides recipe and seed that changes a trial's numbers. Reads the data and checkpoint.

        Of a file it holds path and digest, and the digest alone is part of a trial's id.

        Raises:
            OSError, ValueError: the data or the checkpoint cannot be read.
        """
        from workers import tasks  # these import torch
        from workers.models import checkpoint_digest
        from workers.models.sources import head_rows
        from workers.tasks import data_digest
        from workers.tasks.answers import vocabulary_digest
        from workers.tasks.tokenisers import folder_fingerprint

        unused = set() if self.model.family in VISION_LANGUAGE else set(VISION_LANGUAGE_KEYS)
        data = self.data.model_dump(mode="json", exclude=unused | self.data.unsaid())
        if isinstance(answers := data.get("answers"), str):
            data["answers"] = {"path": answers, "digest": vocabulary_digest(Path(answers))}
        if (tokenizer := data.get("tokenizer")) is not None and (found := folder_fingerprint(tokenizer)):
            data["tokenizer"] = {"path": tokenizer, "digest": found}
        data["digest"] = data_digest(data)
        model, origin = self.model.resolved()
        checkpoint = model["checkpoint"]
        model["checkpoint_digest"] = checkpoint_digest(checkpoint) if checkpoint is not None else None
        if origin.labels and (rows := head_rows(origin.labels, tasks.info(data).class_names)):
            model["head_rows"] = rows
        return Context(
            model=model,
            data=data,
            training=self.training.model_dump(mode="json"),
            measurement=self.measurement.model_dump(mode="json"),
            device=self.device,
        )


def model_info(context: Context) -> ModelInfo:
    """Returns the facts about a context's uncompressed model by which techniques are judged. Loads no weights."""
    from workers import models, tasks  # these import torch

    model = models.build(
        {**context.model, "pretrained": False, "checkpoint": None}, tasks.info(context.data), device="meta"
    )
    return models.model_info(model, context.device)
