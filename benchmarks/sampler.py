"""How fast the sampler is: ours against the plain loop of the model card, which takes two float32 passes a step, through
PyTorch's linear layers, and then a softmax and a multinomial draw.

    python benchmarks/sampler.py            # tiny in batches of 32, and paella-1b, one image of 64x64 tokens
    python benchmarks/sampler.py tiny       # only that one

Both run in one process in turn, on random weights, and ours in bfloat16 too where the processor multiplies it. The floor is the
U-Net's multiplications at the matrix rate that this machine is measured to have. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from paella.config import PRESETS
from paella.flops import matrix_rate
from paella.objective import add_noise
from paella.parallel import compute_dtype
from paella.sampler import MODEL_CARD, sample, start
from paella.unet import Paella

CASES = {"tiny": (32, 16, 70, 3), "paella-1b": (1, 64, 70, 1)}
"""Preset: images, side of the token grid, bytes of the prompt, rounds."""


def torch_s_own() -> Any:
    """In place of oneDNN's product the ones that PyTorch chooses."""
    return mock.patch("paella.blocks._by_onednn", lambda x: False)


@torch.inference_mode()
@torch_s_own()
def plain(model: Paella, conditions: dict[str, Tensor], batch: int, side: int) -> Tensor:
    """The model card's loop."""
    steps, num_labels = MODEL_CARD.num_inference_steps, model.config.num_labels
    without = {name: torch.zeros_like(value) for name, value in conditions.items()}
    levels, temperatures = torch.linspace(1, 0, steps + 1), torch.linspace(0.7, 0.3, steps)
    noise = torch.randint(num_labels, (batch, side, side))
    tokens = noise
    for step in range(steps):
        t = levels[step].expand(batch)
        logits = torch.lerp(model(tokens, t, **without), model(tokens, t, **conditions), 8.0)
        probabilities = (logits / temperatures[step]).softmax(1).permute(0, 2, 3, 1).reshape(-1, num_labels)
        tokens = torch.multinomial(probabilities, 1).view(batch, side, side)
        if step < steps - 1:
            tokens, _ = add_noise(tokens, levels[step + 1].expand(batch), random_tokens=noise)
    return tokens


@torch.inference_mode()
def ours(model: Paella, conditions: dict[str, Tensor], batch: int, side: int) -> Tensor:
    without = {name: torch.zeros_like(value[:1]) for name, value in conditions.items()}
    canvases = []
    for index in range(batch):
        prompt = model.prepare(**{name: value[index : index + 1] for name, value in conditions.items()})
        canvases.append(start(model.config.num_labels, (side, side), [prompt], model.prepare(**without), seed=index))
    return sample(model, canvases)


def timed(function: Callable[[], Tensor], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def build(preset: str) -> Paella:
    """Random weights of ordinary size: zero-initialised ones would skip work in no library, but hide a wrong result."""
    torch.manual_seed(0)
    model = Paella(PRESETS[preset].unet).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return model


def agreement(model: Paella, fast: Paella, conditions: dict[str, Tensor], side: int) -> dict[str, float]:
    """Largest difference of the logits from the plain way's, relative to their spread."""
    tokens = torch.randint(model.config.num_labels, (1, side, side))
    one = {name: value[:1] for name, value in conditions.items()}
    t = torch.tensor([0.5])
    with torch.inference_mode():
        with torch_s_own():
            reference = model(tokens, t, **one)
        found = {"float32": model(tokens, t, prepared=model.prepare(**one))}
        if fast is not model:
            halves = {name: value.bfloat16() for name, value in one.items()}
            found["bf16"] = fast(tokens, t, prepared=fast.prepare(**halves)).float()
    spread = reference.std()
    largest = {name: ((logits - reference).abs().max() / spread).item() for name, logits in found.items()}
    return largest | {
        f"{name} (rms)": ((logits - reference).square().mean().sqrt() / spread).item() for name, logits in found.items()
    }


def run(preset: str) -> dict:
    batch, side, length, rounds = CASES[preset]
    model = build(preset)
    conditions = {"byt5": torch.randn(batch, length, model.config.byt5_embd), "clip": torch.randn(batch, model.config.clip_embd)}
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), torch_s_own():  # which it counts
        one = {name: value[:1] for name, value in conditions.items()}
        model(torch.zeros(1, side, side, dtype=torch.long), torch.ones(1), **one)
    flop = counter.get_total_flops() * 2 * MODEL_CARD.num_inference_steps  # an image: two passes a step
    seconds = {"plain, float32": timed(lambda: plain(model, conditions, batch, side), rounds)}
    seconds["ours, float32"] = timed(lambda: ours(model, conditions, batch, side), rounds)
    dtype = compute_dtype("auto", torch.device("cpu"))
    fast, fast_name = model, "ours, float32"
    if dtype == torch.bfloat16:
        fast, fast_name = build(preset).bfloat16(), "ours, bf16"
        halves = {name: value.bfloat16() for name, value in conditions.items()}
        seconds[fast_name] = timed(lambda: ours(fast, halves, batch, side), rounds)
    rate = matrix_rate(dtype)
    print(f"\n{preset}: {batch} image(s) of {side}x{side} tokens, 12 steps, cfg 8; {flop / 1e12:.2f} TFLOP each")
    for name, value in seconds.items():
        print(f"  {name:16} {value:8.2f} s  {batch / value:8.3f} images/s  {seconds['plain, float32'] / value:5.2f}x")
    reached = batch * flop / seconds[fast_name] / rate
    close = agreement(model, fast, conditions, side)
    print(f"  {fast_name} reaches {reached:.0%} of this machine's {rate / 1e9:.0f} GFLOP/s")
    shown = ", ".join(f"{name} {value:.1e}" for name, value in close.items())
    print(f"  difference of the logits, of their spread: {shown}")
    return {"seconds": seconds, "flop_per_image": flop, "flop_per_s": rate, "share_of_rate": reached, "agreement": close}


def main() -> None:
    chosen = sys.argv[1:] or list(CASES)
    if unknown := [name for name in chosen if name not in CASES]:
        sys.exit(f"unknown case {unknown[0]}; known are {', '.join(CASES)}")
    print(json.dumps({name: run(name) for name in chosen}))


if __name__ == "__main__":
    main()
