"""The prior: a CLIP text embedding in, the CLIP embedding of an image it could describe out.

A residual MLP predicts the Gaussian noise of a diffused image embedding; `sample_prior` takes that noise away step by step, by
DDPM (arXiv 2006.11239, algorithm 2) or DDIM (arXiv 2010.02502, equation 12 without noise), on the cosine schedule of arXiv
2102.09672. Parameter names, shapes and numbers equal the published prior's. Embeddings are as the CLIP encoder gives them.
B batch, D = clip_r, the width of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from paella.blocks import embed_noise_level
from paella.config import PriorConfig
from paella.sampler import MAX_SEED
from paella.storage import new_directory
from paella.weights import load_weights, read_config, save_weights, write_config

METHODS = ("ddpm", "ddim")
SCHEDULE_OFFSET = 0.008
"""Of the cosine schedule: keeps the first steps away from no noise at all."""
FIRST_STREAM = 2**32
"""Where the prior's random streams of a seed begin: the sampler's are all below."""
TRAINING_STREAM = 2**33
"""The stream of its training."""


class PriorBlock(nn.Sequential):
    """Two linear layers, each behind a norm, around the residual stream."""

    def __init__(self, c_hidden: int, clip_r: int, c_r: int) -> None:
        super().__init__(
            nn.Linear(c_hidden + clip_r + c_r, c_hidden * 4, bias=False),
            nn.LayerNorm(c_hidden * 4),
            nn.GELU(),
            nn.Linear(c_hidden * 4, c_hidden, bias=False),
            nn.LayerNorm(c_hidden),
        )

    def forward(self, x: Tensor, clip: Tensor, r_embed: Tensor) -> Tensor:  # type: ignore[override]
        """x (B,c_hidden), clip (B,D), r_embed (B,c_r) → (B,c_hidden)."""
        return x + super().forward(torch.cat([x, clip, r_embed], dim=1))


class Prior(nn.Module):
    """Predicts the noise in image embeddings.

    Example:
        >>> model = Prior(PriorConfig())
        >>> noise = model(x, t, clip)  # (B,D), (B,), (B,D) → (B,D)
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = c = config
        blocks = [PriorBlock(c.c_hidden, c.clip_r, c.c_r) for _ in range(c.num_blocks)]
        self.blocks = nn.ModuleList([nn.Linear(c.clip_r, c.c_hidden), *blocks, nn.Linear(c.c_hidden, c.clip_r)])
        self._init_weights()

    def _init_weights(self) -> None:
        """PyTorch's, but for the last layer: blocks add up, and without it a first prediction of 0 costs no more than 1."""
        for parameter in self.blocks[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, clip: Tensor) -> Tensor:
        """The noise in x.

        Args:
            x: (B,D) image embeddings with noise.
            t: (B,) noise level in [0, 1], 1 = all noise; in float32, whatever the model's dtype.
            clip: (B,D) text embeddings; zeros for none.

        Returns:
            (B,D). Raises ValueError on embeddings of another width.
        """
        width = self.config.clip_r
        if x.ndim != 2 or x.shape[1] != width or clip.shape != x.shape:
            shapes = f"{tuple(x.shape)} and {tuple(clip.shape)}"
            raise ValueError(f"image and text embeddings have shapes {shapes}, but both must be (batch, {width})")
        first, *blocks, last = self.blocks
        dtype = next(first.parameters()).dtype
        r_embed, clip = embed_noise_level(t, self.config.c_r).to(dtype), clip.to(dtype)
        x = first(x.to(dtype))
        for block in blocks:
            x = block(x, clip, r_embed)  # (B,c_hidden)
        return last(x)


def alpha_cumprod(t: Tensor) -> Tensor:
    """Share of the signal in the variance at noise levels t, in [1e-4, 0.9999]: (B,) → (B,)."""
    start = math.cos(SCHEDULE_OFFSET / (1 + SCHEDULE_OFFSET) * math.pi / 2) ** 2
    cosine = torch.cos((t + SCHEDULE_OFFSET) / (1 + SCHEDULE_OFFSET) * math.pi / 2)
    return (cosine**2 / start).clamp(1e-4, 0.9999)


def diffuse(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """√α · x + √(1−α) · noise with α = alpha_cumprod(t): (B,D), (B,), (B,D) → (B,D)."""
    alpha = alpha_cumprod(t)[:, None]
    return alpha.sqrt() * x + (1 - alpha).sqrt() * noise


def ddim_step(x: Tensor, predicted: Tensor, t: Tensor, next_t: Tensor) -> Tensor:
    """From noise level t to next_t: take the predicted noise away and diffuse with it anew.

    x (B,D), predicted (B,D), t (B,), next_t (B,) → (B,D).
    """
    alpha = alpha_cumprod(t)[:, None]
    clean = (x - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
    return diffuse(clean, next_t, predicted)


def ddpm_step(x: Tensor, predicted: Tensor, t: Tensor, next_t: Tensor, noise: Tensor) -> Tensor:
    """From noise level t to next_t: the posterior's mean, and new noise of its deviation but in the last step.

    x (B,D), predicted (B,D), t (B,), next_t (B,), noise (B,D) → (B,D).
    """
    alpha, next_alpha = alpha_cumprod(t)[:, None], alpha_cumprod(next_t)[:, None]
    ratio = alpha / next_alpha
    mean = (x - (1 - ratio) * predicted / (1 - alpha).sqrt()) / ratio.sqrt()
    deviation = ((1 - ratio) * (1 - next_alpha) / (1 - alpha)).sqrt()
    return mean + deviation * noise * (next_t > 0)[:, None]


@torch.inference_mode()
def sample_prior(
    model: Prior, clip: Tensor, *, seeds: Sequence[int], num_steps: int = 60, cfg: float = 3.0, method: str = "ddpm"
) -> Tensor:
    """Image embeddings for text embeddings.

    Args:
        model: a `Prior` in eval mode.
        clip: (B,D) text embeddings.
        seeds: one per embedding, 0 to 2³²−1; all its random numbers come from it.
        num_steps: noise levels on the way, 1 to 1000.
        cfg: classifier-free guidance, 0 to 100; 1 is none.
        method: ddpm, or ddim, which only draws the start.

    Returns:
        (B,D) float32. Raises ValueError for what is not allowed.
    """
    device, width = next(model.parameters()).device, model.config.clip_r
    if tuple(clip.shape) != (len(seeds), width):
        raise ValueError(f"text embeddings have shape {tuple(clip.shape)}, but {len(seeds)} seeds need {(len(seeds), width)}")
    if not 1 <= num_steps <= 1000:
        raise ValueError(f"num_steps={num_steps} is not allowed: 1 to 1000")
    if not 0 <= cfg <= 100:
        raise ValueError(f"cfg={cfg} is not allowed: 0 to 100")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not allowed: {' or '.join(METHODS)}")
    clip = clip.to(device)
    levels = torch.linspace(1, 0, num_steps + 2, device=device)[1:]  # one below 1, where noise is all there is to see
    x = seeded_noise(seeds, 0, width).to(device)
    for step, (t, next_t) in enumerate(pairwise(level.expand(len(seeds)) for level in levels), start=1):
        predicted = guided_noise(model, x, t, clip, cfg)
        if method == "ddim":
            x = ddim_step(x, predicted, t, next_t)
        else:
            x = ddpm_step(x, predicted, t, next_t, seeded_noise(seeds, step, width).to(device))
    return x


def guided_noise(model: Prior, x: Tensor, t: Tensor, clip: Tensor, cfg: float) -> Tensor:
    """cfg · conditional + (1 − cfg) · unconditional prediction, both in one pass; (B,D) float32."""
    if cfg == 1:
        return model(x, t, clip).float()
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([clip, torch.zeros_like(clip)]))
    conditional, unconditional = both.float().chunk(2)
    return torch.lerp(unconditional, conditional, cfg)


def seeded_noise(seeds: Iterable[int], step: int, width: int) -> Tensor:
    """Gaussian noise of a step, each row from its own seed: (B,width) float32."""
    rows: list[np.ndarray] = []
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed={seed} is not allowed: 0 to {MAX_SEED}")
        rng = np.random.Generator(np.random.Philox(key=[seed, FIRST_STREAM + step]))
        rows.append(rng.standard_normal(width, dtype=np.float32))
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, width)


@dataclass(frozen=True)
class PriorDraws:
    """The random numbers of one training step: t (B,), noise (B,D), keep (B,) False where the text is dropped."""

    t: Tensor
    noise: Tensor
    keep: Tensor

    def to(self, device: torch.device) -> PriorDraws:
        return PriorDraws(self.t.to(device), self.noise.to(device), self.keep.to(device))


def draw_prior_noise(width: int, seed: int, samples: range, drop: float = 0.1) -> PriorDraws:
    """Draws of each pair of embeddings from its own number in the run, so that they do not depend on the number of workers.

    Args:
        width: of an embedding.
        samples: numbers of the pairs: step · global batch size + place in the global batch, one after the other.
        drop: share of texts that are replaced by zeros, for classifier-free guidance.
    """
    half = (width + 1) // 2
    blocks = math.ceil((2 + 2 * half) / 4)  # Philox makes four numbers per count: a sample's begin at number · blocks
    rng = np.random.Generator(np.random.Philox(key=[seed, TRAINING_STREAM], counter=samples.start * blocks))
    uniform = torch.from_numpy(1 - rng.random((len(samples), 4 * blocks))).float()  # in (0, 1]
    t, keep, lengths, angles = uniform[:, : 2 + 2 * half].split([1, 1, half, half], dim=1)
    # Box and Muller's way to normal numbers takes as many uniform ones for each, so that a sample's place in the stream is known
    lengths, angles = (-2 * lengths.log()).sqrt(), 2 * math.pi * angles
    noise = torch.cat([lengths * angles.cos(), lengths * angles.sin()], dim=1)[:, :width]
    return PriorDraws(t[:, 0], noise, keep[:, 0] > drop)


def prior_loss(model: Prior, clip_image: Tensor, clip_text: Tensor, draws: PriorDraws) -> Tensor:
    """Mean squared error of the predicted noise, for each pair of embeddings (B,D), (B,D) → (B,)."""
    predicted = model(diffuse(clip_image, draws.t, draws.noise), draws.t, clip_text * draws.keep[:, None])
    return (predicted.float() - draws.noise).square().mean(dim=1)


def save_prior(path: Path, model: Prior) -> str:
    """Write a directory with a prior alone; returns its digest."""
    with new_directory(path, replace=True) as directory:
        digest = save_weights(directory, "prior", model.state_dict())
        write_config(directory, {"prior": model.config.to_dict(), "digests": {"prior": digest}})
    return digest


def load_prior(uri: str) -> tuple[Prior, str]:
    """The prior of a directory or URI in eval mode, without gradients, and its digest.

    Raises ValueError for a missing or damaged one.
    """
    root, values = read_config(uri)
    if values.get("prior") is None:
        raise ValueError(f"{uri} holds no prior")
    config, digest = PriorConfig.from_dict(values["prior"]), values["digests"]["prior"]
    return load_weights(lambda: Prior(config), root, "prior", digest), digest
