"""Sheets of samples during training, from the averaged weights of the sharded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from paella.conditioning import load_clip, unconditional
from paella.ema import Ema
from paella.images import contact_sheet, to_uint8
from paella.parallel import gathered
from paella.sampler import sample, start
from paella.training import TextToTokens
from paella.vqgan import VQModel
from pipelines import tracking
from pipelines.train_config import TrainConfig, sample_prompts


class Samples:
    """Sheets of samples from the averaged weights: every rank generates its share with the sharded model."""

    def __init__(
        self, config: TrainConfig, vqgan: VQModel, mlflow_run: tracking.Run, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.config, self.vqgan, self.mlflow_run = config, vqgan, mlflow_run
        self.rank, self.world_size, self.device = rank, world_size, device
        prompts = sample_prompts(config)
        self.prompts = prompts[: max(world_size, len(prompts) // world_size * world_size)]
        name = config.model.text.clip
        self.clip = None if name is None else clip_text_embeddings(name, self.prompts)

    @torch.no_grad()
    def draw(self, model: TextToTokens, ema: Ema, step: int) -> None:
        """Generate, gather on rank 0 and keep the sheet."""
        indices = range(self.rank, len(self.prompts), self.world_size)
        side = self.config.model.image_size
        model.eval()
        with ema.swapped_into(model):
            clip = None if self.clip is None else self.clip[list(indices)].to(self.device)
            tokens = sample_sharded(model, [self.prompts[i] for i in indices], list(indices), side, self.config, clip)
        model.train()
        if self.config.given_states:
            model.text.free()
        images = to_uint8(self.vqgan.decode_indices(tokens.to(self.device)))
        gathered: list = [None] * self.world_size
        dist.all_gather_object(gathered, dict(zip(indices, images, strict=True)))
        if self.rank == 0:
            by_index = {index: image for part in gathered for index, image in part.items()}
            self._keep(contact_sheet([by_index[i] for i in sorted(by_index)], self.prompts), step)

    def _keep(self, sheet: Image.Image, step: int) -> None:
        """Into the output and MLflow."""
        file = Path(self.config.output) / "samples" / f"step-{step:07d}.png"
        file.parent.mkdir(exist_ok=True)
        sheet.save(file)
        tracking.log_image(self.mlflow_run, sheet, "samples", step)
        print(f"samples after {step} steps: {file}", flush=True)


def sample_sharded(
    model: TextToTokens, prompts: list[str], seeds: list[int], side: int, config: TrainConfig, clip: Tensor | None
) -> Tensor:
    """Token grids of prompts, with their CLIP embeddings (B,D), by a sharded model, whose weights are gathered for as long."""
    size, num_labels = config.model.grid(side, side), config.model.unet.num_labels
    with gathered(model, reshard_after_forward=config.parallel.reshard_after_forward):
        canvases = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            conditions = model.text([prompt])
            if clip is not None:
                conditions["clip"] = clip[index : index + 1].to(conditions["byt5"].dtype)
            prepared = [model.unet.prepare(**conditions)], model.unet.prepare(**unconditional(conditions))
            canvases.append(start(num_labels, size, *prepared, seed=seed, config=config.sampling))
        return sample(model.unet, canvases)


@torch.inference_mode()
def clip_text_embeddings(name: str, prompts: list[str]) -> Tensor:
    """CLIP's embeddings (B,D) of prompts."""
    clip: Any
    clip, tokenizer = load_clip(name)
    return clip.encode_text(tokenizer(prompts))
