"""Decoding: the same pixels as Pillow gives, whatever the format; bad bytes are named."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from paella.images import MAX_PIXELS, ImageError
from pipelines.image_decoding import MAX_SCANS, Crop


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with an edge and a little noise: no side is the mirror image of another."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rng = np.random.default_rng(seed)
    pixels = np.stack([x, y, 0.5 + 0.4 * np.sin(9 * x + 5 * y * y)], axis=-1) * 200 + rng.normal(0, 6, (height, width, 3))
    pixels[: height // 3, : width // 4] = (240, 30, 60)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def reference(image: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (64, 64), (40, 50), (70, 500)])
def test_jpegs_below_four_times_the_size_are_what_pillow_makes_of_them(size):
    data = encoded(photo(*size), "JPEG", quality=90)
    decoded = Crop(192, 192).decode(data, "a")
    assert (decoded.width, decoded.height) == size and decoded.pixels.shape == (192, 192, 3)
    assert difference(decoded.pixels, reference(Image.open(io.BytesIO(data)), 192, 192)) < 0.3


def test_large_jpegs_are_scaled_in_the_dct_and_hardly_differ():
    data = encoded(photo(1600, 1300), "JPEG", quality=90)
    ours, theirs = Crop(64, 64).decode(data, "a"), reference(Image.open(io.BytesIO(data)), 64, 64)
    assert (ours.width, ours.height) == (1600, 1300)
    assert 0 < difference(ours.pixels, theirs) < 1.5


def test_rectangles_fill_and_small_images_grow():
    data = encoded(photo(300, 200), "PNG")
    for height, width in ((64, 96), (96, 64), (256, 256)):
        decoded = Crop(height, width).decode(data, "a")
        assert difference(decoded.pixels, reference(photo(300, 200), height, width)) < 1.5


def test_random_crops_belong_to_the_id():
    image = np.arange(40 * 90 * 3, dtype=np.uint8).reshape(40, 90, 3)
    crop = Crop(40, 40, "random")
    taken = {id: crop.take(image, id) for id in map(str, range(60))}
    assert all(np.array_equal(taken[id], crop.take(image, id)) for id in taken)
    lefts = {_left(image, part) for part in taken.values()}
    assert min(lefts) < 8 and max(lefts) > 42 and len(lefts) > 25


def _left(image: np.ndarray, part: np.ndarray) -> int:
    return next(left for left in range(51) if np.array_equal(image[:, left : left + 40], part))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientations_come_upright(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(120, 80), format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = Crop(64, 64).decode(data, "a")
    assert (decoded.width, decoded.height) == upright.size
    assert difference(decoded.pixels, reference(upright, 64, 64)) < 0.5


def grey16() -> Image.Image:
    return Image.fromarray(np.asarray(photo(80, 80).convert("L")).astype(np.uint16) * 257)


ORDINARY = {
    "grey jpeg": lambda: encoded(photo(80, 80).convert("L"), "JPEG", quality=95),
    "cmyk jpeg": lambda: encoded(photo(80, 80).convert("CMYK"), "JPEG", quality=95),
    "progressive jpeg": lambda: encoded(photo(80, 80), "JPEG", quality=95, progressive=True),
    "palette": lambda: encoded(photo(80, 80).quantize(256), "PNG"),
    "16-bit grey": lambda: encoded(grey16(), "PNG"),
    "webp": lambda: encoded(photo(80, 80), "WEBP", lossless=True),
    "1-bit": lambda: encoded(photo(80, 80).convert("1"), "PNG"),
    "animated gif": lambda: encoded(
        photo(80, 80), "GIF", save_all=True, append_images=[Image.new("RGB", (80, 80), "blue")], duration=9
    ),
    "animated webp": lambda: encoded(
        photo(80, 80), "WEBP", save_all=True, append_images=[Image.new("RGB", (80, 80), "blue")], lossless=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ORDINARY)
def test_every_kind_of_pixels_is_read(kind):
    expected = photo(80, 80)
    if kind in ("grey jpeg", "16-bit grey"):
        expected = expected.convert("L")
    elif kind == "1-bit":
        expected = expected.convert("1")
    decoded = Crop(80, 80).decode(ORDINARY[kind](), "a")
    assert difference(decoded.pixels, np.asarray(expected.convert("RGB"))) < 9


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_becomes_white(format):
    image = photo(80, 80).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 80, 40))
    pixels = Crop(80, 80).decode(encoded(image, format, **({"lossless": True} if format == "WEBP" else {})), "a").pixels
    assert (pixels[:40] == 255).all() and pixels[40:].mean() < 200


def zip_bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it is large: a zip bomb's outside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", rows)


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG whose frame header says another size."""
    data = bytearray(encoded(photo(64, 64), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    data = encoded(photo(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (MAX_SCANS + 1) + data[-2:]


JPEG = encoded(photo(200, 150), "JPEG")
BAD = {
    "html": (b"<!doctype html><title>404</title>", "not-an-image"),
    "nothing": (b"", "not-an-image"),
    "a postscript program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not-an-image"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "damaged-image"),
    "truncated png": (encoded(photo(80, 80), "PNG")[:5000], "damaged-image"),
    "jpeg header only": (JPEG[:20], "not-an-image"),
    "100 megapixels": (jpeg_of_size(10_000, 10_000), "too-large"),
    "zip bomb": (zip_bomb(30_000, 30_000), "too-large"),
    "above the limit": (zip_bomb(MAX_PIXELS // 5000 + 1, 5000), "too-large"),
    "thousands of scans": (many_scans(), "too-large"),
    "32-bit pixels": (encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "unsupported-pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_bytes_are_named(kind):
    data, reason = BAD[kind]
    with pytest.raises(ImageError) as error:
        Crop(64, 64).decode(data, "a")
    assert error.value.reason == reason and str(error.value)


def test_harmless_faults_are_forgiven():
    assert Crop(64, 64).decode(JPEG + b"trailing", "a").width == 200
    assert Crop(64, 64).decode(JPEG[:2] + b"\xff\xe1\x00\x10Exif\0\0damaged!" + JPEG[2:], "a").width == 200
