"""One optimizer step of the U-Net on this worker's slice of a global batch, in one part or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from paella.parallel import sum_gradients_with
from paella.training import Draws, TextToTokens, draw_noise, loss_and_metrics
from pipelines import loop
from pipelines.recovery import Guard
from pipelines.token_dataset import TokenBatch
from pipelines.train_config import TrainConfig


def train_step(
    model: TextToTokens,
    optimizers: loop.Optimizers,
    config: TrainConfig,
    step: int,
    batch: TokenBatch,
    device: torch.device,
    guard: Guard,
) -> tuple[Tensor, float, float]:
    """Forward, backward, update unless the guard forbids.

    Returns the metrics' sums, as a mean over parts and so the same on any number of workers, the gradient's norm, the rate.
    """
    lr = config.optim.set_lr(optimizers, step, config.steps)
    numbers = loop.sample_numbers(step, config.global_batch_size)
    tokens, num_labels = torch.from_numpy(batch.tokens), config.model.unet.num_labels
    noise = config.noise.at(step / config.steps)
    draws = draw_noise(tokens, num_labels, config.seed, numbers, noise, step, config.global_batch_size)
    size = config.part_size(len(batch.ids))
    num_parts = len(batch.ids) // size
    total = torch.zeros((), device=device)
    parts = split(model, batch, draws, size, device)
    for index, (targets, inputs, part) in enumerate(parts):
        sum_gradients_with(model, index == num_parts - 1, config.parallel)
        if part.own is not None:
            inputs[0] = part.own.renoised(model, *inputs)
        loss, sums = forward(model, config, targets, inputs, part, noise.balance)
        (loss / num_parts).backward()
        total = total + sums / num_parts
    norm = loop.update(model, optimizers, total[1], config.optim.grad_clip, guard)
    if model.balance is not None:
        model.balance.update(step, counts=not guard.refused)
    return total, norm, lr


def forward(
    model: TextToTokens, config: TrainConfig, targets: Tensor, inputs: list, draws: Draws, balance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of a part of a batch, balanced by noise level to this power, and the sums for its metrics."""
    parallel = config.parallel
    losses, right = model.losses(
        targets, *inputs, label_smoothing=config.label_smoothing, chunk=parallel.loss_chunk, compiled=parallel.compile
    )
    return loss_and_metrics(losses, right, draws, model.balance, balance)


def split(
    model: TextToTokens, batch: TokenBatch, draws: Draws, size: int, device: torch.device
) -> Iterator[tuple[Tensor, list, Draws]]:
    """Parts of a batch, each of `size` images, on the device: targets (B,H,W), the model's inputs, their share of the draws.

    Texts are padded to the longest of their part, so that a part is the same, to the last bit, whichever batch it is a part of.
    """
    clip: tuple[Tensor, ...] = ()
    if batch.clip is not None:
        keep, complete = draws.keep, torch.from_numpy(batch.clip.complete)
        keep = dataclasses.replace(keep, clip=keep.clip & complete, clip_image=keep.clip_image & complete)
        draws = dataclasses.replace(draws, keep=keep)
        clip = (torch.from_numpy(batch.clip.text), torch.from_numpy(batch.clip.image))
    tokens = torch.from_numpy(batch.tokens)
    for first in range(0, len(tokens), size):
        part = slice(first, first + size)
        mine = draws[part].to(device)
        inputs = [value.to(device, non_blocking=True) for value in (*text_of(model, batch, part), *(each[part] for each in clip))]
        yield tokens[part].to(device, non_blocking=True), [mine.noised, mine.t, *inputs[:2], mine.keep, *inputs[2:]], mine


def text_of(model: TextToTokens, batch: TokenBatch, part: slice) -> tuple[Tensor, Tensor]:
    """Padded ids (B,S) of captions, or their states (B,S,D) where the batch has them; and a mask (B,S), True where one counts."""
    if batch.states is None:
        text = model.text.tokenize(batch.captions[part])
        return text.ids, text.mask
    states = [torch.from_numpy(each.copy()) for each in batch.states[part]]
    lengths = torch.tensor([len(each) for each in states])
    padded = pad_sequence(states, batch_first=True).to(next(model.text.parameters()).dtype)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
