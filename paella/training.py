"""What a training step needs: the trained module, its random numbers, loss and metrics, the learning-rate schedule.

B batch of one worker, H W token grid, K codes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paella.blocks import Attention2d, ResBlock
from paella.conditioning import TextEncoders
from paella.config import ModelConfig
from paella.levels import LevelBalance, means_by_level, sums_by_level
from paella.lora import PREFIX as ADAPTER_PREFIX
from paella.muon import Muon
from paella.objective import add_noise, add_own_token, loss_weight
from paella.own_draws import OwnDraws, chosen
from paella.prior import PriorBlock
from paella.unet import Paella

BATCH_SEED, LEVELS_SEED = 2**63, 2**63 + 2**62
"""Added to the seed for what is drawn once a batch, so that no sample's random numbers are met again."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, Muon beside it where wanted, and their schedule."""

    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    matrix_lr: float | None = None
    """Peak learning rate of Muon, which then steps the matrices of the blocks; if not given, AdamW steps everything."""
    text_lr_share: float = 1.0
    """Learning rate of a text encoder that was loaded (`train --text`), as a share of lr. Below 1 keeps what `train_text` has
    taught it: the first gradients of a new U-Net, which cannot use that yet, would undo it. 0 leaves the encoder as it is."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up."""
    final_lr_fraction: float = 1.0
    """Cosine decay to this share of the peak at the last step; 1 keeps it constant."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the gradient's running mean and square in AdamW."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        for name in ("lr", "matrix_lr"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"optim.{name}={value} is not allowed: above 0")
        for name in ("final_lr_fraction", "text_lr_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} is not allowed: 0 to 1")

    def optimizers(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
        """The optimizers of a model's trained parameters; `set_lr` before each step. dtype is that of Muon's products."""
        matrices = [] if self.matrix_lr is None else block_matrices(model)
        chosen = set(matrices)
        others = {name: each for name, each in model.named_parameters() if each.requires_grad and each not in chosen}
        text = {name: each for name, each in others.items() if name.startswith("text.") and self.text_lr_share < 1}
        groups: list[dict[str, Any]] = [{"params": [each for name, each in others.items() if name not in text]}]
        if text:
            groups.append({"params": list(text.values()), "lr_share": self.text_lr_share})
        made: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True)
        ]
        if matrices and self.matrix_lr is not None:  # LoRA leaves none
            made.append(Muon(matrices, lr=self.matrix_lr, weight_decay=self.weight_decay, dtype=dtype))
        return made

    def set_lr(self, optimizers: Sequence[torch.optim.Optimizer], step: int, num_steps: int) -> float:
        """Set the learning rates of a step; returns AdamW's."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        factor = warmup * (self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine)
        for optimizer in optimizers:
            peak = self.matrix_lr if isinstance(optimizer, Muon) else self.lr
            assert peak is not None
            for group in optimizer.param_groups:
                group["lr"] = peak * factor * group.get("lr_share", 1.0)
        return self.lr * factor


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained weight matrices of the U-Net's MLPs and attention, or of the prior's blocks: what Muon is for."""
    blocks = [module for module in model.modules() if isinstance(module, ResBlock | Attention2d | PriorBlock)]
    named = [item for block in blocks for item in block.named_parameters() if item[1].ndim == 2 and item[1].requires_grad]
    return [parameter for name, parameter in named if ADAPTER_PREFIX not in name]


class TextToTokens(nn.Module):
    """U-Net and text encoder as one module, so that they shard, train and average together.

    An encoder that is not trained is used, but no part of the module: it is neither sharded nor averaged nor saved.
    Nor is CLIP, whose embeddings come with the tokens.

    Args:
        device, text_dtype: of an encoder that is not trained.
        text_root: directory in which an encoder's relative name starts.
        balance: whether losses are balanced by noise level.
    """

    text: TextEncoders

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: str | torch.device = "cpu",
        text_dtype: torch.dtype | None = None,
        text_root: str | Path = ".",
        balance: bool = False,
    ) -> None:
        super().__init__()
        self.config = config.unet
        self.unet = Paella(config.unet)
        self.balance = LevelBalance() if balance else None  # here, so that a checkpoint has its means
        # what no loss reaches must not be in the optimizer: its state would never come to be, and a resume would miss it
        for mapper in (self.unet.clip_mapper, self.unet.clip_image_mapper):
            mapper.requires_grad_(config.text.clip is not None)
        text = dataclasses.replace(config.text, clip=None)
        if text.trained:
            self.text = TextEncoders.to_train(text, text_root)
        else:
            loaded = TextEncoders.load(text, text_root, device=device, dtype=text_dtype).requires_grad_(False)
            object.__setattr__(self, "text", loaded)  # past nn.Module's registry

    def forward(self, *inputs: Any) -> Tensor:
        """Logits (B,K,H,W) of the inputs of `_features`."""
        tokens, t, *_ = inputs
        return self.unet.logits(self._features(*inputs), tokens, t)

    def losses(
        self, targets: Tensor, *inputs: Any, label_smoothing: float, chunk: int | None = None, compiled: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What `forward` of the same inputs loses on targets (B,H,W): the cross-entropy of each token, (B·H·W,) float32, and
        whether its likeliest code is right.

        With a chunk no more than that many tokens have logits at the same time; the backward pass computes them again. Compiled,
        they are read once for all that is made of them.
        """
        of_tokens = _compiled_token_losses() if compiled else _token_losses
        features = self._features(*inputs)
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)  # (B·H·W,c_out), a view
        if chunk is not None:
            of_tokens = functools.partial(checkpoint, of_tokens, use_reentrant=False)
        of_rows = [rows, targets.flatten()]
        if self.config.leave_one_out:
            tokens, t, *_ = inputs
            of_rows += [tokens.flatten(), t[:, None, None].expand_as(tokens).flatten()]
        pieces = zip(*(values.split(chunk or len(rows)) for values in of_rows), strict=True)
        parts = [of_tokens(self.unet.out_mapper, label_smoothing, *piece) for piece in pieces]
        losses, right = (torch.cat(values) for values in zip(*parts, strict=True))
        return losses, right

    def _features(
        self,
        tokens: Tensor,
        t: Tensor,
        text: Tensor,
        mask: Tensor,
        keep: Keep,
        clip: Tensor | None = None,
        clip_image: Tensor | None = None,
    ) -> Tensor:
        """Features (B,C,H,W) of tokens (B,H,W) at t (B,), text, which is ids (B,S) of captions or their states (B,S,D), its mask
        (B,S), clip and clip_image (B,D).

        What is not kept is zeros (text) or not attended to (image embeddings), as in sampling without it.
        """
        states = text if text.is_floating_point() else self.text.states(text, mask)
        states = states * keep.caption[:, None, None]
        if clip is not None and clip_image is not None:
            number = self.config.clip_seq_len
            heard = mask.new_ones(len(mask), number)
            mask = torch.cat([mask, heard, keep.clip_image[:, None].expand(-1, number)], dim=1)
            clip = clip * (keep.caption & keep.clip)[:, None]
        return self.unet.features(tokens, t, byt5=states, byt5_mask=mask, clip=clip, clip_image=clip_image)


def _token_losses(
    out_mapper: nn.Sequential,
    label_smoothing: float,
    features: Tensor,
    targets: Tensor,
    tokens: Tensor | None = None,
    t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and whether the likeliest code is right, of tokens with features (N,C) and targets (N,): both (N,).

    tokens and t are the noised tokens (N,) and their noise levels (N,) of a leave-one-out U-Net; of another they are not given.
    """
    norm, classifier = out_mapper[0], out_mapper[1]
    rows = norm(features[:, :, None, None]).flatten(1)  # (N,C), a view
    # as a convolution, the classifier would be given copies and give its logits the other way round
    logits = F.linear(rows, next(classifier.parameters()).flatten(1)).float()  # (N,K)
    if tokens is not None and t is not None:
        logits = add_own_token(logits, tokens, t)
    losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    logits = logits.detach()
    # no other code is as likely: where all logits are equal, as at the start, nothing is right. argmax is far slower on a CPU
    return losses, (logits >= logits.gather(1, targets[:, None])).sum(1) == 1


@functools.cache
def _compiled_token_losses() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_token_losses)


@dataclass(frozen=True)
class Keep:
    """Which conditions each image of a batch sees: caption, clip and clip_image are (B,) bool.

    Without its caption an image sees no CLIP text either, so that guidance has its other half.
    """

    caption: Tensor
    clip: Tensor
    clip_image: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Keep:
        return Keep(self.caption[rows], self.clip[rows], self.clip_image[rows])

    def to(self, device: torch.device) -> Keep:
        return Keep(*(value.to(device, non_blocking=True) for value in (self.caption, self.clip, self.clip_image)))


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """What is taken away from tokens and conditions in training, and what a noise level counts."""

    t_scale: float = 1.08
    """Noise levels are uniform up to this, cut at 1: a share 1 - 1/t_scale of the images is all noise (published: 1.08)."""
    final_t_scale: float | None = None
    """The same at the last step, linear in between; t_scale throughout if not given. High levels teach what is where, low ones
    outlines."""
    stratified: bool = False
    """Spread a batch's noise levels evenly over their range instead of drawing each for itself."""
    balance: float = 0.0
    """Each image's loss is divided by the mean loss at its noise level, to this power: 1 makes all levels count alike, 0 is
    published."""
    final_balance: float | None = None
    """The same at the last step, linear in between; balance throughout if not given."""
    own_draws: float = 0.0
    """Share of the images that are noised from the model's own draw instead of from the truth."""
    own_draws_ahead: float = 1 / 6
    """The draw is made at a noise level up to this much higher."""
    drop_caption: float = 0.05
    """Share of images without their caption, for classifier-free guidance."""
    keep_clip: float = 0.1
    """Of a model with CLIP: share of the captions that come with their CLIP embedding."""
    keep_clip_image: float = 0.1
    """Of a model with CLIP: share of images with the CLIP embedding of the image itself."""
    drop_by: str = "sample"
    """What the conditions are kept or taken from as one: each sample for itself, or the whole batch of a step (published)."""

    def __post_init__(self) -> None:
        for name in ("t_scale", "final_t_scale"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= 10:
                raise ValueError(f"noise.{name}={value} is not allowed: 1 to 10")
        if self.final_balance is not None and not (self.balance > 0 and 0 <= self.final_balance <= 1):
            raise ValueError(f"noise.final_balance={self.final_balance} is not allowed: 0 to 1, with a balance above 0")
        for name in ("balance", "own_draws", "own_draws_ahead", "drop_caption", "keep_clip", "keep_clip_image"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"noise.{name}={getattr(self, name)} is not allowed: 0 to 1")
        if self.drop_by not in ("sample", "batch"):
            raise ValueError(f"noise.drop_by={self.drop_by!r} is not allowed: sample or batch")

    def at(self, progress: float) -> NoiseConfig:
        """The settings where this share of the run is done, 0 to 1."""
        t_scale, balance = (
            first if last is None else first + progress * (last - first)
            for first, last in ((self.t_scale, self.final_t_scale), (self.balance, self.final_balance))
        )
        return dataclasses.replace(self, t_scale=t_scale, final_t_scale=None, balance=balance, final_balance=None)

    @property
    def own_share(self) -> Fraction:
        """`own_draws` as a ratio of whole numbers, by which counting never rounds."""
        return Fraction(self.own_draws).limit_denominator()


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step: t (B,), noised (B,H,W), weight (B,H,W), which conditions are kept, and what images that are
    noised from the model's own draw need for it."""

    t: Tensor
    noised: Tensor
    weight: Tensor
    keep: Keep
    own: OwnDraws | None = None

    def __getitem__(self, rows: slice) -> Draws:
        own = None if self.own is None else self.own[rows]
        return Draws(self.t[rows], self.noised[rows], self.weight[rows], self.keep[rows], own)

    def to(self, device: torch.device) -> Draws:
        t, noised, weight = (value.to(device, non_blocking=True) for value in (self.t, self.noised, self.weight))
        return Draws(t, noised, weight, self.keep.to(device), None if self.own is None else self.own.to(device))


def draw_noise(
    tokens: Tensor,
    num_labels: int,
    seed: int,
    samples: Sequence[int],
    config: NoiseConfig,
    step: int = 0,
    global_batch_size: int | None = None,
) -> Draws:
    """Noise of each image from its own number in the run, so that it does not depend on the number of workers.

    Args:
        tokens: (B,H,W) clean tokens.
        samples: for each image, step · global batch size + its place in the global batch.
        step: what is drawn once a batch is drawn from this.
        global_batch_size: over which noise levels are stratified; these images alone if not given.
    """
    shape = tuple(tokens.shape[1:])
    rngs = [np.random.Generator(np.random.Philox(key=[seed, sample])) for sample in samples]
    t, *kept = _uniform(rngs, (4,)).T
    uniform = _uniform(rngs, shape)
    random_tokens = torch.from_numpy(np.stack([rng.integers(num_labels, size=shape) for rng in rngs]))
    if config.stratified:
        t = _stratified(t, samples, _batch_rng(seed + LEVELS_SEED, step), global_batch_size or len(samples))
    t = ((1 - t) * config.t_scale).clamp(0.001, 1)
    mask = (uniform <= t[:, None, None]).long()
    noised, _ = add_noise(tokens, t, mask=mask, random_tokens=random_tokens)
    if config.drop_by == "batch":
        numbers = _batch_rng(seed + BATCH_SEED, step).random((3, 1), dtype=np.float32)
        kept = list(torch.from_numpy(numbers).expand(3, len(t)))
    keep = Keep(kept[0] >= config.drop_caption, kept[1] < config.keep_clip, kept[2] < config.keep_clip_image)
    draws = Draws(t, noised, loss_weight(t, mask), keep)
    if config.own_draws == 0:
        return draws
    return _with_own_draws(draws, tokens, mask, random_tokens, rngs, chosen(samples, config.own_share), config.own_draws_ahead)


def _with_own_draws(
    draws: Draws,
    tokens: Tensor,
    mask: Tensor,
    random_tokens: Tensor,
    rngs: Sequence[np.random.Generator],
    rows: Tensor,
    ahead: float,
) -> Draws:
    """The same draws where the images in rows (B,) bool are to be noised from the model's own draw."""
    shape = tuple(tokens.shape[1:])
    share_ahead, again, uniform = _uniform(rngs, ()), _uniform(rngs, shape), _uniform(rngs, shape)
    t = (draws.t + ahead * share_ahead).clamp(max=1)
    noised, _ = add_noise(tokens, t, mask=again <= t[:, None, None], random_tokens=random_tokens)
    weight = torch.where(rows[:, None, None], 1.0, draws.weight)  # a token that is kept may be wrong there
    return dataclasses.replace(draws, weight=weight, own=OwnDraws(rows, t, noised, uniform, mask))


def _uniform(rngs: Sequence[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    """The next numbers in [0, 1) of each image: (B,*shape) float32."""
    return torch.from_numpy(np.stack([rng.random(shape, dtype=np.float32) for rng in rngs]))


def _batch_rng(seed: int, step: int) -> np.random.Generator:
    """Of what is drawn once a batch, alike on all workers."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))


def _stratified(uniform: Tensor, samples: Sequence[int], rng: np.random.Generator, batch_size: int) -> Tensor:
    """Numbers in [0, 1) of samples: a batch has one in each of batch_size equal parts, at its uniform (B,) place there."""
    parts = torch.from_numpy(rng.permutation(batch_size))[[sample % batch_size for sample in samples]]
    return (parts + uniform) / batch_size


def loss_and_metrics(
    losses: Tensor, right: Tensor, draws: Draws, balance: LevelBalance | None = None, power: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and sums for its metrics, from what `TextToTokens.losses` returns.

    Args:
        power: `NoiseConfig.balance` at this step.

    Returns:
        the mean loss, balanced where there is a balance, and (2 + 2·NUM_BUCKETS,) sums: accuracy, plain loss, then loss and
        number of images by noise level.
    """
    per_image = (losses.view_as(draws.weight) * draws.weight).sum((1, 2)) / draws.weight.sum((1, 2))  # (B,)
    loss = per_image.mean()
    with torch.no_grad():
        sums = torch.cat([torch.stack([right.float().mean(), loss]), sums_by_level(draws.t, per_image)])
    return loss if balance is None else balance(draws.t, per_image, power), sums


def metrics_of(sums: Tensor, num_steps: int) -> dict[str, float]:
    """Named means from the sums of `loss_and_metrics` over num_steps steps."""
    accuracy, loss = (sums[:2] / num_steps).tolist()
    return {"loss": loss, "accuracy": accuracy} | means_by_level(sums[2:])
