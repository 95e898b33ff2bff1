"""What pictures are asked for, in every mode, and how they are made: the same for the HTTP API, batch jobs and the library.

A `PictureRequest` is plain values and checks itself; `plan` decodes its images for one bundle, and a `Plan` makes canvases,
finishes what was decoded of them, and writes files:

    planned = plan(bundle, PictureRequest(prompt="a red circle"))
    tokens = sample(bundle.unet, [planned.canvas(bundle, seed=1)])
    data = planned.file(bundle, bundle.decode(tokens)[0], seed=1)

Bundle, request and seed decide the file, byte for byte.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paella import edits
from paella.bundle import Bundle
from paella.config import require
from paella.pictures import (
    GENERATOR,
    InputError,
    check_size,
    decode_mask,
    decode_rgb,
    encoded,
    fitted,
    fitted_mask,
    output_size,
)
from paella.sampler import MAX_SEED, Canvas, SamplingConfig

MAX_PROMPT = 32_000
MAX_IMAGES = 16
"""That a request brings."""
MAX_N = 10
"""Pictures of one request to the HTTP API."""
QUALITY_STEPS = {"auto": 12, "low": 6, "medium": 12, "standard": 12, "high": 24, "hd": 24, "xhigh": 36, "max": 48}
NEED_CLIP = ("variation", "blend")
WITHOUT_CLIP = ("text-to-image", "inpaint", "outpaint", "interpolate", "structural")
MODES = (*WITHOUT_CLIP, *NEED_CLIP)
PADS = ("pad_left", "pad_right", "pad_top", "pad_bottom")
MODE_FIELDS: dict[str, tuple[str, ...]] = {
    "mask": ("inpaint",),
    **dict.fromkeys(PADS, ("outpaint",)),
    "strength": ("variation",),
    "weights": ("blend",),
    "text_weight": ("blend",),
    "prompt_to": ("interpolate",),
    "frames": ("interpolate",),
    "structure_strength": ("structural",),
}
"""Fields that only some modes have."""


def sampling(num_inference_steps: int = 12, guidance_scale: float = 4.0, temperature: float = 1.0) -> SamplingConfig:
    """The sampler's settings by the HTTP API's names, and its defaults; the temperature falls to 0.3 of it in the last step."""
    return SamplingConfig(
        num_inference_steps=num_inference_steps,
        cfg=(guidance_scale,),
        temperature=(temperature, max(1e-3, 0.3 * temperature)),
    )


def default_mode(images: int, mask: bool) -> str:
    """The mode where none is named: with a mask inpaint, with several images blend, with one structural."""
    return "inpaint" if mask else "blend" if images > 1 else "structural" if images else "text-to-image"


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """What a picture follows from, besides its bundle and seed. Raises InputError, or ValueError for settings of the sampler."""

    mode: str = "text-to-image"
    """One of MODES."""
    prompt: str = ""
    negative_prompt: str | None = None
    """What guidance leads away from."""
    size: str = "auto"
    """WIDTHxHEIGHT in pixels; auto is the source image's size, or the model's."""
    sampling: SamplingConfig = field(default_factory=sampling)
    """Settings of the sampler."""
    images: tuple[bytes | str, ...] = ()
    """Bytes of encoded images; names stand for them until they are read."""
    mask: bytes | str | None = None
    """As large as the image; edited where its alpha is 0."""
    pad_left: int = 0
    """Outpainting: pixels to add."""
    pad_right: int = 0
    pad_top: int = 0
    pad_bottom: int = 0
    strength: float = 1.0
    """Variation: how much the image counts."""
    weights: tuple[float, ...] | None = None
    """Blend: how much each image counts; all the same if not given."""
    text_weight: float = 1.0
    """Blend: how much the prompt counts."""
    prompt_to: str | None = None
    """Interpolation: the prompt of the last frame."""
    frames: int = 5
    """Interpolation: pictures of the row."""
    structure_strength: float = 0.4
    """Structural edit: how much of the image stays."""
    output_format: str = "png"
    """png, jpeg or webp."""
    output_compression: int | None = None
    """Quality of jpeg and webp."""

    def __post_init__(self) -> None:
        _require(self.mode in MODES, "mode", self.mode, ", ".join(MODES))
        for name in ("prompt", "negative_prompt", "prompt_to"):
            text = getattr(self, name) or ""
            _require(len(text) <= MAX_PROMPT, name, f"{text[:20]}…", f"at most {MAX_PROMPT} characters")
            _require(is_text(text), name, text[:20], "text without null characters and lone surrogates")
        sized = re.fullmatch(r"auto|[1-9]\d{1,3}x[1-9]\d{1,3}", self.size)
        _require(bool(sized), "size", self.size, "WIDTHxHEIGHT in pixels, or auto")
        for name in PADS:
            _require(0 <= getattr(self, name) <= 4096, name, getattr(self, name), "0 to 4096")
        _require(0 < self.strength <= 4, "strength", self.strength, "above 0, at most 4")
        _require(all(0 <= weight <= 10 for weight in self.weights or ()), "weights", self.weights, "numbers from 0 to 10")
        _require(0 <= self.text_weight <= 10, "text_weight", self.text_weight, "0 to 10")
        _require(2 <= self.frames <= 16, "frames", self.frames, "2 to 16")
        _require(0 <= self.structure_strength < 1, "structure_strength", self.structure_strength, "0 to below 1")
        _require(self.output_format in ("png", "jpeg", "webp"), "output_format", self.output_format, "png, jpeg or webp")
        quality = self.output_compression
        _require(quality is None or 0 <= quality <= 100, "output_compression", quality, "0 to 100")
        _require(quality is None or self.output_format != "png", "output_compression", quality, "for webp and jpeg only")
        given = {name for name in MODE_FIELDS if getattr(self, name) != getattr(PictureRequest, name)}
        check_inputs(self.mode, self, len(self.images), given)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the picture besides prompt, images and seed, as JSON has it; of the fields that modes have, this one's."""
        fields = [name for name in MODE_FIELDS if self.mode in MODE_FIELDS[name] and name != "mask"]
        values = {name: getattr(self, name) for name in ("mode", "size", "negative_prompt", *fields)}
        return values | _sampler_settings(self.sampling)

    def seeds(self, first: int, number: int) -> list[int]:
        """One of each picture; the frames of an interpolation share theirs, so that the row is smooth."""
        if self.mode == "interpolate":
            return [first] * self.frames
        return [(first + index) % (MAX_SEED + 1) for index in range(number)]


@functools.lru_cache(maxsize=1000)
def _sampler_settings(config: SamplingConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def is_text(text: str) -> bool:
    """Whether there is neither a null character nor a lone surrogate in it."""
    return re.search(r"[\ud800-\udfff\0]", text) is None


def check_inputs(mode: str, request: Any, images: int, given: Collection[str]) -> None:
    """Raises InputError where a mode lacks an input, or is given one that it does not have.

    Args:
        request: has the fields of a PictureRequest that belong to a mode, and the prompts.
        given: names of the fields that were given, those of MODE_FIELDS at least.
    """
    for name, modes in MODE_FIELDS.items():
        if name in given and mode not in modes:
            raise InputError(f"{name} is for the mode {' or '.join(modes)}, not for {mode}", name)
    if mode == "text-to-image":
        if not request.prompt:
            raise InputError("text-to-image needs a prompt", "prompt")
        if images:
            raise InputError(f"text-to-image takes no image, but there are {images}", "image")
    elif mode == "interpolate":
        _check_interpolation(request, images)
    elif mode == "blend" and not 1 <= images <= MAX_IMAGES:
        raise InputError(f"blend needs at least one image, at most {MAX_IMAGES}", "image")
    elif mode != "blend" and images != 1:
        raise InputError(f"{mode} needs one image, but there are {images}", "image")
    if request.weights is not None and len(request.weights) != images:
        raise InputError(f"there are {len(request.weights)} weights for {images} images", "weights")
    if mode == "inpaint" and request.mask is None:
        raise InputError("inpaint needs a mask", "mask")
    if mode == "outpaint" and not any(getattr(request, name) for name in PADS):
        raise InputError("outpaint needs pad_left, pad_right, pad_top or pad_bottom above 0", "pad_left")
    if mode == "outpaint" and request.size != "auto":
        raise InputError("the size of an outpainted picture is the image's and its margins'", "size")


def _check_interpolation(request: Any, images: int) -> None:
    if (images, request.prompt_to is not None) not in ((2, False), (0, True)):
        raise InputError("interpolate needs two images, or prompt and prompt_to", "image")
    if request.prompt_to is not None and not (request.prompt and request.prompt_to):
        raise InputError("interpolate needs prompt and prompt_to", "prompt")
    if request.prompt_to is not None and request.negative_prompt:
        raise InputError("an interpolation of prompts takes no negative prompt", "negative_prompt")


def modes_of(bundle: Bundle) -> list[str]:
    """The modes that a model has."""
    return [*WITHOUT_CLIP] if bundle.text.clip is None else [*MODES]


@dataclass(frozen=True)
class Plan:
    """How one bundle makes the pictures of a request."""

    request: PictureRequest
    size: tuple[int, int]
    """(width, height) of the pictures."""
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    images: list[Tensor]
    """(3,H,W) in [0,1] each, of the size that the mode works at."""
    mask: Tensor | None
    """(H,W) True where the picture is made anew."""

    def canvas(self, bundle: Bundle, *, seed: int, index: int = 0) -> Canvas:
        """The canvas of a picture; of an interpolation the frame `index`."""
        request, images = self.request, self.images
        common: dict[str, Any] = {"seed": seed, "config": request.sampling}
        negative = common | {"negative_prompt": request.negative_prompt}
        if request.mode == "text-to-image":
            return edits.text_to_image(bundle, request.prompt, size=self.size, **negative)
        if request.mode == "inpaint":
            assert self.mask is not None
            return edits.inpaint(bundle, images[0], self.mask, request.prompt, **negative)
        if request.mode == "outpaint":
            return edits.outpaint(bundle, images[0], margins(request), request.prompt, **negative)
        if request.mode == "structural":
            return edits.restyle(bundle, images[0], request.prompt, strength=1 - request.structure_strength, **negative)
        if request.mode == "variation":
            return edits.variation(bundle, images[0], request.prompt, weight=request.strength, size=self.size, **negative)
        if request.mode == "blend":
            weights = request.weights or [1.0] * len(images)
            negative |= {"text_weight": request.text_weight, "size": self.size}
            return edits.blend(bundle, images, weights, request.prompt, **negative)
        share = index / (request.frames - 1)
        if request.prompt_to is not None:
            return edits.interpolate(bundle, request.prompt, request.prompt_to, share, size=self.size, **common)
        return edits.interpolate_images(bundle, images[0], images[1], share, request.prompt, size=self.size, **negative)

    def finished(self, picture: Tensor) -> Tensor:
        """What is shown of a decoded picture (3,H,W): of an inpainted one, the image's own pixels where they are kept."""
        if self.mask is None:
            return picture
        return edits.paste(self.images[0], picture.cpu(), self.mask, feather=min(4, min(self.size) // 16))

    def file(self, bundle: Bundle, picture: Tensor, *, seed: int, index: int = 0) -> bytes:
        """The file of a decoded picture (3,H,W) in [0,1]; a PNG says in text chunks how it was made."""
        request = self.request
        text = self.metadata(bundle.digest, seed, index) if request.output_format == "png" else None
        return encoded(self.finished(picture), request.output_format, request.output_compression, text)

    def metadata(self, digest: str, seed: int, index: int = 0) -> dict[str, str]:
        """What a PNG says of a picture."""
        settings = self.request.settings | {"size": "x".join(map(str, self.size))} | self.digests
        if self.request.mode == "interpolate":
            settings["frame"] = index
        return {
            "prompt": self.request.prompt,
            "seed": str(seed),
            "settings": json.dumps(settings, sort_keys=True),
            "bundle": digest,
            "generator": GENERATOR,
        }

    @functools.cached_property
    def digests(self) -> dict[str, Any]:
        """SHA-256 of the files that went in."""
        named = {"image_sha256": [_sha256(image) for image in self.request.images]} if self.request.images else {}
        return named if self.request.mask is None else named | {"mask_sha256": _sha256(self.request.mask)}


def plan(bundle: Bundle, request: PictureRequest) -> Plan:
    """How the bundle makes a request's pictures. Decodes its images. Raises InputError for what the model cannot do."""
    mode = request.mode
    if bundle.text.clip is None and (mode in NEED_CLIP or (mode == "interpolate" and request.images)):
        raise InputError(f"{mode} of images needs a model with CLIP, which this one has not", "mode", "unsupported_value")
    sources = [decode_rgb(data) for data in request.images if isinstance(data, bytes)]
    if len(sources) != len(request.images) or isinstance(request.mask, str):
        raise InputError("images are bytes here, not names of files", "image")
    of_source = sources[0].size if mode in ("inpaint", "outpaint", "structural") else None
    size = output_size(bundle, request.size, of_source)
    images = [fitted(source, size) for source in sources]
    mask = None if request.mask is None else fitted_mask(decode_mask(request.mask, sources[0].size), size)
    param = "size"
    if mode == "outpaint":
        left, right, top, bottom = margins(request)
        _check_margins(bundle, request)
        size, param = (size[0] + left + right, size[1] + top + bottom), "pad_left" if left or right else "pad_top"
    return Plan(request, size, check_size(bundle, *size, param=param), images, mask)


def margins(request: PictureRequest) -> tuple[int, int, int, int]:
    """Pixels to add on the left, right, top and bottom."""
    return request.pad_left, request.pad_right, request.pad_top, request.pad_bottom


def _check_margins(bundle: Bundle, request: PictureRequest) -> None:
    factor = bundle.config.vqgan.downsampling
    for name in PADS:
        _require(getattr(request, name) % factor == 0, name, getattr(request, name), f"a multiple of {factor}")


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    try:
        require(ok, field, value, allowed)
    except ValueError as error:
        raise InputError(str(error), field) from None


def _sha256(data: bytes | str) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


def warm_up(bundle: Bundle) -> None:
    """Use every network once, so that the first picture does not wait for it."""
    with torch.inference_mode():
        canvas = edits.text_to_image(bundle, "x", seed=0, config=SamplingConfig(num_inference_steps=1))
        bundle.decode(canvas.tokens[None])
