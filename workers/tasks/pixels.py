"""Pixels: an encoded image decoded to eight bits, shown upright, in one channel or three, and brought to a size."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import PIL.ImageOps

from workers.tasks.pictures import Content, Images
from workers.tasks.task_info import TaskError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of grey pixels from 0 to 65,535; colours of that depth it brings to eight bits itself."""

GREY = ("1", "L", *SIXTEEN_BITS, "I", "F")
"""Pillow's modes of one channel without transparency."""

_OF_16_BITS = ("PNG", "PPM")
"""Formats whose deepest grey pixels have sixteen bits, also where Pillow holds them in more."""


def decode(content: Content, name: str, channels: int | None) -> Images:
    """Decodes an image to (H, W, C) uint8, upright as its EXIF orientation says; of several frames the first.

    Grey pixels of 16 bits are divided by 257; those of a floating-point image must be from 0 to 1 and are multiplied by 255.
    An array is an image already and keeps its type.

    Args:
        channels: 1 or 3; None takes 1 for grey images and 3 for all others.

    Raises:
        TaskError: it cannot be decoded, or nothing says which of its pixels are white.
    """
    if isinstance(content, np.ndarray):
        return with_channels(content, content.shape[-1] if channels is None else channels)
    try:
        with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
            deep = opened.format in _OF_16_BITS
            image = PIL.ImageOps.exif_transpose(opened)
            image = _eight_bits(image, name, deep) if image.mode in GREY[2:] else image
            grey = channels == 1 or (channels is None and image.mode in GREY)
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (TaskError, MemoryError):
        raise
    except Exception as error:
        raise unreadable(name, error) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def unreadable(name: str, error: Exception) -> TaskError:
    """Returns the error of an image that cannot be decoded."""
    return TaskError(f"{name}: must be a PNG or JPEG image: {error}; replace or remove it")


def _eight_bits(image: PIL.Image.Image, name: str, deep: bool) -> PIL.Image.Image:
    """Returns an image of more than eight bits as one of mode L.

    Args:
        deep: whether 32-bit integers hold pixels of 16 bits.
    """
    pixels = np.asarray(image)
    if image.mode == "F":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):
            raise TaskError(
                f"{name}: floating-point pixels must be from 0 (black) to 1 (white), they are from {low:g} to {high:g}; "
                "scale them, or save them with 8 or 16 bits"
            )
        return PIL.Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    if image.mode == "I" and not (deep and int(pixels.min()) >= 0 and int(pixels.max()) <= 65535):
        raise TaskError(
            f"{name}: pixels must have 8 or 16 bits, these are 32-bit integers from {pixels.min()} to {pixels.max()}, of "
            "which nothing says what is white; save them with 8 or 16 bits"
        )
    return PIL.Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))


def with_channels(image: Images, channels: int) -> Images:
    """Returns (..., channels): one channel repeated, or colours weighted to grey as Pillow does (ITU-R 601-2 luma)."""
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image[..., :1], 3, axis=-1)
    weighted = image[..., :3].astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    grey = np.rint(weighted) if image.dtype == np.uint8 else weighted
    found: Images = grey.astype(image.dtype)[..., None]
    return found


def resize(image: Images, size: int) -> Images:
    """Resizes the shorter side to ``size`` (bilinear) and crops the middle: (H, W, C) to (size, size, C)."""
    height, width, _ = image.shape
    scale = size / min(height, width)
    return _scaled(image, (max(size, round(width * scale)), max(size, round(height * scale))), size)


def squash(image: Images, size: int) -> Images:
    """Resizes both sides to ``size`` (bilinear), whatever the aspect was: (H, W, C) to (size, size, C)."""
    return _scaled(image, (size, size), size)


def _scaled(image: Images, to: tuple[int, int], size: int) -> Images:
    """Resizes to (width, height) and crops the middle."""
    height, width, channels = image.shape
    if height == width == size:
        return image
    left, top = (to[0] - size) // 2, (to[1] - size) // 2

    def one(pixels: PIL.Image.Image) -> Images:
        return np.asarray(pixels.resize(to, PIL.Image.Resampling.BILINEAR).crop((left, top, left + size, top + size)))

    if image.dtype == np.uint8 and channels == 3:
        return one(PIL.Image.fromarray(image))
    return np.stack([one(PIL.Image.fromarray(image[..., c])) for c in range(channels)], axis=-1)
