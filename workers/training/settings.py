"""Settings of one training as a worker reads them; standard library only.

Defaults of a study are those of its schema, which names every key. A key that is left out here is off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("one_cycle", "cosine"),
    "amp": ("none", "bf16", "fp16"),
    "augment": ("none", "flip_crop", "randaugment"),
}
"""Settings that are one of several words."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained.

    Attributes:
        batch_size: images of one step of the optimiser.
        accumulate: parts that a batch is worked through in, gradients added up: less memory, the same step.
        lr: peak of the schedule; ``warmup_fraction`` of all steps lead to it.
        momentum: of ``sgd`` (Nesterov); None and 0 are without.
        amp: type of the autocast; ``fp16`` scales the loss.
        augment: ``flip_crop`` mirrors and shifts, ``randaugment`` does so after distorting shape and colour.
        mixup, cutmix: alpha of their beta distributions; with both, each batch has one of the two.
        ema_decay: of the running mean of the weights, which is then what is evaluated and shipped.
        patience: epochs without a better accuracy on the validation images after which the training ends; the best
            weights are kept. None trains to the end and keeps the last.
        checkpoint_s: seconds between two states on disk; None for none.
        seed: of the weights and the order, where the study trains its baseline.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup_fraction: float
    optimizer: str
    schedule: str
    momentum: float | None = None
    label_smoothing: float = 0.0
    grad_clip: float | None = None
    amp: str = "none"
    accumulate: int = 1
    grad_checkpointing: bool = False
    augment: str = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    patience: int | None = None
    checkpoint_s: float | None = None
    seed: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Reads the training section of a context.

        Raises:
            ValueError: an unknown or missing key, an unknown word, or more parts than images in a batch.
        """
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {f.name for f in fields})
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if unknown or missing:
            raise ValueError(
                f"training settings: unknown {unknown}, missing {missing}; see workers/training/settings.py"
            )
        found = cls(**values)
        for name, words in OPTIONS.items():
            if getattr(found, name) not in words:
                raise ValueError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {getattr(found, name)!r}")
        if not 1 <= found.accumulate <= found.batch_size:
            raise ValueError(f"accumulate must be from 1 to batch_size ({found.batch_size}), got {found.accumulate}")
        return found

    @property
    def changes_images(self) -> bool:
        """Whether the model sees other images than those of the data, so that nothing can be calculated beforehand."""
        return self.augment != "none" or self.mixup > 0 or self.cutmix > 0


def whole_epochs(share: float, epochs: int) -> int:
    """Returns a share of a training in whole epochs, rounded up; what rounding of floating point adds is not counted."""
    return max(1, math.ceil(round(share * epochs, 6)))
