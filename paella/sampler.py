"""The sampler: start from random tokens, predict, draw, re-noise less each step.

`sample()` is the whole method (arXiv 2211.07292, algorithm 2). Its unit of work is `step()`: a `Canvas` is one image on its
way, and a step takes any number of them further, each at its own step with its own settings, prompts and mask. Random
numbers are drawn for each image from its own (seed, step), never from its place among the others. K codes, H W token grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor, nn

from paella.config import PaellaConfig, require
from paella.drawing import draw, keep_likely
from paella.unet import Prepared
from paella.vqgan import Codebook

MAX_SEED = 2**32 - 1
CPU_TOKENS = 2048
"""Tokens that share a pass on a CPU: more of them leave its cache."""


class Predictor(Protocol):
    """What the sampler needs of a model: a `Paella`, or a module around one."""

    config: PaellaConfig

    def __call__(self, tokens: Tensor, t: Tensor, *, prepared: Prepared) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of one image; the defaults are the v3 model card's.

    A value per step is given whole, or as its first and last (linear in between), or as one for all steps.
    """

    num_inference_steps: int = 12
    """U-Net passes (of two images each with guidance)."""
    renoise_steps: int | None = None
    """Steps after which tokens are re-noised; all but the last if not given."""
    noise: tuple[float, ...] = (1.0, 0.0)
    """Noise levels t from the start to the end, num_inference_steps + 1 of them; a start below 1 keeps part of a given image."""
    temperature: tuple[float, ...] = (0.7, 0.3)
    """Temperature of the draws, per step."""
    cfg: tuple[float, ...] = (8.0, 8.0)
    """Classifier-free guidance, per step; 1 is none."""
    guided_steps: tuple[int, int] | None = None
    """Guide only from this step to before that one; the other steps take one U-Net pass of one image."""
    choice: Literal["multinomial", "argmax", "nearest"] = "multinomial"
    """How a code is chosen: drawn, the most likely, or the one nearest to the mean of the codes' vectors."""
    top_k: int | None = None
    """Draw among this many of the likeliest codes only."""
    top_p: float | None = None
    """Draw among the likeliest codes that together have this probability."""
    typical_p: float | None = None
    """Draw among the codes of most typical surprise (arXiv 2202.00666) that together have this probability."""
    renoise_from: Literal["start", "previous", "fresh"] = "start"
    """Tokens that re-noising puts in: the image's start noise, the tokens before the step, or new random ones."""

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        require(1 <= steps <= 1000, "num_inference_steps", steps, "1 to 1000")
        renoise = self.renoise_steps
        require(renoise is None or 0 <= renoise < steps, "renoise_steps", renoise, f"0 to num_inference_steps-1={steps - 1}")
        for name, low, high, number in (("noise", 0, 1, steps + 1), ("temperature", 1e-3, 10, steps), ("cfg", 0, 100, steps)):
            values = getattr(self, name)
            in_range = all(low <= value <= high for value in values) and len(values) in (1, 2, number)
            require(in_range, name, values, f"1, 2 or {number} numbers from {low} to {high}")
        first, last = self.guided_steps or (0, steps)
        require(0 <= first <= last, "guided_steps", self.guided_steps, "two steps, the first not above the last")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, name, value, "above 0, at most 1")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "an integer of at least 1")

    def at(self, step: int) -> StepSettings:
        """The settings of one step."""
        steps = self.num_inference_steps
        first, last = self.guided_steps or (0, steps)
        renoise_steps = steps - 1 if self.renoise_steps is None else self.renoise_steps
        return StepSettings(
            t=_schedule(self.noise, steps + 1)[step],
            next_t=_schedule(self.noise, steps + 1)[step + 1] if step < renoise_steps else 0.0,
            temperature=_schedule(self.temperature, steps)[step],
            cfg=_schedule(self.cfg, steps)[step] if first <= step < last else 1.0,
        )


@dataclass(frozen=True)
class StepSettings:
    """One step of one image: its noise level, the level to re-noise to (0: not at all), temperature and guidance."""

    t: float
    next_t: float
    temperature: float
    cfg: float


MODEL_CARD = SamplingConfig()
"""Of the v3 model card: 12 steps."""
PUBLISHED_DEMO = SamplingConfig(num_inference_steps=32, renoise_steps=26, temperature=(1.2, 0.2), guided_steps=(0, 20))
"""Of the published demo: 32 steps, guided in the first 20."""


@dataclass
class Canvas:
    """One image on its way from noise."""

    seed: int
    config: SamplingConfig
    prompts: tuple[Prepared, ...]
    """Conditions of the whole image, or of each region."""
    negative: Prepared
    """What guidance leads away from: the empty prompt's conditions, or a negative prompt's."""
    tokens: Tensor
    """(H,W) int64, noised; clean after the last step."""
    source: Tensor
    """(H,W) int64: the tokens that re-noising puts back, and keeps where mask is False."""
    mask: Tensor | None = None
    """(H,W) True where the image is generated; the rest keeps the tokens of `source`."""
    regions: Tensor | None = None
    """(R,H,W) share of each prompt in the prediction at each position; they add up to 1."""
    residuals: Tensor | None = None
    """(steps,K,H,W) added to the logits: what leads back to a given image (see `edits.invert`)."""
    step: int = 0
    prediction: Tensor = field(init=False)
    """(H,W) the last draw, before re-noising: a preview."""
    _stacked: tuple[list[Prepared], Prepared] | None = field(init=False, default=None, repr=False)
    """Conditions that have shared a pass with those of this canvas before them, and their stack."""

    def __post_init__(self) -> None:
        self.prediction = self.tokens

    @property
    def done(self) -> bool:
        return self.step >= self.config.num_inference_steps


def start(
    num_labels: int,
    size: tuple[int, int],
    prompts: Sequence[Prepared],
    negative: Prepared,
    *,
    seed: int,
    config: SamplingConfig = MODEL_CARD,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    regions: Tensor | None = None,
) -> Canvas:
    """A canvas of random tokens, or of given (H,W) `tokens` at the first noise level; with a mask (H,W), only True is replaced.

    The source of the noise holds the kept tokens, so that re-noising leaves them as they are. Raises ValueError for a bad seed,
    and for a mask, regions or tokens of another size.
    """
    for name, value in (("tokens", tokens), ("mask", mask), ("regions", regions)):
        if value is not None and tuple(value.shape[-2:]) != size:
            raise ValueError(f"{name} have a grid of {tuple(value.shape[-2:])} tokens, but the picture has {size}")
    if len(prompts) != (1 if regions is None else len(regions)):
        raise ValueError(f"{len(prompts)} prompts need as many regions, but there are {0 if regions is None else len(regions)}")
    if mask is not None and tokens is None:
        raise ValueError("a mask needs the tokens that it keeps")
    source = random_tokens(seed, size, num_labels)
    if mask is not None and tokens is not None:
        source = torch.where(mask.cpu(), source, tokens.cpu())
    noised = source
    if tokens is not None:
        noised = renoise(tokens.cpu(), config.at(0).t, _rng(seed, 0, stream=1), source)
    device = negative.device
    return Canvas(
        seed=seed,
        config=config,
        prompts=tuple(prompts),
        negative=negative,
        tokens=noised.to(device),
        source=source.to(device),
        mask=None if mask is None else mask.to(device),
        regions=None if regions is None else regions.to(device),
    )


@torch.inference_mode()
def sample(
    model: Predictor,
    canvases: Sequence[Canvas],
    *,
    codebook: Codebook | None = None,
    on_step: Callable[[Sequence[Canvas]], None] | None = None,
) -> Tensor:
    """Take canvases of one size to their last step: (B,H,W) int64 tokens. Raises ValueError for several sizes.

    on_step is called after each step with the canvases that took it; their `prediction` is a preview.
    """
    if len(sizes := {tuple(canvas.tokens.shape) for canvas in canvases}) > 1:
        raise ValueError(f"the canvases have several sizes, {sorted(sizes)}: sample each size, or call step() yourself")
    while under_way := [canvas for canvas in canvases if not canvas.done]:
        step(model, under_way, codebook=codebook)
        if on_step:
            on_step(under_way)
    return torch.stack([canvas.tokens for canvas in canvases])


@torch.inference_mode()
def step(model: Predictor, canvases: Sequence[Canvas], *, codebook: Codebook | None = None) -> None:
    """Take each canvas one step further: predict, draw, re-noise."""
    for canvas, logits in predictions(model, canvases):
        now = canvas.config.at(canvas.step)
        drawn = choose(logits, canvas, now.temperature, codebook)
        canvas.prediction = drawn = drawn if canvas.mask is None else torch.where(canvas.mask, drawn, canvas.source)
        canvas.tokens = renoised(canvas, drawn, model.config.num_labels)
        canvas.step += 1


def renoised(canvas: Canvas, drawn: Tensor, num_labels: int) -> Tensor:
    """What the step after the canvas's present one starts from, given what this one has drawn: (H,W) → (H,W)."""
    now = canvas.config.at(canvas.step)
    if now.next_t == 0:
        return drawn
    rng = _rng(canvas.seed, canvas.step + 1, stream=1)
    return renoise(drawn, now.next_t, rng, noise_source(canvas, num_labels, rng))


def predictions(model: Predictor, canvases: Sequence[Canvas]) -> Iterator[tuple[Canvas, Tensor]]:
    """Each canvas with its guided logits (K,H,W): cfg · conditional + (1 − cfg) · unconditional."""
    for group in groups(canvases, next(iter(model.parameters()))):
        rows = [[*canvas.prompts, canvas.negative] if _guided(canvas) else [*canvas.prompts] for canvas in group]
        counts = [len(of_canvas) for of_canvas in rows]
        prepared = _stack(group, [row for of_canvas in rows for row in of_canvas])
        canvas_of = [canvas for canvas, of_canvas in zip(group, rows, strict=True) for _ in of_canvas]
        tokens = torch.stack([canvas.tokens for canvas in canvas_of])
        t = torch.tensor([canvas.config.at(canvas.step).t for canvas in canvas_of])
        logits = model(tokens, sent(t, tokens.device), prepared=prepared)
        for canvas, own in zip(group, logits.split(counts), strict=True):
            yield canvas, guide(own, canvas)


def _stack(group: Sequence[Canvas], rows: list[Prepared]) -> Prepared:
    """The conditions of a pass, which its first canvas keeps for the next step: they are the same as long as the group is."""
    before, stacked = group[0]._stacked or ([], None)
    if stacked is None or len(before) != len(rows) or any(old is not new for old, new in zip(before, rows, strict=True)):
        stacked = Prepared.stack(rows)
    for canvas in group:
        canvas._stacked = None
    group[0]._stacked = rows, stacked
    return stacked


def groups(canvases: Sequence[Canvas], weight: Tensor) -> list[Sequence[Canvas]]:
    """The canvases that share a pass of a model with such a weight: those of one size.

    In float32 on a CPU each has its own, because a matrix product of another size rounds otherwise: so its tokens are the
    same, bit for bit, in any company. That costs nothing there: what one image needs stays in the cache.
    """
    by_size: dict[torch.Size, list[Canvas]] = {}
    for canvas in canvases:
        by_size.setdefault(canvas.tokens.shape, []).append(canvas)
    made: list[Sequence[Canvas]] = []
    for size, same in by_size.items():
        number = len(same)
        if weight.device.type == "cpu":
            number = 1 if weight.dtype == torch.float32 else max(1, CPU_TOKENS // size.numel())
        made += [same[i : i + number] for i in range(0, len(same), number)]
    return made


def _guided(canvas: Canvas) -> bool:
    return canvas.config.at(canvas.step).cfg != 1


def guide(logits: Tensor, canvas: Canvas) -> Tensor:
    """One (K,H,W) prediction of those of a canvas: (R,K,H,W) of its prompts, (1,K,H,W) of the negative one behind them."""
    guided = logits[0]
    if canvas.regions is not None:
        guided = (logits[: len(canvas.prompts)] * canvas.regions[:, None].to(logits.dtype)).sum(0)
    if _guided(canvas):
        guided = torch.lerp(logits[-1], guided, canvas.config.at(canvas.step).cfg)
    return guided if canvas.residuals is None else guided + canvas.residuals[canvas.step]


def choose(logits: Tensor, canvas: Canvas, temperature: float, codebook: Codebook | None) -> Tensor:
    """A code per position by the canvas's settings: (K,H,W) → (H,W) int64."""
    config = canvas.config
    scores = logits.permute(1, 2, 0)  # (H,W,K): a view of what lies channels-last
    if config.choice == "argmax":
        return scores.argmax(-1)
    if config.choice == "nearest":
        if codebook is None:
            raise ValueError("choice='nearest' needs the VQGAN's codebook")
        mean = (scores.float() / temperature).softmax(-1) @ codebook.codebook.weight.float()  # (H,W,D)
        return codebook.nearest(mean.permute(2, 0, 1)[None])[0]
    scores = keep_likely(scores, top_k=config.top_k, top_p=config.top_p, typical_p=config.typical_p)
    uniform = _rng(canvas.seed, canvas.step + 1).random(tuple(scores.shape[:2]), dtype=np.float32)
    return draw(scores, sent(torch.from_numpy(uniform), scores.device), temperature)


def noise_source(canvas: Canvas, num_labels: int, rng: np.random.Generator) -> Tensor:
    """The (H,W) tokens that re-noising puts in."""
    if canvas.config.renoise_from == "start":
        return canvas.source
    source = canvas.tokens  # those before the step
    if canvas.config.renoise_from == "fresh":
        source = sent(torch.from_numpy(rng.integers(num_labels, size=tuple(source.shape))), source.device)
    return source if canvas.mask is None else torch.where(canvas.mask, source, canvas.source)


def renoise(tokens: Tensor, t: float, rng: np.random.Generator, source: Tensor) -> Tensor:
    """Replace a share t of (H,W) tokens by those of source."""
    uniform = sent(torch.from_numpy(rng.random(tuple(tokens.shape), dtype=np.float32)), tokens.device)
    return torch.where(uniform <= t, source, tokens)


def random_tokens(seed: int, size: tuple[int, int], num_labels: int) -> Tensor:
    """The start noise of an image: (H,W) int64."""
    return torch.from_numpy(_rng(seed, 0).integers(num_labels, size=size))


def sent(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: a wait would be one for every pass that is under way there."""
    return values.to(device, non_blocking=True)


def _rng(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """Philox is counter-based: any (seed, step, stream) is reached at once, on every machine alike."""
    require(0 <= seed <= MAX_SEED, "seed", seed, f"0 to {MAX_SEED}")
    key = _Key(seed, 2 * step + stream)
    return np.random.Generator(np.random.Philox(key))  # type: ignore[arg-type]  # any ISeedSequence is taken


class _Key(ISeedSequence):
    """A key of Philox as it is; as `key=`, numpy asks the system for entropy first, which takes longer than the draws."""

    def __init__(self, *words: int) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return np.array(self.words, dtype)


@functools.lru_cache(maxsize=1000)
def _schedule(values: tuple[float, ...], number: int) -> list[float]:
    """A schedule of `number` values that is given whole, by its ends, or by one.

    Rounded as torch rounds: the embedding of t takes its product with 10,000, where the last bit of t shows.
    """
    if len(values) != number:
        return torch.linspace(values[0], values[-1], number).tolist()
    return torch.tensor(values).tolist()
