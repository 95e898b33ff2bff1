"""From a request to the engine's tasks: one for each image, made by `paella.edits`."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paella import edits
from paella.bundle import Bundle
from paella.sampler import MAX_SEED, Canvas, SamplingConfig
from serve.engine import Task
from serve.pictures import check_size, decode_mask, decode_rgb, encoded, fitted, fitted_mask, output_size
from serve.schemas import ApiError, EditRequest, GenerationRequest

NEED_CLIP = ("variation", "blend")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A checked request on its way to an engine: bytes of images in place of files, a seed, an end of the time for it."""

    request: GenerationRequest | EditRequest
    seed: int
    request_id: str
    timeout_s: float
    trace: dict[str, str]
    """Trace context, as headers."""

    @property
    def mode(self) -> str:
        return self.request.resolved_mode if isinstance(self.request, EditRequest) else self.request.mode

    @property
    def num_images(self) -> int:
        return self.request.num_images if isinstance(self.request, EditRequest) else self.request.n

    @property
    def seeds(self) -> list[int]:
        """One of each image; the frames of an interpolation share theirs, so that the row is smooth."""
        if self.mode == "interpolate":
            return [self.seed] * self.num_images
        return [(self.seed + index) % (MAX_SEED + 1) for index in range(self.num_images)]


@dataclass(frozen=True)
class Plan:
    """What an engine is to do for an order."""

    tasks: list[Task]
    size: tuple[int, int]
    """(width, height) of the pictures."""
    tokens: int
    """Latent tokens of all pictures."""
    warnings: list[str]


def modes_of(bundle: Bundle) -> list[str]:
    """The modes that a model has."""
    without = ["text-to-image", "inpaint", "outpaint", "interpolate", "structural"]
    return without if bundle.text.clip is None else [*without, *NEED_CLIP]


def plan(bundle: Bundle, order: Order) -> Plan:
    """The tasks of an order. Decodes its images, so it belongs on a thread. Raises ApiError for what the model cannot do."""
    request, mode = order.request, order.mode
    needs_clip = mode in NEED_CLIP or (mode == "interpolate" and isinstance(request, EditRequest) and bool(request.image))
    if needs_clip and bundle.text.clip is None:
        raise ApiError(400, "unsupported_value", f"{mode} of images needs a model with CLIP, which this one has not", "mode")
    make, finish_image, size = _maker(bundle, order)
    rows, columns = check_size(bundle, *size)
    deadline = time.monotonic() + order.timeout_s
    tasks = [
        Task(
            make=functools.partial(make, index=index, seed=seed),
            finish=_finisher(bundle, order, seed, finish_image),
            steps=request.steps,
            tokens=rows * columns,
            deadline=deadline,
            num_previews=request.partial_images,
            label=f"{order.request_id}/{index}",
            mode=mode,
        )
        for index, seed in enumerate(order.seeds)
    ]
    return Plan(tasks, size, rows * columns * len(tasks), _warnings(bundle, order))


Make = Callable[..., Canvas]  # (bundle, index=, seed=)


def _maker(bundle: Bundle, order: Order) -> tuple[Make, Callable[[Tensor], Tensor], tuple[int, int]]:
    """How image i is made, what is done to the decoded picture, and its size."""
    request, mode = order.request, order.mode
    settings: dict[str, Any] = {"config": sampling(request)}
    negative: dict[str, Any] = {"negative_prompt": request.negative_prompt}
    as_it_is: Callable[[Tensor], Tensor] = lambda picture: picture  # noqa: E731
    prompt = request.prompt
    if not isinstance(request, EditRequest):
        size = output_size(bundle, request.size)
        return (
            lambda bundle, index, seed: edits.text_to_image(bundle, prompt, seed=seed, size=size, **negative, **settings),
            as_it_is,
            size,
        )
    sources = [decode_rgb(data) for data in request.image if isinstance(data, bytes)]
    of_source = sources[0].size if mode in ("inpaint", "outpaint", "structural") else None
    size = output_size(bundle, request.size, of_source)
    images = [fitted(source, size) for source in sources]
    if mode == "inpaint":
        assert isinstance(request.mask, bytes)
        mask = fitted_mask(decode_mask(request.mask, sources[0].size), size)
        return (
            lambda bundle, index, seed: edits.inpaint(bundle, images[0], mask, prompt, seed=seed, **negative, **settings),
            lambda picture: edits.paste(images[0], picture.cpu(), mask, feather=min(4, min(size) // 16)),
            size,
        )
    if mode == "outpaint":
        return _outpaint(bundle, request, images[0], negative | settings)
    if mode == "structural":
        noise = 1 - request.structure_strength
        return (
            lambda bundle, index, seed: edits.restyle(
                bundle, images[0], prompt, strength=noise, seed=seed, **negative, **settings
            ),
            as_it_is,
            size,
        )
    settings |= {"size": size}
    if mode == "variation":
        weight = request.strength
        return (
            lambda bundle, index, seed: edits.variation(
                bundle, images[0], prompt, weight=weight, seed=seed, **negative, **settings
            ),
            as_it_is,
            size,
        )
    if mode == "blend":
        weights = request.weights or [1.0] * len(images)
        settings |= {"text_weight": request.text_weight}
        return (
            lambda bundle, index, seed: edits.blend(bundle, images, weights, prompt, seed=seed, **negative, **settings),
            as_it_is,
            size,
        )
    last, to = request.frames - 1, request.prompt_to
    if to is not None:
        return (
            lambda bundle, index, seed: edits.interpolate(bundle, prompt, to, index / last, seed=seed, **settings),
            as_it_is,
            size,
        )
    return (
        lambda bundle, index, seed: edits.interpolate_images(
            bundle, images[0], images[1], index / last, prompt, seed=seed, **negative, **settings
        ),
        as_it_is,
        size,
    )


def _outpaint(bundle: Bundle, request: EditRequest, image: Tensor, settings: dict[str, Any]):
    margins = (request.pad_left, request.pad_right, request.pad_top, request.pad_bottom)
    factor = bundle.config.vqgan.downsampling
    for name, margin in zip(("pad_left", "pad_right", "pad_top", "pad_bottom"), margins, strict=True):
        if margin % factor:
            raise ApiError(400, "invalid_value", f"{name}={margin} is not allowed: a multiple of {factor}", name)
    left, right, top, bottom = margins
    size = image.shape[2] + left + right, image.shape[1] + top + bottom
    check_size(bundle, *size, param="pad_left" if left or right else "pad_top")
    return (
        lambda bundle, index, seed: edits.outpaint(bundle, image, margins, request.prompt, seed=seed, **settings),
        lambda picture: picture,
        size,
    )


def sampling(request: GenerationRequest | EditRequest) -> SamplingConfig:
    """The sampler's settings of a request."""
    return SamplingConfig(
        num_inference_steps=request.steps,
        cfg=(request.guidance_scale,),
        temperature=(request.temperature, max(1e-3, 0.3 * request.temperature)),
    )


def _finisher(
    bundle: Bundle, order: Order, seed: int, finish: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, int | None], bytes]:
    request = order.request
    hidden = {"image", "mask", "prompt", "seed", "model", "n", "stream", "partial_images", "progress", "user", "timeout_ms"}
    settings = {
        "mode": order.mode,
        "num_inference_steps": request.steps,
        **request.model_dump(exclude=hidden, exclude_unset=True),
    }
    text = {
        "prompt": request.prompt,
        "seed": str(seed),
        "settings": json.dumps(settings, sort_keys=True),
        "bundle": bundle.digest,
        "generator": "paella-ray: this picture was made by a model",
    }

    def bytes_of(picture: Tensor, preview: int | None) -> bytes:
        return encoded(finish(picture), request.output_format, request.output_compression, text if preview is None else None)

    return bytes_of


def _warnings(bundle: Bundle, order: Order) -> list[str]:
    """What a text encoder does not see of the prompts."""
    prompts = {"prompt": order.request.prompt, "negative_prompt": order.request.negative_prompt}
    if isinstance(order.request, EditRequest):
        prompts["prompt_to"] = order.request.prompt_to
    found = []
    for name, prompt in prompts.items():
        if prompt and bundle.text.tokenize([prompt]).truncated[0]:
            found.append(f"{name} is longer than {bundle.text.config.max_length} tokens; the rest is cut off")
        if prompt and bundle.text.clip_truncated([prompt])[0]:
            found.append(f"{name} is longer than CLIP takes; its embedding is of the beginning")
    return found


def input_tokens(order: Order) -> dict[str, int]:
    """What the answer's usage says of the inputs: bytes of text, and nothing for images, which are free."""
    prompts = [order.request.prompt, order.request.negative_prompt or ""]
    return {"text_tokens": sum(len(prompt.encode()) for prompt in prompts), "image_tokens": 0}


def warm_up(bundle: Bundle) -> None:
    """Use every network once, so that the first request does not wait for it."""
    with torch.inference_mode():
        canvas = edits.text_to_image(bundle, "x", seed=0, config=SamplingConfig(num_inference_steps=1))
        bundle.decode(canvas.tokens[None])
        assert math.prod(canvas.tokens.shape) > 0
