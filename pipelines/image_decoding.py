"""Encoded images to crops of one size: what a token dataset is made of.

JPEGs are decoded by libjpeg-turbo (simplejpeg), large ones at a half, a quarter or an eighth of their size where that is still
twice what is needed; everything else by Pillow. Both are cropped and scaled by the same antialiased bicubic filter, in PyTorch's
kernels for 8-bit images, which differs from Pillow's bicubic by rounding only. The choice is fixed: the same bytes give the same
pixels, and so the same tokens, wherever they are decoded.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from paella.images import MAX_PIXELS, ImageError, decode_image

DECODER = "libjpeg-turbo accurate, DCT-scaled to at least 2x; antialiased bicubic"
"""Says in a dataset how its pixels were made."""
MAX_SCANS = 100
"""A progressive JPEG has about ten; one of thousands is small and takes minutes."""
UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}
"""What EXIF's orientations ask for."""


@dataclass(frozen=True)
class Decoded:
    """A crop (H,W,3) uint8, the sides that the image had, upright, and all of it, as large as it was decoded."""

    pixels: np.ndarray
    width: int
    height: int
    whole: np.ndarray


@dataclass(frozen=True)
class Crop:
    """How images become crops: scaled until both sides reach the crop's, then cut at the centre or at a place of the id's."""

    height: int
    width: int
    place: Literal["center", "random"] = "center"

    def decode(self, data: bytes, id: str) -> Decoded:
        """Raises ImageError for what is no image, damaged or too large: both known from the header before anything is decoded."""
        array, (width, height) = _decode_jpeg(data, self) if data[:2] == b"\xff\xd8" else _decode_other(data)
        return Decoded(self.take(array, id), width, height, array)

    def take(self, image: np.ndarray, id: str) -> np.ndarray:
        """The crop of an image (h,w,3) uint8."""
        height, width = image.shape[:2]
        scale = min(height / self.height, width / self.width)
        rows, columns = min(height, round(self.height * scale)), min(width, round(self.width * scale))
        down, across = (0.5, 0.5) if self.place == "center" else _place(id)
        top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
        return _scaled(image[top : top + rows, left : left + columns], self.height, self.width)


def _place(id: str) -> tuple[float, float]:
    """Two numbers in [0,1) that belong to an id."""
    digest = hashlib.sha256(id.encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:8]) / 2**32


def _scaled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    forward = image if min(image.strides) > 0 else np.ascontiguousarray(image)  # PyTorch has no mirrored views
    channels_last = torch.from_numpy(forward).permute(2, 0, 1)[None]
    scaled = F.interpolate(channels_last, size=(height, width), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def _decode_jpeg(data: bytes, crop: Crop) -> tuple[np.ndarray, tuple[int, int]]:
    """libjpeg-turbo, or Pillow where that has something to say: it tells harmless from damaged, and reads CMYK."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # a KeyError for a header that ends before it says how colours are sampled
        return _decode_other(data)
    if height * width > MAX_PIXELS:
        raise ImageError("too-large", f"{width}x{height} pixels, more than {MAX_PIXELS}")
    if _num_scans(data) > MAX_SCANS:
        raise ImageError("too-large", f"a progressive JPEG of more than {MAX_SCANS} scans")
    if space in ("CMYK", "YCCK"):
        return _decode_other(data)
    factor = next((f for f in (8, 4, 2) if min(height // crop.height, width // crop.width) >= 2 * f), 1)
    try:
        array = simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor))
    except ValueError:
        return _decode_other(data)
    orientation = _orientation(data)
    if orientation not in UPRIGHT:
        return array, (width, height)
    return UPRIGHT[orientation](array), (width, height) if orientation < 5 else (height, width)


def _decode_other(data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata is common, and one line per image is noise
        image = decode_image(data)
    return np.array(image), image.size


def _num_scans(data: bytes) -> int:
    """How often the marker of a scan occurs; bytes.count takes a twentieth of the time of decoding for it."""
    pairs = (np.frombuffer(data, "<u2", (len(data) - first) // 2, first) for first in (0, 1))
    return sum(int(np.count_nonzero(pair == 0xDAFF)) for pair in pairs)


def _orientation(data: bytes) -> int:
    """EXIF's orientation of a JPEG; 1 where it says nothing."""
    if data.find(b"Exif\0\0", 0, 1 << 17) < 0:  # most have none, and opening one takes a while
        return 1
    try:
        return int(Image.open(io.BytesIO(data), formats=["JPEG"]).getexif().get(0x0112, 1))
    except Exception:  # Pillow raises what it likes for damaged EXIF, and an image is none the worse for it
        return 1
