"""What else Paella can do: variations, blends, regions, in- and outpainting, structural and inverted edits, interpolation.

Every mode is a free function that makes a `Canvas`; `sampler.sample()` takes canvases of all modes to their ends together:

    canvas = inpaint(bundle, image, mask, "a red circle", seed=1)
    tokens = sample(bundle.unet, [canvas])

Images are (3,H,W) in [0,1], masks (H,W) in pixels, True where the picture is made anew. h w is the token grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from paella.bundle import Bundle
from paella.sampler import MODEL_CARD, Canvas, SamplingConfig, renoised, start
from paella.unet import Prepared

Size = tuple[int, int]  # width, height in pixels
LOG_ZERO = -30.0
"""Stands for the logarithm of no probability in an inversion's residuals."""


def text_to_image(
    bundle: Bundle,
    prompt: str,
    *,
    seed: int,
    size: Size | None = None,
    negative_prompt: str | None = None,
    config: SamplingConfig = MODEL_CARD,
) -> Canvas:
    """A picture of a prompt; an empty prompt gives what the training images have in common."""
    conditions = bundle.conditions(prompt, seed=seed)
    return bundle.canvas(conditions, bundle.negative(conditions, negative_prompt), size=size, seed=seed, config=config)


def variation(bundle: Bundle, image: Tensor, prompt: str = "", *, weight: float = 1.0, **settings) -> Canvas:
    """A picture that CLIP sees as it sees the image; `weight` scales the attention to it. Needs a model with CLIP images."""
    return blend(bundle, [image], [weight], prompt, **settings)


def blend(
    bundle: Bundle,
    images: Sequence[Tensor],
    weights: Sequence[float],
    prompt: str = "",
    *,
    text_weight: float = 1.0,
    seed: int,
    size: Size | None = None,
    negative_prompt: str | None = None,
    config: SamplingConfig = MODEL_CARD,
) -> Canvas:
    """A picture of several images and a text: each image adds its conditioning tokens, whose attention its weight scales.

    `text_weight` scales the attention to the tokens of the text.
    """
    if len(images) != len(weights) or not images:
        raise ValueError(f"{len(images)} images need as many weights, at least one, but there are {len(weights)} weights")
    embeddings = bundle.clip_image_embeddings(images)[None]  # (1,M,D)
    conditions = bundle.conditions(prompt, clip_image=embeddings)
    factors = torch.tensor(weights, device=embeddings.device).repeat_interleave(bundle.config.unet.clip_seq_len)
    if text_weight != 1:
        of_text = conditions["byt5"].shape[1] + bundle.config.unet.clip_seq_len * ("clip" in conditions)
        factors = torch.cat([torch.full((of_text,), text_weight, device=factors.device), factors])
    negative = bundle.negative(conditions, negative_prompt)
    return bundle.canvas({**conditions, "attn_weights": factors}, negative, size=size, seed=seed, config=config)


def regions(
    bundle: Bundle,
    prompts: Sequence[str],
    masks: Sequence[Tensor],
    *,
    seed: int,
    size: Size | None = None,
    config: SamplingConfig = MODEL_CARD,
) -> Canvas:
    """Several prompts in one picture, each where its mask is; masks (H,W) of weights may overlap, and must cover everything."""
    if len(prompts) != len(masks):
        raise ValueError(f"{len(prompts)} prompts need as many masks, but there are {len(masks)}")
    grid = bundle.config.grid(*(size or bundle.default_size))
    shares = torch.stack([F.adaptive_avg_pool2d(mask.float()[None], grid)[0] for mask in masks])  # (R,h,w)
    if not bool((shares.sum(0) > 0).all()):
        raise ValueError("the regions leave a part of the picture without a prompt")
    conditions = [bundle.conditions(prompt, seed=seed) for prompt in prompts]
    prepared = [bundle.unet.prepare(**values) for values in conditions]
    negative = bundle.unet.prepare(**bundle.negative(conditions[0], None))
    labels = bundle.config.unet.num_labels
    return start(labels, grid, prepared, negative, seed=seed, config=config, regions=shares / shares.sum(0))


def inpaint(
    bundle: Bundle,
    image: Tensor,
    mask: Tensor,
    prompt: str,
    *,
    seed: int,
    negative_prompt: str | None = None,
    config: SamplingConfig = MODEL_CARD,
) -> Canvas:
    """The image with the masked part made anew; a token is made anew as soon as one of its pixels is masked.

    Raises ValueError for a mask of another size than the image, or one that is empty.
    """
    if mask.shape != image.shape[-2:]:
        raise ValueError(f"the mask has {tuple(mask.shape)} pixels, but the image has {tuple(image.shape[-2:])}")
    if not bool(mask.any()):
        raise ValueError("the mask is empty: nothing would change")
    conditions = bundle.conditions(prompt, seed=seed)
    negative = bundle.negative(conditions, negative_prompt)
    made_anew = token_mask(bundle, mask)
    return bundle.canvas(conditions, negative, seed=seed, config=config, tokens=bundle.encode(image), mask=made_anew)


def outpaint(
    bundle: Bundle,
    image: Tensor,
    margins: tuple[int, int, int, int],
    prompt: str,
    *,
    seed: int,
    negative_prompt: str | None = None,
    config: SamplingConfig = MODEL_CARD,
) -> Canvas:
    """The image continued to the left, right, top and bottom by so many pixels, multiples of a token's side."""
    factor = bundle.config.vqgan.downsampling
    if any(margin < 0 or margin % factor for margin in margins) or not any(margins):
        raise ValueError(f"margins={margins} are not allowed: multiples of {factor} from 0, one of them above 0")
    left, right, top, bottom = (margin // factor for margin in margins)
    tokens = F.pad(bundle.encode(image), (left, right, top, bottom))
    height, width = tokens.shape
    bundle.config.grid(width * factor, height * factor)  # raises ValueError for a size that the model cannot make
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[top : height - bottom, left : width - right] = False
    conditions = bundle.conditions(prompt, seed=seed)
    negative = bundle.negative(conditions, negative_prompt)
    return bundle.canvas(conditions, negative, seed=seed, config=config, tokens=tokens, mask=mask)


def restyle(
    bundle: Bundle,
    image: Tensor,
    prompt: str,
    *,
    strength: float = 0.6,
    seed: int,
    negative_prompt: str | None = None,
    config: SamplingConfig = MODEL_CARD,
) -> Canvas:
    """A structural edit: start from the image's tokens of which a share `strength` is noise, and keep its layout."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} is not allowed: above 0, at most 1")
    conditions = bundle.conditions(prompt, seed=seed)
    negative = bundle.negative(conditions, negative_prompt)
    config = dataclasses.replace(config, noise=(strength, 0.0))
    return bundle.canvas(conditions, negative, seed=seed, config=config, tokens=bundle.encode(image))


def edit(
    bundle: Bundle,
    image: Tensor,
    source_prompt: str,
    prompt: str,
    *,
    keep: float = 0.7,
    strength: float = 0.9,
    seed: int,
    config: SamplingConfig = MODEL_CARD,
) -> Canvas:
    """An edit by discrete inversion (DICE, arXiv 2410.08207): what the model lacked to see the image is replayed under `prompt`.

    Args:
        source_prompt: what the image shows now.
        keep: share of the residuals that is replayed, 0 to 1; with 1 and the same prompt the image comes back, token by token.
        strength: noise level to start from, as in `restyle`.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep={keep} is not allowed: 0 to 1")
    canvas = restyle(bundle, image, prompt, strength=strength, seed=seed, config=config)
    source = bundle.unet.prepare(**bundle.conditions(source_prompt))
    canvas.residuals = keep * invert(bundle, canvas, bundle.encode(image), source)
    return canvas


@torch.inference_mode()
def invert(bundle: Bundle, canvas: Canvas, tokens: Tensor, source: Prepared) -> Tensor:
    """Residuals (steps,K,h,w) that lead a canvas's predictions under the source prompt to the given (h,w) tokens.

    The tokens are noised as the canvas will be at each of its steps; a residual is the logarithm of the tokens' one-hot
    distribution (with `LOG_ZERO` for the other codes) less that of the prediction.
    """
    num_labels = bundle.config.unet.num_labels
    one_hot = F.one_hot(tokens, num_labels).permute(2, 0, 1)  # (K,h,w)
    wanted = (1 - one_hot) * LOG_ZERO
    residuals, replay = [], dataclasses.replace(canvas)
    while not replay.done:
        t = torch.tensor([replay.config.at(replay.step).t], device=tokens.device)
        logits = bundle.unet(replay.tokens[None], t, prepared=source)[0]
        # bounded, so that a code which the model thinks all but impossible does not gain by it
        residuals.append(wanted - logits.float().log_softmax(0).clamp(min=LOG_ZERO / 2))
        replay.tokens = renoised(replay, tokens, num_labels)
        replay.step += 1
    return torch.stack(residuals)


def interpolate(bundle: Bundle, first: str, second: str, share: float, **settings) -> Canvas:
    """A picture between two prompts: `share` of every prediction is of the second. One seed makes a smooth row."""
    _check_share(share)
    width, height = settings.get("size") or bundle.default_size
    masks = [torch.full((height, width), value) for value in (1 - share, share)]
    return regions(bundle, [first, second], masks, **settings)


def interpolate_images(bundle: Bundle, first: Tensor, second: Tensor, share: float, prompt: str = "", **settings) -> Canvas:
    """A picture between two images: on the arc between their CLIP embeddings."""
    _check_share(share)
    embeddings = bundle.clip_image_embeddings([first, second])
    ends = embeddings.float()
    angle = torch.acos(F.cosine_similarity(ends[0], ends[1], dim=0).clamp(-1, 1))
    if angle < 1e-3:
        between = ends[0].lerp(ends[1], share)
    else:
        between = (torch.sin((1 - share) * angle) * ends[0] + torch.sin(share * angle) * ends[1]) / torch.sin(angle)
    conditions = bundle.conditions(prompt, clip_image=between[None].to(embeddings.dtype))
    negative = bundle.negative(conditions, settings.pop("negative_prompt", None))
    return bundle.canvas(conditions, negative, **settings)


def token_mask(bundle: Bundle, mask: Tensor) -> Tensor:
    """(h,w) True where a token has a pixel of the mask (H,W)."""
    return F.max_pool2d(mask.float()[None], bundle.config.vqgan.downsampling)[0] > 0


def paste(original: Tensor, made: Tensor, mask: Tensor, feather: int = 8) -> Tensor:
    """The original's own pixels outside of the mask, with a seam of `feather` pixels: (3,H,W), (3,H,W), (H,W) → (3,H,W).

    The seam lies inside the mask, so that every pixel outside is exactly the original's.
    """
    share = mask.float()
    if feather > 0:
        padded = F.pad(1 - share[None, None], [feather] * 4, mode="replicate")
        outside = F.max_pool2d(padded, 2 * feather + 1, stride=1)  # the outside, grown by the feather
        blurred = F.avg_pool2d(F.pad(1 - outside, [feather] * 4, mode="replicate"), 2 * feather + 1, stride=1)[0, 0]
        share = torch.where(mask.bool(), blurred, 0.0)
    return torch.lerp(original, made.to(original.dtype), share)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not allowed: 0 to 1")
