"""The Ray Serve application: an HTTP ingress in front of a deployment that holds the model.

    serve run serve.app:build model=/path/to/bundle

One request is sampled at a time; mixing requests into one running batch comes later.
"""

import asyncio
import base64
import io
import secrets
import time
import uuid
from pathlib import Path

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from paella.bundle import load_bundle
from paella.images import to_uint8
from paella.sampler import MAX_SEED, SamplingConfig
from serve.schemas import GenerationRequest, error_body

PAGE = Path(__file__).parent / "page" / "index.html"


class Arguments(BaseModel):
    """Arguments of `build`."""

    model: str


@ray_serve.deployment(ray_actor_options={"num_cpus": 1, "num_gpus": 1 if torch.cuda.is_available() else 0})
class Generator:
    """Holds the model. Sampling runs on a thread, one request at a time, so that the replica always answers."""

    def __init__(self, model: str) -> None:
        self.bundle = load_bundle(model, "cuda" if torch.cuda.is_available() else "cpu")
        self.lock = asyncio.Lock()

    def describe(self) -> dict:
        return {"image_size": self.bundle.config.image_size, "digest": self.bundle.digest}

    async def generate(self, request: GenerationRequest, seed: int) -> dict:
        """Images of a request; a size that the model cannot make comes back as {"error": …}."""
        width, height = request.pixels(self.bundle.config.image_size)
        try:
            rows, columns = self.bundle.config.grid(width, height)
        except ValueError as error:
            return {"error": str(error)}
        seeds = [(seed + index) % (MAX_SEED + 1) for index in range(request.n)]
        async with self.lock:
            images = await asyncio.to_thread(self._sample, request, seeds, (width, height))
        data = [{"b64_json": image, "seed": number} for image, number in zip(images, seeds, strict=True)]
        return {"data": data, "size": f"{width}x{height}", "output_tokens": rows * columns * request.n}

    def _sample(self, request: GenerationRequest, seeds: list[int], size: tuple[int, int]) -> list[str]:
        scale = request.guidance_scale
        sampling = SamplingConfig(num_inference_steps=request.num_inference_steps, cfg=(scale, scale), temperature=(1.0, 0.3))
        tokens = self.bundle.generate_tokens([request.prompt] * request.n, seeds, size=size, sampling=sampling)
        return [_base64_png(image) for image in to_uint8(self.bundle.decode(tokens))]


def _base64_png(image) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


api = FastAPI(title="paella-ray", version="1")


# handlers come before the ingress, which takes the application as it is when the class is made


@api.exception_handler(RequestValidationError)
async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    message = f"unknown parameter {param}" if code == "unknown_parameter" else f"{param}: {first['msg']}"
    return JSONResponse(error_body(message, code, param), 400)


@api.exception_handler(HTTPException)
async def _http(_: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(error_body(str(error.detail), "invalid_value", None), error.status_code)


@api.middleware("http")
async def _request_id(request: Request, call_next):
    response = await call_next(request)
    response.headers["x-request-id"] = request.headers.get("x-request-id", uuid.uuid4().hex)
    return response


@ray_serve.deployment(max_ongoing_requests=200)
@ray_serve.ingress(api)
class Ingress:
    """HTTP: validation, OpenAI's shapes of answers and errors."""

    def __init__(self, generator: DeploymentHandle, name: str) -> None:
        self.generator = generator
        self.name = name

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> str:
        return PAGE.read_text()

    @api.get("/health/live")
    async def live(self) -> dict:
        return {"status": "ok"}

    @api.get("/health/ready")
    async def ready(self) -> dict:
        return {"status": "ok", **await self.generator.describe.remote()}

    @api.get("/v1/models")
    async def models(self) -> dict:
        return {"object": "list", "data": [{"id": self.name, "object": "model", "created": 0, "owned_by": "paella-ray"}]}

    @api.post("/v1/images/generations")
    async def generations(self, request: GenerationRequest) -> JSONResponse:
        if request.model not in (None, self.name):
            return JSONResponse(error_body(f"there is no model {request.model}", "model_not_found", "model"), 404)
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        result = await self.generator.generate.remote(request, seed)
        if "error" in result:
            return JSONResponse(error_body(result["error"], "invalid_value", "size"), 400)
        tokens = result.pop("output_tokens")
        usage = {"input_tokens": 0, "output_tokens": tokens, "total_tokens": tokens}
        answer = {"id": f"img-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name, "output_format": "png"}
        return JSONResponse({**answer, **result, "usage": usage})


def build(arguments: Arguments) -> ray_serve.Application:
    """The application for one bundle."""
    name = Path(arguments.model).name or "paella"
    return Ingress.bind(Generator.bind(arguments.model), name)
