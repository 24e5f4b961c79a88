"""Batches of images on a device: gathered from an array that may lie on disk, normalised where they are used.

On a GPU the next batches are gathered by threads into pinned memory while it works; a distortion of single images, which
would starve it, runs in processes of its own. On a CPU everything happens when it is asked for. The images are the
same either way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from mmap import mmap
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from workers.inputs import Inputs
from workers.tasks.task_info import TaskInfo

Distort = Callable[[NDArray[Any], Sequence[int], int], NDArray[Any]]
"""((B, H, W, C) uint8, indices of the images, epoch) -> the same shape; a plain value that goes to other processes."""

Batch = tuple[Tensor, Tensor | Inputs, Tensor]
"""Indices (B,) int64 on the CPU; what the model takes; what it should say of it."""

AHEAD = 8
"""Batches that are made ready in advance, and most threads or processes that do it."""


class Reader(Protocol):
    """Reads a split over and over."""

    def epoch(self, *, shuffle_seed: int | None = None, number: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of pass ``number`` from batch ``start`` on."""
        ...

    def close(self) -> None:
        """Ends what it started."""
        ...


class LabelledData(Protocol):
    """What training, calibration and evaluation need of a split of any task.

    Attributes:
        task: see :class:`workers.tasks.TaskInfo`.
        labels: (N,) int64.
    """

    @property
    def task(self) -> str: ...

    @property
    def labels(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, *, shuffle_seed: int | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """Yields all examples once, in the split's order or in one drawn from ``shuffle_seed``."""
        ...

    def loader(self, batch_size: int, *, device: torch.device | str = "cpu") -> Reader:
        """Returns a reader of batches; the last of a pass may be smaller."""
        ...


class TaskData(Protocol):
    """The data of a study: ``search`` is what the search sees, ``report`` (the test set) what it never sees."""

    @property
    def info(self) -> TaskInfo: ...

    @property
    def train(self) -> LabelledData: ...

    @property
    def search(self) -> LabelledData: ...

    @property
    def report(self) -> LabelledData: ...

    def preprocessing(self) -> dict[str, Any]:
        """Returns plain values that a user of the artefact needs to prepare inputs the same way."""
        ...


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        images: (N, H, W, C) uint8, or float32 in the data's own range; may be memory-mapped.
        labels: (N,) int64.
        mean, std: of the training split, one a channel; in units of 0..1 for uint8 images, of the data for float32.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def task(self) -> str:
        """Images with one class each."""
        return "image_classification"

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, *, shuffle_seed: int | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields all images once.

        Args:
            batch_size: the last batch may be smaller.
            shuffle_seed: decides the order; None keeps the split's own.

        Yields:
            indices (B,) int64 on the CPU; images (B, C, H, W) float32 normalised and labels (B,) int64 on ``device``.
        """
        return self.loader(batch_size, device=device).epoch(shuffle_seed=shuffle_seed)

    def loader(self, batch_size: int, *, device: torch.device | str = "cpu", distort: Distort | None = None) -> Loader:
        """Returns a reader of batches; ``distort`` is what happens to the images before they are normalised."""
        return Loader(self, batch_size, device=device, distort=distort)


class Loader:
    """Reads a split over and over. Close it where ``distort`` is given: it may have started processes."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        distort: Distort | None = None,
        threads: int | None = None,
        processes: int | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            distort: what happens to the images before they are normalised.
            threads, processes: that gather, and that distort, ahead of the use; None is none on a CPU, else as many as torch
                has threads, at most :data:`AHEAD`.
        """
        self.split, self.batch_size, self.device, self.distort = split, batch_size, torch.device(device), distort
        self.pinned = self.device.type == "cuda"
        usual = min(AHEAD, max(1, torch.get_num_threads())) if self.pinned else 0
        self.threads = usual if threads is None else threads
        self.processes = usual if processes is None else processes
        self._jobs = _Jobs()
        self._workers: DataLoader[Tensor] | None = None

    def epoch(
        self, *, shuffle_seed: int | None = None, number: int = 0, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields the batches of one pass from batch ``start`` on; see :meth:`Split.batches`.

        Args:
            number: of the epoch, which the distortion depends on.
        """
        count = len(self.split)
        order = np.arange(count) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(count)
        chosen = [order[at : at + self.batch_size] for at in range(start * self.batch_size, count, self.batch_size)]
        for indices, images in zip(chosen, self.images(chosen, number), strict=True):
            labels = torch.from_numpy(self.split.labels[indices]).to(self.device)
            yield torch.from_numpy(indices), images, labels

    def images(self, chosen: list[NDArray[np.int64]], number: int = 0) -> Iterator[Tensor]:
        """Yields the images of each array of rows: (B, C, H, W) float32 on the device, normalised."""
        scale = 255.0 if self.split.images.dtype == np.uint8 else 1.0
        mean = torch.tensor(self.split.mean, device=self.device).view(1, -1, 1, 1) * scale
        factor = 1 / (torch.tensor(self.split.std, device=self.device).view(1, -1, 1, 1) * scale)
        for pixels in self._pixels(chosen, number):
            moved = pixels.to(self.device, non_blocking=True)
            yield moved.permute(0, 3, 1, 2).float().sub(mean).mul_(factor).contiguous()

    def close(self) -> None:
        """Ends the processes."""
        self._workers = None

    def _pixels(self, chosen: list[NDArray[np.int64]], epoch: int) -> Iterator[Tensor]:
        """Yields (B, H, W, C) in the type of the split's images."""
        if self.distort is not None and self.processes:
            return self._from_processes(chosen, epoch, self.distort)
        if self.distort is None and self.threads:
            return self._from_threads(chosen)
        return (self._gather(indices, epoch) for indices in chosen)

    def _gather(self, indices: NDArray[np.int64], epoch: int = 0) -> Tensor:
        dtype = torch.uint8 if self.split.images.dtype == np.uint8 else torch.float32
        out = torch.empty((len(indices), *self.split.images.shape[1:]), dtype=dtype, pin_memory=self.pinned)
        np.take(self.split.images, indices, axis=0, out=out.numpy(), mode="clip")  # clip: straight into out
        return out if self.distort is None else torch.from_numpy(self.distort(out.numpy(), indices.tolist(), epoch))

    def _from_threads(self, chosen: list[NDArray[np.int64]]) -> Iterator[Tensor]:
        waiting: deque[Future[Tensor]] = deque()
        pool = ThreadPoolExecutor(self.threads, "batches")
        try:
            for indices in chosen:
                waiting.append(pool.submit(self._gather, indices))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _from_processes(self, chosen: list[NDArray[np.int64]], epoch: int, distort: Distort) -> Iterator[Tensor]:
        if self._workers is None:
            self._workers = DataLoader(
                _Distorted(self.split.images, distort),
                batch_size=None,
                sampler=self._jobs,
                num_workers=self.processes,
                pin_memory=self.pinned,
                persistent_workers=True,
                multiprocessing_context="spawn",  # a forked child would share the lane's locks and the CUDA context
                generator=torch.Generator(),  # else it draws from torch's own and shifts what dropout draws
            )
        self._jobs.batches = [(epoch, indices) for indices in chosen]
        yield from self._workers


class _Jobs:
    """What the processes are asked for: (epoch, indices), filled anew for every epoch."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, NDArray[np.int64]]] = []

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Distorted(Dataset[Tensor]):
    """Distorted batches, for other processes: goes to them as the name of a mapped file or as shared memory."""

    def __init__(self, images: NDArray[Any], distort: Distort) -> None:
        self.distort = distort
        self.images: Any = images
        self.shared: Tensor | None = None
        self.file: tuple[str, str, int, tuple[int, ...]] | None = None
        whole: Any = images.base
        if isinstance(images, np.memmap) and isinstance(whole, mmap):  # not a slice, whose offset is not its own
            self.file = (str(images.filename), images.dtype.str, int(images.offset), images.shape)
        else:
            self.shared = torch.from_numpy(np.ascontiguousarray(images)).share_memory_()  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "images": None}

    def __getitem__(self, job: tuple[int, NDArray[np.int64]]) -> Tensor:
        epoch, indices = job
        if self.images is None and self.file is not None:
            name, dtype, offset, shape = self.file
            self.images = np.memmap(name, dtype=dtype, mode="r", offset=offset, shape=shape)
        elif self.images is None and self.shared is not None:
            self.images = self.shared.numpy()
        return torch.from_numpy(self.distort(np.take(self.images, indices, axis=0), indices.tolist(), epoch))
