"""The sampler: start from random tokens, predict, draw, re-noise less each step.

`sample()` is the whole method (arXiv 2211.07292, algorithm 2, with the v3 model card's settings). Random numbers are drawn
for each image from its own (seed, step), never from its place in the batch, so an image comes out the same alone or in
any mix, but for a rare draw that falls within the rounding of its logits. B batch, K codes, H W token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from paella.config import PaellaConfig
from paella.objective import add_noise

Conditions = Mapping[str, Tensor]  # keyword arguments of Paella.forward
MAX_SEED = 2**32 - 1


class Predictor(Protocol):
    """What `sample` needs of a model: a `Paella`, or a module around one."""

    config: PaellaConfig

    def __call__(self, tokens: Tensor, t: Tensor, **conditions: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of one sampling run; the defaults are the v3 model card's."""

    num_inference_steps: int = 12
    """U-Net passes (two each with guidance)."""
    renoise_steps: int | None = None
    """Steps after which tokens are re-noised; all but the last if not given."""
    temperature: tuple[float, float] = (0.7, 0.3)
    """Temperature of the draws at the first and at the last step, linear in between."""
    cfg: tuple[float, float] = (8.0, 8.0)
    """Classifier-free guidance at the first and at the last step; 1 is none."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_inference_steps <= 1000:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} is not allowed: 1 to 1000")
        if self.renoise_steps is not None and not 0 <= self.renoise_steps < self.num_inference_steps:
            raise ValueError(
                f"renoise_steps={self.renoise_steps} is not allowed: 0 to num_inference_steps-1={self.num_inference_steps - 1}"
            )
        if not all(0 < value <= 10 for value in self.temperature):
            raise ValueError(f"temperature={self.temperature} is not allowed: above 0, at most 10")
        if not all(0 <= value <= 100 for value in self.cfg):
            raise ValueError(f"cfg={self.cfg} is not allowed: 0 to 100")


@torch.inference_mode()
def sample(
    model: Predictor,
    conditions: Conditions,
    unconditional: Conditions,
    *,
    seeds: Sequence[int],
    size: tuple[int, int],
    config: SamplingConfig | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Generate token grids.

    Args:
        model: a `Paella` in eval mode.
        conditions, unconditional: keyword arguments of its forward, with and without the prompt.
        seeds: one per image, 0 to 2³²−1.
        size: (H, W) of the token grid.
        on_step: called after each draw with the step and the (B,H,W) prediction, before re-noising.

    Returns:
        (B,H,W) int64 tokens.
    """
    config = config or SamplingConfig()
    steps, device = config.num_inference_steps, next(model.parameters()).device
    renoise_steps = steps - 1 if config.renoise_steps is None else config.renoise_steps
    levels = torch.linspace(1, 0, steps + 1, device=device)
    temperatures, cfgs = torch.linspace(*config.temperature, steps), torch.linspace(*config.cfg, steps)

    noise = random_tokens(seeds, size, model.config.num_labels).to(device)
    tokens = noise
    for step in range(steps):
        t = levels[step].expand(len(seeds))
        logits = guided_logits(model, tokens, t, conditions, unconditional, cfgs[step].item())
        draws, mask = step_randoms(seeds, step, size)
        tokens = draw(logits / temperatures[step].item(), draws.to(device))
        if on_step:
            on_step(step, tokens)
        if step < renoise_steps:
            replaced = (mask.to(device) <= levels[step + 1]).long()
            tokens, _ = add_noise(tokens, levels[step + 1].expand(len(seeds)), mask=replaced, random_tokens=noise)
    return tokens


def guided_logits(
    model: Predictor, tokens: Tensor, t: Tensor, conditions: Conditions, unconditional: Conditions, cfg: float
) -> Tensor:
    """Classifier-free guidance: cfg · conditional + (1 − cfg) · unconditional logits, (B,K,H,W)."""
    logits = model(tokens, t, **conditions)
    if cfg != 1:
        logits = torch.lerp(model(tokens, t, **unconditional), logits, cfg)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One code per position from softmax(logits), by inverting its cumulative sum: (B,K,H,W), (B,H,W) → (B,H,W)."""
    cumulative = logits.float().softmax(dim=1).permute(0, 2, 3, 1).cumsum(-1)  # (B,H,W,K)
    threshold = uniform[..., None] * cumulative[..., -1:]  # the last sum is 1 but for rounding
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp_(max=logits.shape[1] - 1)


def random_tokens(seeds: Sequence[int], size: tuple[int, int], num_labels: int) -> Tensor:
    """The start noise of each image: (B,H,W) int64."""
    return torch.from_numpy(np.stack([_rng(seed, 0).integers(num_labels, size=size) for seed in seeds]))


def step_randoms(seeds: Sequence[int], step: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Uniform numbers in [0, 1) for a step's draw and for its re-noising, each (B,H,W) float32."""
    both = np.stack([_rng(seed, step + 1).random((2, *size), dtype=np.float32) for seed in seeds], axis=1)
    draws, mask = torch.from_numpy(both)
    return draws, mask


def _rng(seed: int, stream: int) -> np.random.Generator:
    """Philox is counter-based: any (seed, stream) is reached at once, on every machine alike."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed} is not allowed: 0 to {MAX_SEED}")
    return np.random.Generator(np.random.Philox(key=[seed, stream]))
