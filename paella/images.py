"""Images in and out: bytes to arrays with limits, crops, contact sheets, PNG files that say how they were made."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded."""


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded. Pillow knows more, and starts another program for one of them (EPS)."""


class ImageError(ValueError):
    """Bytes that are no usable image; `reason` is a short word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB image of encoded bytes: the first frame of an animation; transparency becomes white.

    Raises ImageError with the reason for bytes that are no image, a damaged one, or one above `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise ImageError("too-large", f"{image.width}x{image.height} pixels, more than {max_pixels}")
        if image.mode in ("I", "F"):
            raise ImageError("unsupported-pixels", f"pixels of mode {image.mode}, whose white is not known")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys at 255 rather than scale them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageError("too-large", f"more than {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise ImageError("not-an-image", f"not a readable image: {_beginning(data)}") from error
    except ImageError:
        raise
    except Exception as error:  # Pillow raises TypeError, struct.error and more on damaged files
        raise ImageError("damaged-image", f"not a readable image: {error}") from error


def _beginning(data: bytes) -> str:
    return f"it begins with {data[:16]!r}" if data else "it is empty"


def check_image(image: Tensor, max_pixels: int = MAX_PIXELS) -> None:
    """Raises ValueError unless the image is (3,H,W), finite, not empty and of at most `max_pixels`."""
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"an image has shape {tuple(image.shape)}, but (3, height, width) is needed")
    if image.shape[1] * image.shape[2] > max_pixels:
        raise ValueError(f"an image has {image.shape[2]}x{image.shape[1]} pixels, more than {max_pixels}")
    if not bool(image.isfinite().all()):
        raise ValueError("an image has pixels that are not finite numbers")


def center_crop(image: Image.Image, side: int) -> np.ndarray:
    """Shorter side scaled to `side`, then the central square: (side, side, 3) uint8."""
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC))


def to_tensor(images: np.ndarray) -> Tensor:
    """(B,H,W,3) uint8 → (B,3,H,W) float32 in [0,1]."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float().div_(255)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B,3,H,W) in [0,1] → (B,H,W,3) uint8."""
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_png(path: Path, image: np.ndarray, text: Mapping[str, str]) -> None:
    """Write (H,W,3) uint8 as PNG with text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    Image.fromarray(image).save(path, format="PNG", pnginfo=info)


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8, scale: int = 2) -> Image.Image:
    """Images (H,W,3) uint8 in a grid, each above its caption, wrapped."""
    height, width = (side * scale for side in images[0].shape[:2])
    per_line = max(8, width // 6)
    wrapped = [_wrap(caption, per_line) for caption in captions]
    cell_height = height + 11 * max(1, *(len(lines) for lines in wrapped)) + 10
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 8) + 8, rows * cell_height + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = 8 + index % columns * (width + 8), 8 + index // columns * cell_height
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for line_number, line in enumerate(lines):
            pen.text((x, y + height + 1 + 11 * line_number), line, fill="black")
    return sheet


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, max_lines=5) or [""]
