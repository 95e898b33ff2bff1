"""Images and captions of a source that are held in memory."""

from __future__ import annotations

import numpy as np

from paella.images import center_crop, decode_image
from pipelines.source_contract import Sample
from pipelines.sources import find_units, read_unit


def decode_all(path: str, side: int, max_images: int) -> np.ndarray:
    """The images of `decode_captioned`."""
    return decode_captioned(path, side, max_images)[0]


def decode_captioned(path: str, side: int, max_images: int) -> tuple[np.ndarray, list[str]]:
    """Images as (N,side,side,3) uint8, for training that holds them in memory, and their captions.

    An even selection of a larger set. What tokenizing would reject is left out and counted. Raises ValueError where no image
    can be read.
    """
    units = find_units(path)
    total = sum(unit.num_samples for unit in units)
    num = min(total, max_images)
    wanted = np.arange(num) * total // num
    images: list[np.ndarray] = []
    captions: list[str] = []
    first = 0
    for unit in units:
        rows = (wanted[(wanted >= first) & (wanted < first + unit.num_samples)] - first).tolist()
        first += unit.num_samples
        for sample in read_unit(unit, rows) if rows else ():
            try:
                if isinstance(sample, Sample):
                    images.append(center_crop(decode_image(sample.image), side))
                    captions.append(sample.caption)
            except ValueError:
                continue  # tokenizing says by name and reason what cannot be read
    if not images:
        raise ValueError(f"none of the images in {path} can be read")
    if len(images) < num:
        print(f"{num - len(images)} of {num} images in {path} cannot be used and are left out", flush=True)
    return np.stack(images), captions


def captions(path: str, num: int) -> list[str]:
    """The first `num` captions."""
    found: list[str] = []
    for unit in find_units(path, rows_per_unit=max(1, num)):
        found += [row.caption for row in read_unit(unit) if isinstance(row, Sample)]
        if len(found) >= num:
            break
    return found[:num]
