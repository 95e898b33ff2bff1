"""Images for VQGAN training: held in memory where they fit, else read, decoded and cropped by Ray Data as they are needed.

Which images a step sees, and how they are cropped, is a pure function of the seed, the step and the batch size: the same on any
number of workers and after a restart (but for what an unreadable image is replaced by).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import ray.data
import torch
from PIL import Image

from paella.images import center_crop, decode_image
from pipelines.source_contract import Sample, Unit
from pipelines.sources import find_units, read_unit

UNIT_ROWS = 256
MIXED_UNITS = 4
"""Units whose images are shuffled together."""
WINDOW_ROWS = 1024
"""Images that one task reads, about."""
SEGMENT_WINDOWS = 256
"""Windows that Ray Data is given at a time."""


@dataclass(frozen=True)
class Crop:
    """How an image becomes a training image of `size` pixels."""

    size: int
    load_size: int
    """Shorter side that an image is scaled to, of which random crops are taken; `size` without augmentation."""
    augment: bool
    """Random crops and horizontal flips, in place of the centre."""

    def load(self, image: Image.Image) -> np.ndarray:
        """(H,W,3) uint8, of which crops are taken."""
        if not self.augment:
            return center_crop(image, self.size)
        scale = self.load_size / min(image.size)
        width, height = (max(self.load_size, round(side * scale)) for side in image.size)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))

    def take(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A training image (size,size,3) of a loaded one."""
        if not self.augment:
            return image
        top, left = (int(rng.integers(side - self.size + 1)) for side in image.shape[:2])
        part = image[top : top + self.size, left : left + self.size]
        return part[:, ::-1] if rng.random() < 0.5 else part


def rng_of(seed: int, number: int) -> np.random.Generator:
    """The random numbers of a training run's image `number`."""
    return np.random.Generator(np.random.Philox(key=[seed, number]))


@dataclass(frozen=True)
class ImageSet:
    """The images of a source, numbered: every `held_back_every`-th is for measuring, the others are for training."""

    units: tuple[Unit, ...]
    crop: Crop
    num_images: int
    held_back_every: int

    @classmethod
    def find(cls, path: str, crop: Crop) -> ImageSet:
        """Raises ValueError where there are no images."""
        units = tuple(find_units(path, UNIT_ROWS))
        num_images = sum(unit.num_samples for unit in units)
        return cls(units, crop, num_images, max(50, num_images // 512))

    @property
    def held_back(self) -> np.ndarray:
        return np.arange(0, self.num_images, self.held_back_every)

    @property
    def training(self) -> np.ndarray:
        everything = np.arange(self.num_images)
        return everything if self.num_images == 1 else np.delete(everything, self.held_back)

    @property
    def num_bytes(self) -> int:
        """Memory that all would take once loaded; photographs are taken for 3:2."""
        return int(self.num_images * self.crop.load_size**2 * 3 * (1.5 if self.crop.augment else 1))

    def read(self, numbers: np.ndarray, load: Callable[[Image.Image], np.ndarray] | None = None) -> dict[int, np.ndarray]:
        """Loaded images by number; what cannot be read is left out: tokenizing says by name and reason what that is."""
        load, images, first = load or self.crop.load, {}, 0
        for unit in self.units:
            rows = np.unique(numbers[(numbers >= first) & (numbers < first + unit.num_samples)]) - first
            for row, sample in zip(rows.tolist(), read_unit(unit, rows.tolist()) if len(rows) else (), strict=True):
                try:
                    if isinstance(sample, Sample):
                        images[first + row] = load(decode_image(sample.image))
                except ValueError:
                    continue
            first += unit.num_samples
        return images

    def read_held_back(self) -> np.ndarray:
        """Central crops (N,size,size,3) of the images held back. Raises ValueError where none can be read."""
        images = self.read(self.held_back, lambda image: center_crop(image, self.crop.size))
        if not images:
            raise ValueError("none of the images held back to measure reconstruction can be read")
        return np.stack(list(images.values()))


class InMemory:
    """Batches drawn from images in memory."""

    def __init__(self, images: Sequence[np.ndarray], crop: Crop, seed: int, batch_size: int) -> None:
        if not images:
            raise ValueError("none of the images can be read")
        self.images, self.crop, self.seed, self.batch_size = images, crop, seed, batch_size

    def batch(self, step: int, part: slice, generator: torch.Generator) -> np.ndarray:
        """`part` of a step's batch, (B,size,size,3) uint8; `generator` is the step's own, and moves on alike on all workers."""
        chosen = torch.randint(len(self.images), (self.batch_size,), generator=generator).tolist()
        first = step * self.batch_size
        places = range(self.batch_size)[part]
        return np.stack([self.crop.take(self.images[chosen[i]], rng_of(self.seed, first + i)) for i in places])

    def pool(self) -> InMemory:
        """Images that a codebook can start from."""
        return self


@dataclass(frozen=True)
class Stream:
    """Batches that Ray Data reads in windows of steps; every worker has a stream of its `part` of each batch."""

    images: ImageSet
    seed: int
    batch_size: int
    part: slice

    def pool(self, num: int = 512) -> InMemory:
        """Images that a codebook can start from: an even selection."""
        training = self.images.training
        some = training[:: max(1, len(training) // num)]
        return InMemory(list(self.images.read(some).values()), self.images.crop, self.seed, self.batch_size)

    def batches(self, start_step: int, steps: int) -> Iterator[np.ndarray]:
        """This worker's part (B,size,size,3) uint8 of the batches of start_step … steps."""
        share = len(range(self.batch_size)[self.part])
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        windows = self._windows(start_step, steps)
        while segment := list(itertools.islice(windows, SEGMENT_WINDOWS)):
            items = ray.data.from_items([{"first": a, "last": b} for a, b in segment], override_num_blocks=len(segment))
            read = items.map_batches(functools.partial(read_window, self), batch_size=1, batch_format="numpy")
            for batch in read.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=2):
                yield batch["image"]

    def _windows(self, start_step: int, steps: int) -> Iterator[tuple[int, int]]:
        """Steps first … last of each window; windows begin at the same steps wherever a run continues."""
        size = max(1, WINDOW_ROWS // self.batch_size)
        for window in range(start_step // size, -(-steps // size)):
            yield max(start_step, window * size), min(steps, (window + 1) * size)

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """The images at places of the endless row of epochs."""
        total = len(self.images.training)
        epochs = {int(epoch): self._order(int(epoch)) for epoch in np.unique(places // total)}
        return np.array([epochs[place // total][place % total] for place in places.tolist()])

    def _order(self, epoch: int) -> np.ndarray:
        """The training images in an epoch's order: units shuffled, then the images of every few units."""
        rng = rng_of(self.seed, 2**62 + epoch)
        ends = np.cumsum([unit.num_samples for unit in self.images.units])
        by_unit = np.split(self.images.training, np.searchsorted(self.images.training, ends[:-1]))
        shuffled = [by_unit[unit] for unit in rng.permutation(len(by_unit))]
        few = [np.concatenate(shuffled[i : i + MIXED_UNITS]) for i in range(0, len(shuffled), MIXED_UNITS)]
        return np.concatenate([rng.permutation(numbers) for numbers in few])


def read_window(stream: Stream, window: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One worker's images of the steps of a window, in order. An image that cannot be read gives way to another of the window."""
    size = stream.batch_size
    places = np.arange(int(window["first"][0]) * size, int(window["last"][0]) * size)
    places = places.reshape(-1, size)[:, stream.part].ravel()
    numbers = stream.numbers(places)
    loaded = stream.images.read(numbers)
    if not loaded:
        raise ValueError(f"none of {len(numbers)} images can be read")
    instead = list(loaded.values())
    images = [loaded.get(int(number), instead[int(number) % len(instead)]) for number in numbers]
    pairs = zip(images, places.tolist(), strict=True)
    return {"image": np.stack([stream.images.crop.take(image, rng_of(stream.seed, place)) for image, place in pairs])}
