"""What a model of one's own takes, before anything is bought: hours, storage, memory, CPUs and money, from counted arithmetic.

    python -m pipelines.plan paella-1b --images 12000000 --gpu A100 --num-gpus 8
    python -m pipelines.plan tiny --images 10000 --gpu cpu         # this machine, timed for a few seconds
    python -m pipelines.plan_tables                                # the tables of cluster/README.md

Counted: FLOPs, tensors that a step keeps, bytes of tokens. Assumed, and to be given where known better: utilisation, prices, what
a source image weighs. The last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paella import command_line
from paella.config import ModelConfig
from paella.ema import Ema
from paella.flops import PEAK_TFLOPS, TEXT_TOKENS, matrix_rate, training_flops
from paella.memory import WorkerMemory, sizes, worker_memory
from paella.parallel import ParallelConfig, compute_dtype
from paella.training import OptimConfig
from paella.unet import Paella
from paella.vqgan import VQModel
from pipelines import train_config
from pipelines.gloo_rates import gloo_rates

FLOAT32_TFLOPS = {"H200": 67, "H100": 67, "A100": 19.5, "L40S": 91, "L4": 30, "A10G": 31, "RTX 4090": 82}
"""By NVIDIA's data sheets, without tensor cores: tokens are made in float32, so that they are the same everywhere."""
DECODED_PER_CPU = 1 / 3.07e-3
"""1-megapixel JPEGs a second that a CPU decodes and crops to 256 pixels (benchmarks/results/tokenize_images.md)."""
ROW_BYTES = 250
"""Of a token dataset beside the tokens: caption, id, digest, sizes."""
CLIP_BYTES = 2 * 2 * 1024
"""Both CLIP embeddings of the published width, float16."""
CLIP_FLOPS = 381.7e9
"""Of ViT-H-14's two towers for one image and its caption, counted as all else here."""
ROWS_PER_UNIT = 1024
"""Images that are decoded, and wait for the encoder, as one object in Ray's store."""
UNITS_PER_GPU = 4
"""Such objects on their way to one GPU, beside one in the making on each CPU that feeds it."""
FSDP_COPIES = 4
"""Of all weights, that a worker makes in a pass beside what it sends: unpacked twice; gradients packed, and put in place."""
TIMED_FLOPS = 100e9
"""Of a pass that is timed, about: fewer images of a small model take longer each."""
HEADROOM = 0.9
"""Share of a GPU's memory that a plan fills."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """One model to be trained."""

    model: ModelConfig
    """U-Net and text encoders."""
    images: int = 12_000_000
    """In the dataset."""
    steps: int
    """Optimizer steps."""
    global_batch_size: int
    """Images per step over all workers."""
    parallel: ParallelConfig
    """What of the memory is traded already; the rest is chosen here."""
    optim: OptimConfig
    """Optimizer, whose update counts on CPUs."""
    gpu: str = "A100"
    """What it runs on, by the name in NVIDIA's data sheets, or cpu: this machine."""
    gpu_memory_gb: float = 80.0
    """Of each GPU, or of each worker on CPUs."""
    num_gpus: int = 8
    """Workers."""
    mfu: float = 0.25
    """Share of the data sheet's arithmetic that training reaches (one H200: 0.21); not used for cpu, which is timed."""
    encode_efficiency: float = 0.6
    """The same of the encoders in tokenizing, of the float32 arithmetic."""
    source_kb: float = 150.0
    """Of an image as it lies on S3."""
    clip: bool = False
    """Whether the dataset has embeddings of the published CLIP."""
    gpu_hour: float = 2.0
    """Price of a GPU for an hour."""
    cpu_hour: float = 0.04
    """Price of a CPU for an hour."""
    gb_month: float = 0.023
    """Price of a GB on S3 for a month."""

    def __post_init__(self) -> None:
        for name in ("images", "steps", "global_batch_size", "num_gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 1")
        if self.gpu != "cpu" and self.gpu not in FLOAT32_TFLOPS:
            raise ValueError(f"gpu={self.gpu!r} is not allowed: cpu, {', '.join(FLOAT32_TFLOPS)}")
        if self.global_batch_size % self.num_gpus:
            raise ValueError(f"global_batch_size={self.global_batch_size} must be a multiple of num_gpus={self.num_gpus}")

    @property
    def device(self) -> str:
        return "cpu" if self.gpu == "cpu" else "cuda"

    @property
    def tokens_per_image(self) -> int:
        height, width = self.model.grid(self.model.image_size, self.model.image_size)
        return height * width


def presets() -> dict[str, PlanConfig]:
    """With the steps and batches of the training presets."""
    return {
        name: PlanConfig(
            clip=train.model.text.clip is not None,
            model=train.model,
            steps=train.steps,
            global_batch_size=train.global_batch_size,
            parallel=train.parallel,
            optim=train.optim,
        )
        for name, train in train_config.presets().items()
    }


@dataclass(frozen=True)
class Layout:
    """A way to train that fits: images that pass through a worker at a time, how the rest is spread, and what it holds then."""

    images: int
    parallel: ParallelConfig
    memory: WorkerMemory

    @property
    def flags(self) -> str:
        """Of train.py."""
        flags = f"--parallel.accumulate {self.parallel.accumulate}"
        if not self.parallel.reshard_after_forward:
            flags += " --parallel.no-reshard-after-forward"
        return flags + " --parallel.activation-checkpointing" * self.parallel.activation_checkpointing


def layout(config: PlanConfig) -> Layout | None:
    """The layout with the least extra arithmetic, then the fewest transfers, then the largest batch; None where nothing fits."""
    share = config.global_batch_size // config.num_gpus
    parts = [number for number in range(1, share + 1) if share % number == 0]
    for recompute in (False, True):
        for reshard in (False, True):
            for accumulate in parts:
                found = _layout(config, share // accumulate, accumulate, recompute, reshard)
                enough = found.images >= min(share, MIN_IMAGES) or recompute
                if enough and found.memory.total <= HEADROOM * config.gpu_memory_gb * 1e9:
                    return found
    return None


MIN_IMAGES = 8
"""Images that should pass through a GPU at a time before anything is computed again to make room."""


def _layout(config: PlanConfig, images: int, accumulate: int, recompute: bool, reshard: bool) -> Layout:
    parallel = dataclasses.replace(
        config.parallel, accumulate=accumulate, activation_checkpointing=recompute, reshard_after_forward=reshard
    )
    dtype = compute_dtype("auto", torch.device(config.device))
    memory = worker_memory(config.model, images, dtype, num_shards=config.num_gpus, parallel=parallel, device=config.device)
    return Layout(images, parallel, memory)


def images_per_s(config: PlanConfig, images: int) -> float:
    """Of all workers in training, so many images at a time in each: by data sheet and utilisation, or timed here."""
    unet, text = unet_flops(config.model), text_flops(config.model)
    if config.gpu == "cpu":
        return cpu_rate(config, images) * unet / (unet + text)
    return config.num_gpus * config.mfu * PEAK_TFLOPS[config.gpu] * 1e12 / (unet + text)


unet_flops = functools.cache(training_flops)


def text_flops(model: ModelConfig) -> float:
    """Of one caption: two for each weight and token, three times that where the encoder is trained."""
    size = sizes(model)
    return 2.0 * TEXT_TOKENS * size.text * (3 if size.text_trained else 1)


def cpu_rate(config: PlanConfig, images: int) -> float:
    """Images a second through the U-Net of all workers on this machine: a worker's passes and update, timed with its share of the
    CPUs, and the weights and gradients that it exchanges with the others and copies. The update counts whole: Muon's is, and
    AdamW's waits for the memory that workers share."""
    workers, cpus = config.num_gpus, os.cpu_count() or 1
    some = min(images, math.ceil(TIMED_FLOPS / unet_flops(config.model)))
    pass_s, update_s = timed(config.model, config.optim, some, max(1, cpus // workers))
    trained, passes = sizes(config.model).trained, config.global_batch_size / workers / images
    gathers = 2 * passes if config.parallel.reshard_after_forward else 1
    exchange_s = 0.0
    if workers > 1:  # weights in the type that is computed in; gradients once a step, in float32
        weight_rate, gradient_rate = gloo_rates()
        itemsize = compute_dtype("auto", torch.device("cpu")).itemsize
        exchange_s = trained * (gathers * itemsize / weight_rate + 4 / gradient_rate) * (workers - 1) / workers
    copy_s = 4 * trained * (FSDP_COPIES * passes + (1 + gathers) * (workers == 1)) / copy_rate()
    step_s = passes * pass_s * images / some + exchange_s + copy_s + update_s
    return config.global_batch_size / (step_s * max(1, workers / cpus))


def copy_rate(size: int = 2**27) -> float:
    """Bytes a second that one thread copies."""
    source, target = torch.ones(2, size, dtype=torch.uint8)
    target.copy_(source)
    began = time.perf_counter()
    target.copy_(source)
    return size / (time.perf_counter() - began)


def timed(model: ModelConfig, optim: OptimConfig, images: int, threads: int, seconds: float = 5.0) -> tuple[float, float]:
    """Seconds of forward and backward of so many images through the U-Net, and of the update (clipping, optimizers, averages), on
    so many threads."""
    before, dtype = torch.get_num_threads(), compute_dtype("auto", torch.device("cpu"))
    torch.set_num_threads(threads)
    unet = Paella(model.unet).to(dtype).train()
    optimizers, ema = optim.optimizers(unet, dtype), Ema(unet, 0.999)
    height, width = model.grid(model.image_size, model.image_size)
    tokens = torch.randint(model.unet.num_labels, (images, height, width))
    states = torch.randn(images, TEXT_TOKENS, model.unet.byt5_embd, dtype=dtype)
    times: list[tuple[float, float]] = []
    while len(times) < 3 or sum(map(sum, times)) < seconds:
        began = time.perf_counter()
        logits = unet(tokens, torch.rand(images), byt5=states)
        nn.functional.cross_entropy(logits.float(), tokens, label_smoothing=0.1).backward()
        passed = time.perf_counter()
        nn.utils.clip_grad_norm_(unet.parameters(), optim.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(unet, len(times))
        times.append((passed - began, time.perf_counter() - passed))
    torch.set_num_threads(before)
    pass_s, update_s = (statistics.median(values) for values in zip(*times[1:], strict=True))
    return pass_s, update_s


@functools.cache
def encoder_flops(model: ModelConfig) -> float:
    """Of the VQGAN's encoder for one image."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        VQModel(model.vqgan).encode(torch.zeros(1, 3, model.image_size, model.image_size))
    return float(counter.get_total_flops())


def plan(config: PlanConfig) -> dict[str, Any]:
    """All numbers of a plan. Raises ValueError where no layout fits."""
    return tokenizing(config) | training(config)


def tokenizing(config: PlanConfig) -> dict[str, Any]:
    """Rate and hours of one GPU that encodes, the CPUs that feed it, bytes and money."""
    peak = matrix_rate(torch.float32) if config.gpu == "cpu" else FLOAT32_TFLOPS[config.gpu] * 1e12
    rate = peak * config.encode_efficiency / (encoder_flops(config.model) + CLIP_FLOPS * config.clip)
    hours, decoders = config.images / rate / 3600, rate / DECODED_PER_CPU
    source = config.images * config.source_kb * 1e3
    tokens = config.images * (2 * config.tokens_per_image + ROW_BYTES + CLIP_BYTES * config.clip)
    return {
        "encoded_per_s_per_gpu": rate,
        "tokenize_gpu_hours": hours,
        "cpus_per_encoding_gpu": decoders,
        "object_store_bytes": ROWS_PER_UNIT * 3 * config.model.image_size**2 * (UNITS_PER_GPU + math.ceil(decoders)),
        "source_bytes": source,
        "tokens_bytes": tokens,
        "tokenize_cost": hours * (config.gpu_hour + decoders * config.cpu_hour),
        "storage_cost_month": (source + tokens) / 1e9 * config.gb_month,
    }


def training(config: PlanConfig) -> dict[str, Any]:
    """A layout that fits, rate, hours and money. Raises ValueError where none fits."""
    chosen = layout(config)
    if chosen is None:
        raise ValueError(
            f"{config.num_gpus} workers of {config.gpu_memory_gb:g} GB cannot train this model: take more of them, or larger ones"
        )
    rate = images_per_s(config, chosen.images)
    images = config.steps * config.global_batch_size
    hours = images / rate / 3600
    return {
        "layout": chosen,
        "images_per_s": rate,
        "train_hours": hours,
        "gpu_hours": hours * config.num_gpus,
        "epochs": images / config.images,
        "checkpoint_bytes": sizes(config.model).trained * 16,
        "train_cost": hours * config.num_gpus * config.gpu_hour,
    }


def described(config: PlanConfig, numbers: dict[str, Any]) -> str:
    """A plan in sentences."""
    chosen: Layout = numbers["layout"]
    memory = chosen.memory
    parts = ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.1f}" for name, value in vars(memory).items())
    prices = f"{config.gpu_hour:g} a GPU-hour, {config.cpu_hour:g} a CPU-hour, {config.gb_month:g} a GB-month"
    unit = "worker" if config.gpu == "cpu" else config.gpu
    return "\n".join(
        [
            f"tokenizing {config.images:,} images: {numbers['tokenize_gpu_hours']:,.1f} {unit}-hours at "
            f"{numbers['encoded_per_s_per_gpu']:,.0f} images/s; {numbers['cpus_per_encoding_gpu']:.1f} CPUs decode for one, and "
            f"{numbers['object_store_bytes'] / 1e9:.1f} GB of object store hold what is between them",
            f"storage: {numbers['source_bytes'] / 1e9:,.0f} GB of images, {numbers['tokens_bytes'] / 1e9:,.1f} GB of tokens, "
            f"{numbers['checkpoint_bytes'] / 1e9:.1f} GB a checkpoint",
            f"training: {numbers['images_per_s']:,.1f} images/s on {config.num_gpus} x {unit}, "
            f"{numbers['train_hours']:,.1f} hours, {numbers['gpu_hours']:,.0f} {unit}-hours, {numbers['epochs']:.1f} epochs",
            f"memory per {unit}: {memory.total / 1e9:.1f} of {config.gpu_memory_gb:g} GB with {chosen.images} images at a time "
            f"({parts}); {chosen.flags}",
            f"cost ({prices}): training {numbers['train_cost']:,.0f} = steps x batch / images/s / 3600 x GPUs x price; "
            f"tokenizing {numbers['tokenize_cost']:,.0f}; storage {numbers['storage_cost_month']:,.0f} a month",
        ]
    )


def run(config: PlanConfig) -> None:
    numbers = plan(config)
    print(described(config, numbers))
    chosen = numbers.pop("layout")
    memory = vars(chosen.memory) | {"total": chosen.memory.total}
    print(json.dumps(numbers | {"images_at_a_time": chosen.images, "flags": chosen.flags, "memory_bytes": memory}))


if __name__ == "__main__":
    from pipelines.plan import presets as _presets
    from pipelines.plan import run as _run

    command_line.main(_run, _presets(), __doc__ or "")
