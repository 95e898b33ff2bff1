"""Pictures in and out: images of any request within limits, and files with how they were made inside."""

from __future__ import annotations

import base64
import binascii
import io
import math

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from paella.bundle import Bundle
from paella.images import decode_image, to_uint8

MAX_IMAGE_BYTES = 20_000_000
MAX_INPUT_PIXELS = 40_000_000
"""Larger uploads are refused before they are decoded."""
MAX_AREA = 16
"""Pictures of at most this many times the area of the training images."""
DATA_URL = ("data:image/png;base64,", "data:image/jpeg;base64,", "data:image/webp;base64,")
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
GENERATOR = "paella-ray: this picture was made by a model"


class InputError(ValueError):
    """A mistake in a request: what is wrong, with which input, and its code in the HTTP API."""

    def __init__(self, message: str, param: str | None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code

    def __reduce__(self) -> tuple:
        return InputError, (str(self), self.param, self.code)


def image_bytes(data: bytes | str, param: str) -> bytes:
    """The bytes of an upload or data URL. Raises InputError for another URL, another type, or more than 20 MB."""
    if isinstance(data, str):
        if not data.startswith(DATA_URL):
            raise InputError(f"{param} must be a file, or a data URL of a PNG, JPEG or WebP image", param)
        try:
            data = base64.b64decode(data.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{param} is not valid base64", param) from error
    if len(data) > MAX_IMAGE_BYTES:
        raise InputError(f"{param} has more than {MAX_IMAGE_BYTES // 1_000_000} MB", param, "payload_too_large")
    if not data.startswith(SIGNATURES):
        raise InputError(f"{param} must be a PNG, JPEG or WebP image", param)
    return data


def decode_rgb(data: bytes, param: str = "image") -> Image.Image:
    """Raises InputError for what cannot be decoded or has too many pixels."""
    try:
        return decode_image(data, MAX_INPUT_PIXELS)
    except ValueError as error:
        raise InputError(f"{param}: {error}", param) from error


def decode_mask(data: bytes, size: tuple[int, int]) -> Image.Image:
    """A mask, white where the image is to be edited. Raises InputError for another size, no alpha, or nothing to edit."""
    decode_rgb(data, "mask")  # the limits, and whether it can be read at all
    image = Image.open(io.BytesIO(data))
    if not image.has_transparency_data:
        raise InputError("the mask has no alpha channel, which says where to edit", "mask")
    if image.size != size:
        raise InputError(f"the mask has {image.size} pixels, but the image has {size}", "mask")
    alpha = image.convert("RGBA").getchannel("A").point(lambda value: 255 if value == 0 else 0)
    if alpha.getbbox() is None:
        raise InputError("the mask's alpha is 0 nowhere: nothing would change", "mask")
    return alpha


def output_size(bundle: Bundle, size: str, source: tuple[int, int] | None = None) -> tuple[int, int]:
    """(width, height) of a picture: as asked for, or the source's if the model can make it, or the nearest that it can.

    Raises InputError for a size that the model cannot make.
    """
    multiple, (width, height) = bundle.config.size_multiple, bundle.default_size
    most = MAX_AREA * width * height
    if size != "auto":
        width, height = (int(side) for side in size.split("x"))
        check_size(bundle, width, height)
    elif source is not None:
        fits = source[0] * source[1] <= most and not (source[0] % multiple or source[1] % multiple)
        ratio = min(16.0, max(1 / 16, source[0] / source[1])) ** 0.5
        sides = width * ratio, height / ratio
        width, height = source if fits else (max(multiple, multiple * math.floor(side / multiple + 0.5)) for side in sides)
    return width, height


def check_size(bundle: Bundle, width: int, height: int, param: str = "size") -> tuple[int, int]:
    """The token grid (rows, columns). Raises InputError for a size that the model cannot make, or too large a one."""
    most = MAX_AREA * bundle.default_size[0] * bundle.default_size[1]
    if width * height > most:
        raise InputError(f"{width}x{height} has more than {most} pixels", param)
    try:
        return bundle.config.grid(width, height)
    except ValueError as error:
        raise InputError(str(error), param) from error


def fitted(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(3,H,W) in [0,1] of `size` (width, height)."""
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def fitted_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """(H,W) True where to edit; a pixel as soon as a part of it is."""
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(mask).copy()) > 0


def encoded(image: Tensor, kind: str, quality: int | None, text: dict[str, str] | None) -> bytes:
    """A picture (3,H,W) in [0,1] as png, webp or jpeg; a PNG with text chunks, the others say that a model made them."""
    buffer = io.BytesIO()
    picture = Image.fromarray(to_uint8(image[None])[0])
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        for key, value in (text or {}).items():
            info.add_itxt(key, value)
        picture.save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[0x0131] = GENERATOR  # Software
        picture.save(buffer, kind.upper(), quality=90 if quality is None else quality, exif=exif)
    return buffer.getvalue()
