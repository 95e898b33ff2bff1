"""How fast `paella-1b` trains and samples on one GPU, against its arithmetic: images/s, MFU, memory, and where the time goes.

    python benchmarks/gpu.py train                # eager and compiled, several batches: about five minutes, most of it compiling
    python benchmarks/gpu.py train --batches 16 --no-compile --kernels 30
    python benchmarks/gpu.py published            # a plain loop that encodes in it, as the published code does
    python benchmarks/gpu.py sample

Random weights of the published size, random tokens and text states. Training is a plain loop over what `train.py` takes:
the same sharded module, optimizer and averages, without Ray, data and metrics. `published` has whole weights in float32, autocast
to bfloat16, eager, and encodes images by the VQGAN and captions by an encoder of ByT5-XL's size in every step. The floor is
counted FLOPs at the GPU's listed rate for `train`, at the rate that it reaches in a large matrix product for `sample`. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import T5Config, T5EncoderModel

from paella.config import PRESETS, ModelConfig
from paella.cuda_graphs import GraphedUnet
from paella.ema import Ema
from paella.flops import TEXT_TOKENS, peak_flops, training_flops
from paella.parallel import ParallelConfig, shard
from paella.sampler import MODEL_CARD, Predictor, sample, start
from paella.training import NoiseConfig, OptimConfig, TextToTokens, draw_noise, loss_and_metrics
from paella.unet import Paella
from paella.vqgan import VQModel

BYT5_XL: dict[str, Any] = {"vocab_size": 384, "d_model": 2560, "d_kv": 64, "d_ff": 6720, "num_layers": 36, "num_heads": 32}
DEVICE = torch.device("cuda")


def seconds_of(call: Callable[[], object], rounds: int) -> list[float]:
    """Of each call, the GPU's work included."""
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


@contextlib.contextmanager
def kernels_shown(number: int) -> Iterator[None]:
    """Prints the kernels that take the most time in the block."""
    if not number:
        yield
        return
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        yield
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.key_averages() if "cuda" in str(event.device_type).lower()]
    rows = [event for event in on_gpu if not event.key.startswith(("Optimizer.", "FSDP::"))]  # which are made of kernels
    total = sum(event.self_device_time_total for event in rows)
    for event in sorted(rows, key=lambda event: -event.self_device_time_total)[:number]:
        share = event.self_device_time_total / total
        print(f"    {share:6.1%} {event.self_device_time_total / 1000:9.2f} ms {event.count:6} {event.key[:140]}", flush=True)
    print(f"    all kernels {total / 1000:.1f} ms", flush=True)


def train(batches: list[int], compiled: list[bool], kernels: int) -> list[dict]:
    config, rows = PRESETS["paella-1b"], []
    peak, flops = peak_flops(DEVICE, torch.bfloat16), training_flops(config)
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{directory}/store", rank=0, world_size=1)
        for compile_blocks in compiled:
            for batch in batches:
                rate, memory = train_variant(config, batch, compile_blocks, kernels if batch == batches[-1] else 0)
                mfu = None if peak is None else rate * flops / peak
                rows.append({"batch": batch, "compile": compile_blocks, "images_per_s": rate, "mfu": mfu, "memory": memory})
                name = "compiled" if compile_blocks else "eager"
                shown = "" if mfu is None else f", MFU {mfu:.1%}"
                print(f"{name}, {batch} images a pass: {rate:.1f} images/s{shown}, {memory / 1e9:.1f} GB", flush=True)
        dist.destroy_process_group()
    return rows


def train_variant(config: ModelConfig, batch: int, compile_blocks: bool, kernels: int) -> tuple[float, int]:
    """Images a second of steps of one pass each, and the most bytes allocated."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    torch.manual_seed(0)
    with DEVICE:
        model = TextToTokens(dataclasses.replace(config, text=PRESETS["tiny"].text)).train()  # whose encoder has nothing to do
    shard(model, torch.bfloat16, ParallelConfig(compile=compile_blocks, loss_chunk=16_384, reshard_after_forward=False))
    (optimizer,), ema = OptimConfig().optimizers(model), Ema(model, 0.9999)
    height, width = config.grid(config.image_size, config.image_size)
    tokens = torch.randint(config.unet.num_labels, (batch, height, width))
    states = torch.randn(batch, TEXT_TOKENS, config.unet.byt5_embd, device=DEVICE, dtype=torch.bfloat16)
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=DEVICE)

    def one_step() -> None:
        draws = draw_noise(tokens, config.unet.num_labels, 0, range(batch), NoiseConfig()).to(DEVICE)
        inputs = (draws.noised, draws.t, states, mask, draws.keep)
        losses = model.losses(tokens.to(DEVICE), *inputs, label_smoothing=0.1, chunk=16_384, compiled=compile_blocks)
        loss_and_metrics(*losses, draws)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, 0)

    first = sum(seconds_of(one_step, 2))
    print(f"  first two steps {first:.1f} s", flush=True)
    seconds = statistics.median(seconds_of(one_step, 6))
    with kernels_shown(kernels):
        one_step()
    return batch / seconds, torch.cuda.max_memory_allocated()


def published(batches: list[int]) -> list[dict]:
    """Images a second of the published code's loop; its loader's work, which is beside it, is not counted, nor are averages."""
    config, rows = PRESETS["paella-1b"], []
    with DEVICE:
        unet, vqgan = Paella(config.unet).train(), VQModel(config.vqgan).eval().requires_grad_(False)
        text = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **BYT5_XL)).eval().requires_grad_(False).bfloat16()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)

    def one_step(images: Tensor, captions: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            with torch.no_grad():
                tokens, states = vqgan.encode(images), text(captions).last_hidden_state
            others = torch.randint_like(tokens, config.unet.num_labels)
            noised = torch.where(torch.rand(tokens.shape, device=DEVICE) < 0.5, others, tokens)
            logits = unet(noised, torch.rand(len(images), device=DEVICE), byt5=states)
            loss = nn.functional.cross_entropy(logits, tokens, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for batch in batches:
        images = torch.rand(batch, 3, config.image_size, config.image_size, device=DEVICE)
        captions = torch.randint(3, 259, (batch, TEXT_TOKENS), device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        seconds_of(lambda: one_step(images, captions), 2)  # noqa: B023 (called at once)
        rate = batch / statistics.median(seconds_of(lambda: one_step(images, captions), 6))  # noqa: B023
        rows.append({"batch": batch, "images_per_s": rate, "memory": torch.cuda.max_memory_allocated()})
        print(f"encoding in the loop, {batch} images: {rate:.1f} images/s, {rows[-1]['memory'] / 1e9:.1f} GB", flush=True)
    return rows


def sampling(batches: list[int], kernels: int) -> list[dict]:
    """Images a second of the library's sampler."""
    config, rows = PRESETS["paella-1b"], []
    flops = training_flops(config) / 3 * 2 * MODEL_CARD.num_inference_steps
    rate = matrix_rate()
    with DEVICE:
        model = Paella(config.unet).eval().requires_grad_(False).bfloat16()
    grid = config.grid(config.image_size, config.image_size)
    states = torch.randn(2, TEXT_TOKENS, config.unet.byt5_embd, device=DEVICE, dtype=torch.bfloat16)
    prompt, negative = model.prepare(byt5=states[:1]), model.prepare(byt5=states[1:, :1])
    ways: dict[str, Predictor] = {"U-Net": model, "its graphs": GraphedUnet(model, grid)}
    for batch in batches:
        for name, predictor in ways.items():

            def images(batch: int = batch, predictor: Predictor = predictor) -> Tensor:
                canvases = [start(config.unet.num_labels, grid, [prompt], negative, seed=seed) for seed in range(batch)]
                return sample(predictor, canvases)

            seconds_of(images, 1)
            seconds = statistics.median(seconds_of(images, 3))
            share = batch * flops / rate / seconds
            rows.append({"batch": batch, "by": name, "images_per_s": batch / seconds, "share_of_matrix_rate": share})
            print(
                f"{batch:3} images by {name}: {seconds:.3f} s, {batch / seconds:.2f} images/s, {share:.0%} of the matrix rate",
                flush=True,
            )
            with kernels_shown(kernels if batch == batches[-1] else 0):
                images()
    print(f"matrix rate {rate / 1e12:.0f} TFLOP/s")
    return rows


def matrix_rate(size: int = 8192) -> float:
    """FLOP/s of a large bfloat16 matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds_of(lambda: a @ b, 3)
    return 2 * size**3 / statistics.median(seconds_of(lambda: a @ b, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "published", "sample"))
    parser.add_argument("--batches", type=int, nargs="+", help="images in a pass")
    parser.add_argument("--kernels", type=int, default=0, help="show this many kernels of the largest batch")
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    parser.add_argument("--no-eager", action="store_true", help="compiled only")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if chosen.what == "train":
        compiled = [False] * (not chosen.no_eager) + [True] * (not chosen.no_compile)
        rows = train(chosen.batches or [8, 16, 32], compiled, chosen.kernels)
    elif chosen.what == "published":
        rows = published(chosen.batches or [16, 32])
    else:
        rows = sampling(chosen.batches or [1, 4, 16, 32], chosen.kernels)
    print(json.dumps({"benchmark": f"gpu {chosen.what}", "device": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    main()
