"""The model section of a study; the other sections: :mod:`orchestrator.study.schema`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from orchestrator.study.data import Section
from orchestrator.study.scalars import Natural, Positive, broken

if TYPE_CHECKING:
    from workers.models.sources import Origin

VISION_LANGUAGE = ("vilt", "meter")
"""Families of models that see images with texts."""


class CreateSection(Section):
    """A ViT to build and train: ``width`` is the embedding size, ``patch`` in pixels, ``registers`` more prefixes."""

    width: Positive = 64
    depth: Positive = 4
    heads: Positive = 4
    patch: Positive = 2
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    registers: Natural = 0
    pos_embed_std: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise broken("width must be a multiple of heads", f"width {self.width}, heads {self.heads}")
        return self

    def timm_arguments(self) -> dict[str, Any]:
        """Returns the arguments of timm's VisionTransformer; ``pos_embed_std`` is our own and left out where unset."""
        arguments: dict[str, Any] = {
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "patch_size": self.patch,
            "mlp_ratio": self.mlp_ratio,
            "reg_tokens": self.registers,
        }
        return arguments if self.pos_embed_std is None else arguments | {"pos_embed_std": self.pos_embed_std}


class ModelSection(Section):
    """Which model: a timm name, or ``create``; of a vision-language family a name, settings that differ from its, or both;
    of ``hf_vit`` a folder of transformers', which says the rest.

    The settings of those families are those of a class that is expensive to import: :mod:`orchestrator.study.tasks` judges them.
    """

    family: Literal["timm", "vilt", "meter", "hf_vit"] = "timm"
    name: str | None = None
    create: CreateSection | dict[str, Any] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    checkpoint_key: Annotated[str, Field(min_length=1)] | None = None
    key_map: dict[str, str | None] = Field(default_factory=dict)
    train: bool = True

    @model_validator(mode="before")
    @classmethod
    def _train_what_has_no_weights(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "train" not in values:
            return {**values, "train": not (values.get("pretrained") or values.get("checkpoint"))}
        return values

    @field_validator("create", mode="before")
    @classmethod
    def _by_family(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Mapping):
            return value if info.data.get("family") in VISION_LANGUAGE else CreateSection.model_validate(value)
        if value is None or isinstance(value, CreateSection):
            return value
        raise broken("must be a mapping of settings", "for example {depth: 4}")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.family in VISION_LANGUAGE:
            if self.name is None and self.create is None:
                raise broken("must have a name, create, or both", f"name: {self.family}_tiny")
            if self.options:
                raise broken("options are arguments of timm's", "use create")
        elif self.family == "hf_vit":
            if self.checkpoint is None or self.name is not None or self.create is not None:
                raise broken(
                    "must have a checkpoint, and neither name nor create", "checkpoint: a folder with config.json"
                )
        else:
            if (self.name is None) == (self.create is None):
                raise broken(
                    "must have either name or create", "name: vit_tiny_patch16_224, or create: {width: 64, depth: 4}"
                )
            if self.create is not None and self.pretrained:
                raise broken("pretrained needs a timm name", "use name instead of create")
            said = self.create.timm_arguments() if isinstance(self.create, CreateSection) else {}
            if twice := [key for key in self.options if key in said]:
                raise broken(f"{twice[0]} must be said in create alone", f"remove options.{twice[0]}")
        if self.key_map and self.family != "timm":
            raise broken("key_map is for weights of a timm model", "remove it")
        if self.checkpoint is None and (self.key_map or self.checkpoint_key):
            raise broken("key_map and checkpoint_key need a checkpoint", "checkpoint: their.pth")
        if self.pretrained and self.checkpoint is not None:
            raise broken("must not have both pretrained and checkpoint", "remove one of them")
        if not (self.train or self.pretrained or self.checkpoint is not None):
            raise broken("must be trained, pretrained or loaded from a checkpoint", "remove `train: false`")
        return self

    def settings(self) -> dict[str, Any]:
        """Returns what a worker builds the model with, besides its name."""
        if isinstance(self.create, CreateSection):
            return self.create.timm_arguments() | self.options
        return dict(self.options if self.create is None else self.create)

    def resolved(self) -> tuple[dict[str, Any], Origin]:
        """Returns the section that a worker builds from, and what a folder says of its model besides. Reads that folder.

        Raises:
            ModelError: it is not there or holds another kind of model.
        """
        from workers.models import sources  # which imports torch

        return sources.resolve(
            {
                "family": self.family,
                "name": self.name,
                "pretrained": self.pretrained,
                "checkpoint": self.checkpoint,
                "create": self.settings(),
                "train": self.train,
                **({"checkpoint_key": self.checkpoint_key} if self.checkpoint_key else {}),
                **({"key_map": self.key_map} if self.key_map else {}),
            }
        )
