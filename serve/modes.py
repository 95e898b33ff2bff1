"""From a request of the API to the engine's tasks: one for each image, as `paella.requests` plans it."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

from torch import Tensor

from paella import requests
from paella.bundle import Bundle
from paella.pictures import encoded
from paella.requests import MODE_FIELDS, PictureRequest
from serve.engine import Task
from serve.schemas import ApiError, EditRequest, GenerationRequest


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
        """One of each image."""
        return self.pictures.seeds(self.seed, self.num_images)

    @property
    def pictures(self) -> PictureRequest:
        """What is asked for, without how it is to be answered."""
        request, edit = self.request, {}
        if isinstance(request, EditRequest):
            edit = {name: getattr(request, name) for name in MODE_FIELDS if getattr(request, name) is not None}
            edit |= {"images": tuple(request.image)}
            if request.weights is not None:
                edit["weights"] = tuple(request.weights)
        return PictureRequest(
            mode=self.mode,
            sampling=requests.sampling(request.steps, request.guidance_scale, request.temperature),
            **{name: getattr(request, name) for name in SHARED},
            **edit,
        )


SHARED = ("prompt", "negative_prompt", "size", "output_format", "output_compression")


@dataclass(frozen=True)
class Plan:
    """What an engine is to do for an order."""

    tasks: list[Task]
    size: tuple[int, int]
    """(width, height) of the pictures."""
    tokens: int
    """Latent tokens of all pictures."""
    warnings: list[str]


def plan(bundle: Bundle, order: Order) -> Plan:
    """The tasks of an order. Decodes its images, so it belongs on a thread. Raises ApiError for what the model cannot do."""
    try:
        planned = requests.plan(bundle, order.pictures)
    except requests.InputError as error:
        raise ApiError.of(error) from error
    rows, columns = planned.grid
    deadline = time.monotonic() + order.timeout_s
    tasks = [
        Task(
            make=functools.partial(planned.canvas, seed=seed, index=index),
            finish=functools.partial(_finish, bundle, planned, seed, index),
            steps=order.request.steps,
            tokens=rows * columns,
            deadline=deadline,
            num_previews=order.request.partial_images,
            label=f"{order.request_id}/{index}",
            mode=order.mode,
        )
        for index, seed in enumerate(order.seeds)
    ]
    return Plan(tasks, planned.size, rows * columns * len(tasks), _warnings(bundle, order))


def _finish(bundle: Bundle, planned: requests.Plan, seed: int, index: int, picture: Tensor, preview: int | None) -> bytes:
    """The file of a picture, or of a preview, which does not say how it was made."""
    if preview is None:
        return planned.file(bundle, picture, seed=seed, index=index)
    request = planned.request
    return encoded(planned.finished(picture), request.output_format, request.output_compression, None)


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
