"""Validation in a training run: the averaged weights' loss on rows that training never sees, always under the same noise.

The workers do it together, between two steps, with the weights as they are sharded. An image costs a third of what it costs in
training; 2,048 of them every 5,000 steps of 2,048 images are 0.007 % of the run.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from paella.ema import Ema
from paella.images import contact_sheet, to_uint8
from paella.objective import add_noise, loss_weight
from paella.parallel import evaluating, mean_over_workers
from paella.training import Draws, Keep, TextToTokens, metrics_of
from paella.vqgan import VQModel
from pipelines import tracking
from pipelines.text_stage import TextStage
from pipelines.token_dataset import TokenDataset
from pipelines.train_config import TrainConfig
from pipelines.train_step import forward, split

SHOWN = 8
"""Images on a sheet of reconstructions."""
SHOWN_LEVELS = (0.5, 0.75, 0.9)
"""Noise levels from which they are reconstructed, in one pass."""


class Validation:
    """Loss, accuracy and loss by noise level on the held-out rows, and sheets of what the model makes of their noised tokens.

    Image i of n is at noise level (i + ½) / n, whatever the step, so that the curve shows the weights alone. Conditions are those
    of sampling: the caption and, where the model has CLIP, its embedding. Every method is to be called by every worker.
    """

    def __init__(
        self, config: TrainConfig, vqgan: VQModel, mlflow_run: tracking.Run, device: torch.device, text_stage: TextStage
    ) -> None:
        self.config, self.vqgan, self.mlflow_run, self.device = config, vqgan, mlflow_run, device
        rank, world_size = dist.get_rank(), dist.get_world_size()
        dataset = TokenDataset(config.data, hold_out=config.validation_images)
        draws = fixed_noise(dataset.held_out().tokens, config.model.unet.num_labels)
        share = dataset.num_held_out // world_size
        mine = slice(rank * share, (rank + 1) * share)
        columns = {"clip": config.model.text.clip is not None, "states": config.stored_text}
        self.batch, self.draws = text_stage.encode(dataset.held_out(mine, **columns)), draws[mine]
        self.shown = text_stage.encode(dataset.held_out(slice(SHOWN), **columns))
        self.logged = tracking.last_step(mlflow_run, "validation_loss") if rank == 0 else 0

    def measure(self, model: TextToTokens, ema: Ema, step: int) -> float | None:
        """Log the numbers and the sheet after `step` steps, unless that has been done before a restart; returns the loss."""
        if not self.batch.ids:
            return None
        began = time.monotonic()
        with ema.swapped_into(model), evaluating(model):
            values = metrics_of(mean_over_workers(self._sums(model)).cpu(), 1)
            images = self._reconstructions(model)
        loss = values["loss"]
        if dist.get_rank() == 0 and step > self.logged:
            values["s"] = time.monotonic() - began
            tracking.log_metrics(self.mlflow_run, {f"validation_{name}": value for name, value in values.items()}, step)
            tracking.log_image(self.mlflow_run, images, "reconstructions", step)
        return loss

    def _sums(self, model: TextToTokens) -> Tensor:
        """Means and sums by level over this worker's images, in parts as large as those of training."""
        num_images = len(self.batch.ids)
        total = torch.zeros((), device=self.device)
        for targets, inputs, draws in split(model, self.batch, self.draws, self.config.images_per_pass, self.device):
            _, sums = forward(model, self.config, targets, inputs, draws)
            sums[:2] *= len(targets) / num_images
            total = total + sums
        return total

    def _reconstructions(self, model: TextToTokens) -> Image.Image:
        """Rows of images: the tokens themselves, then for each noise level what the model sees and what it makes of it."""
        tokens = torch.from_numpy(self.shown.tokens)
        grids, captions = [tokens], ["tokens"]
        for level in SHOWN_LEVELS:
            draws = noise_at(tokens, torch.full((len(tokens),), level), self.config.model.unet.num_labels)
            (_, inputs, _), *_ = split(model, self.shown, draws, len(tokens), self.device)
            grids += [draws.noised, model(*inputs).argmax(1).cpu()]
            captions += [f"t = {level}", f"made of t = {level}"]
        images = to_uint8(self.vqgan.decode_indices(torch.cat(grids).to(self.device)))
        return contact_sheet(list(images), [caption for caption in captions for _ in range(len(tokens))], columns=len(tokens))


def fixed_noise(tokens: np.ndarray, num_labels: int) -> Draws:
    """Noise of tokens (N,H,W) that is always the same, at levels spread evenly over [0, 1]."""
    num_images = len(tokens)
    return noise_at(torch.from_numpy(tokens), (torch.arange(num_images) + 0.5) / max(1, num_images), num_labels)


def noise_at(tokens: Tensor, t: Tensor, num_labels: int) -> Draws:
    """Always the same noise of tokens (N,H,W) at given levels (N,); every caption is kept, no image embedding."""
    generator = torch.Generator().manual_seed(0)
    noised, mask = add_noise(tokens, t, num_labels=num_labels, generator=generator)
    yes = torch.ones(len(t), dtype=torch.bool)
    return Draws(t, noised, loss_weight(t, mask), Keep(yes, yes, ~yes))
