"""What training does to images: shifted and mirrored, distorted by RandAugment, mixed in pairs.

Distortion acts on single uint8 images before they are batched, the rest on whole batches on the device. Every draw
comes from (seed, epoch, batch or image) and from nothing else, so a training that goes on in the middle sees the same images.

Source: He et al., arXiv 1512.03385, section 4.2 (shift and mirror); Cubuk et al., RandAugment, arXiv 1909.13719, and
Zhang et al., mixup, arXiv 1710.09412, and Yun et al., CutMix, arXiv 1905.04899, all three as timm has them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from workers.inputs import Inputs
from workers.tasks.batches import LabelledData, Split
from workers.training.settings import TrainingSettings

POLICY = "rand-m9-mstd0.5-mmax9-inc1"
"""timm's words for two distortions of strength 9 (deviation 0.5) an image; DeiT's, arXiv 2012.12877, table 9. Strengths
above 9 are cut to 9: at 10 timm asks Pillow for pictures of 0 bits, which Pillow 13 refuses."""

SHIFT = 8
"""Images are shifted by up to 1/8 of their side: 4 pixels of 32."""


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Python's and numpy's global generators, which timm draws from, are afterwards as they were before."""
    plain, legacy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(legacy)


def _seed(*key: int) -> None:
    first, second = np.random.SeedSequence(key).generate_state(2).tolist()
    random.seed(first)
    np.random.seed(second)


def shift_and_mirror(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Crops each image at a random place of itself with a zero border, and mirrors every other one left to right.

    Args:
        images: (B, C, H, W) normalised, so that the border has the mean colour.
    """
    B, C, H, W = images.shape
    border = max(1, H // SHIFT)
    down, right = (torch.from_numpy(generator.integers(0, 2 * border + 1, B)) for _ in range(2))
    mirrored = torch.from_numpy(generator.random(B) < 0.5)
    rows = down[:, None] + torch.arange(H)  # (B, H)
    columns = right[:, None] + torch.arange(W)  # (B, W)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    batch = torch.arange(B, device=images.device)[:, None, None, None]
    channel = torch.arange(C, device=images.device)[None, :, None, None]
    padded = F.pad(images, (border, border, border, border))
    return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Distortion:
    """RandAugment on single images; goes to other processes as plain values.

    Attributes:
        mean: of the images in 0..1, one a channel: the colour of what is moved in from outside.
    """

    seed: int
    mean: tuple[float, ...]

    def __call__(self, pixels: NDArray[np.uint8], indices: Sequence[int], epoch: int) -> NDArray[np.uint8]:
        """Distorts images.

        Args:
            pixels: (B, H, W, C), C 1 or 3. Left alone.
            indices: of the images in their split; what happens to one depends on its index, not on its batch.
        """
        from PIL import Image

        out = np.empty_like(pixels)
        transform = _randaugment(self.mean, pixels.shape[1])
        with _own_randomness():
            for row, (image, index) in enumerate(zip(pixels, indices, strict=True)):
                _seed(self.seed, epoch, int(index))
                distorted = transform(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))
                out[row] = np.asarray(distorted).reshape(image.shape)
        return out


@lru_cache(maxsize=2)
def _randaugment(mean: tuple[float, ...], side: int) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    colour = tuple(min(255, round(255 * m)) for m in mean)
    values = {"translate_const": int(0.45 * side), "img_mean": colour if len(colour) > 1 else colour[0]}
    return rand_augment_transform(POLICY, values)


class Augmentation:
    """What the settings ask for.

    Attributes:
        distortion: of single images before batching, or None.
    """

    def __init__(self, settings: TrainingSettings, seed: int, split: LabelledData, num_classes: int) -> None:
        """Prepares.

        Args:
            split: of training; type and channels of its images are looked at. Others than images stay as they are.

        Raises:
            ValueError: RandAugment for images that are not uint8 of 1 or 3 channels.
        """
        self.settings, self.seed, self.num_classes = settings, seed, num_classes
        self.distortion: Distortion | None = None
        self._mixup: Any = None
        if settings.augment == "randaugment" and isinstance(split, Split):
            images = split.images
            if images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
                raise ValueError(
                    f"augment: randaugment needs uint8 images of 1 or 3 channels, these are {images.dtype} of "
                    f"{images.shape[-1]}; use flip_crop or none"
                )
            self.distortion = Distortion(seed, split.mean)
        if settings.mixup > 0 or settings.cutmix > 0:
            from timm.data.mixup import Mixup

            self._mixup = Mixup(
                settings.mixup,
                settings.cutmix,
                label_smoothing=settings.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(
        self, images: Tensor | Inputs, labels: Tensor, epoch: int, batch: int
    ) -> tuple[Tensor | Inputs, Tensor]:
        """Changes a batch.

        Args:
            images: (B, C, H, W) float32 normalised; may be overwritten. Other inputs stay as they are.
            labels: (B,) int64.

        Returns:
            images, and what the task loss aims at: the labels, or (B, classes) shares where images are mixed.
        """
        if isinstance(images, Inputs):
            return images, labels
        if self.settings.augment != "none":
            images = shift_and_mirror(images, np.random.default_rng((self.seed, epoch, batch)))
        if self._mixup is None:
            return images, labels
        from timm.data.mixup import mixup_target

        paired = len(images) // 2 * 2  # images are mixed two and two; one that is left over stays as it is
        shares = mixup_target(labels, self.num_classes, smoothing=self.settings.label_smoothing)
        if paired:
            with _own_randomness():
                _seed(self.seed, epoch, batch)
                _, shares[:paired] = self._mixup(images[:paired], labels[:paired])
        return images, shares
