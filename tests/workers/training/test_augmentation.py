"""What training does to images, against loops that are written out; and that the batches do not depend on who reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from workers.tasks.batches import Loader, Split
from workers.training.augmentation import Augmentation, Distortion, shift_and_mirror
from workers.training.settings import TrainingSettings


def augmentation(seed: int = 0, **settings: Any) -> Augmentation:
    needed = {"epochs": 1, "batch_size": 8, "lr": 0.1, "weight_decay": 0.0, "warmup_fraction": 0.0}
    given = TrainingSettings.read({**needed, "optimizer": "sgd", "schedule": "cosine", **settings})
    split = Split(np.zeros((1, 8, 8, 3), dtype=np.uint8), np.zeros(1, dtype=np.int64), (0.5,) * 3, (1.0,) * 3)
    return Augmentation(given, seed, split, num_classes=4)


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 4


def pictures(count: int = 6, side: int = 32, channels: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(2).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def test_images_are_shifted_and_mirrored() -> None:
    """Every result is one of the 9 shifts of an 8 x 8 image by a pixel, mirrored or not, and all of them occur."""
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = shift_and_mirror(image.expand(400, -1, -1, -1), np.random.default_rng(1))
    possible = []
    for flipped in (image[0], image[0].flip(-1)):
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                moved = torch.zeros(3, 8, 8)
                for y in range(8):
                    for x in range(8):
                        if 0 <= y + down < 8 and 0 <= x + right < 8:
                            moved[:, y, x] = flipped[:, y + down, x + right]
                possible.append(moved)
    same = (shown[:, None] == torch.stack(possible)[None]).flatten(2).all(dim=2)
    assert same.any(dim=1).all()
    assert same.any(dim=0).all()


@pytest.mark.parametrize("count", [8, 7, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_targets_are_shares_that_sum_to_one(mixing: dict[str, float], smoothing: float, count: int) -> None:
    images, labels = batch(count)
    _, shares = augmentation(**mixing, label_smoothing=smoothing)(images, labels, 0, 0)
    assert shares.shape == (count, 4)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(count))
    assert float(shares.min()) == pytest.approx(smoothing / 4)
    if count % 2:  # the odd one out is not mixed
        assert float(shares[-1, labels[-1]]) == pytest.approx(1 - smoothing + smoothing / 4)


def test_mixup_by_hand() -> None:
    """x <- lam x + (1 - lam) x of the image at the other end of the batch; targets alike."""
    images, labels = batch()
    original = images.clone()
    mixed, shares = augmentation(mixup=0.8)(images, labels, 0, 3)
    lam = float(shares[0, 0])
    assert 0 < lam < 1
    torch.testing.assert_close(mixed, lam * original + (1 - lam) * original.flip(0))
    hot = torch.nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(shares, lam * hot + (1 - lam) * hot.flip(0))


def test_cutmix_pastes_the_share_that_the_target_says() -> None:
    images, labels = batch()
    original = images.clone()
    mixed, shares = augmentation(cutmix=1.0)(images, labels, 0, 1)
    kept, pasted = mixed == original, mixed == original.flip(0)
    assert (kept | pasted).all()
    assert float(shares[0, 0]) == pytest.approx(float(kept[0].float().mean()))
    assert 0 < float(shares[0, 0]) < 1


def test_draws_depend_on_seed_epoch_and_batch_only() -> None:
    def once(seed: int, epoch: int, number: int) -> Tensor:
        images, labels = batch()
        np.random.seed(np.random.randint(1000))
        return augmentation(seed, augment="flip_crop", mixup=1.0)(images, labels, epoch, number)[0]

    state = np.random.get_state()
    first = once(1, 2, 3)
    assert torch.equal(first, once(1, 2, 3))
    np.random.set_state(state)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first, once(*other))


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_of_an_image_does_not_depend_on_its_batch(channels: int) -> None:
    images = pictures(channels=channels)
    before = images.copy()
    distort = Distortion(7, (0.5,) * channels)
    state = np.random.get_state()[1].copy()
    whole = distort(images, range(6), 2)
    assert np.array_equal(np.random.get_state()[1], state)
    assert np.array_equal(images, before)
    assert whole.shape == images.shape
    assert whole.dtype == np.uint8
    assert np.array_equal(distort(images[4:], [4, 5], 2), whole[4:])
    changed = (whole != images).reshape(6, -1).any(axis=1)
    assert 2 <= changed.sum() <= 6  # each of two operations acts every other time
    assert not np.array_equal(distort(images, range(6), 3), whole)
    assert not np.array_equal(Distortion(8, (0.5,) * channels)(images, range(6), 2), whole)


# --- who reads the batches --------------------------------------------------------------------------------------------


def split(folder: Path | None = None) -> Split:
    images = pictures(50)
    if folder is not None:
        np.save(folder / "images.npy", images)
        images = np.load(folder / "images.npy", mmap_mode="r")
    return Split(images, np.arange(50) % 4, (0.4, 0.5, 0.6), (0.2,) * 3)


def read(loader: Loader, **more: Any) -> list[tuple[Tensor, ...]]:
    found = list(loader.epoch(shuffle_seed=3, **more))
    loader.close()
    return found


def assert_same(one: list[tuple[Tensor, ...]], other: list[tuple[Tensor, ...]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_from_threads_are_those_of_one_thread(tmp_path: Path) -> None:
    whole = read(Loader(split(), 8))
    assert sorted(torch.cat([i for i, _, _ in whole]).tolist()) == list(range(50))
    assert_same(whole, read(Loader(split(tmp_path), 8, threads=3)))
    some = Loader(split(tmp_path), 8, threads=3).epoch(shuffle_seed=3)
    assert torch.equal(next(some)[1], whole[0][1])
    some.close()  # type: ignore[attr-defined]


def test_going_on_in_the_middle_gives_the_rest_of_the_same_batches() -> None:
    distort = Distortion(1, (0.5,) * 3)
    whole = read(Loader(split(), 8, distort=distort), number=4)
    assert_same(whole[5:], read(Loader(split(), 8, distort=distort), number=4, start=5))
    assert read(Loader(split(), 8), start=7) == []


@pytest.mark.parametrize("mapped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_batches_distorted_by_processes_are_those_of_one_process(tmp_path: Path, mapped: bool) -> None:
    source = split(tmp_path if mapped else None)
    distort = Distortion(1, (0.5,) * 3)
    here = [read(Loader(source, 8, distort=distort), number=n) for n in (0, 1)]
    loader = Loader(source, 8, distort=distort, processes=1)
    state = torch.get_rng_state()
    there = [list(loader.epoch(shuffle_seed=3, number=n)) for n in (0, 1)]
    loader.close()
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(here, there, strict=True):
        assert_same(one, other)
