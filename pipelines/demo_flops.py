"""How much arithmetic the demo's training takes: each stage's real modules, counted, times its images.

A training step is three forward passes: the backward pass multiplies by the weights and by the activations where the forward pass
multiplies once. Optimizers, averages, validation and samples are not counted, nor what makes tokens and pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch

from paella.conditioning import TextEncoders
from paella.flops import counted
from paella.training import Keep, TextToTokens
from paella.vqgan import VQModel
from pipelines.initial_weights import with_text_encoder
from pipelines.token_dataset import TokenDataset
from pipelines.train_clip import TrainClipConfig
from pipelines.train_config import TrainConfig
from pipelines.train_text import TrainTextConfig, learned_tokenizer, new_model
from pipelines.vq_config import TrainVQConfig

CAPTIONS_READ = 4096
"""Captions whose mean length is counted."""


def by_stage(vqgan: TrainVQConfig, clip: TrainClipConfig, text: TrainTextConfig, unet: TrainConfig) -> dict[str, float]:
    """Return the FLOPs of each training stage. The token dataset and the text encoder have to be there."""
    captions = TokenDataset(unet.data).captions(CAPTIONS_READ)
    return {
        "vqgan": vqgan_flops(vqgan),
        "clip": clip_flops(clip),
        "text": text_flops(text, captions),
        "train": unet_flops(unet, captions),
    }


def vqgan_flops(config: TrainVQConfig) -> float:
    """Return the FLOPs of a VQGAN's training, without its discriminator and perceptual loss, which `tiny` has not."""
    model, images = VQModel(config.model), torch.zeros(1, 3, config.image_size, config.image_size)
    return 3.0 * counted(lambda: model(images)) * config.steps * config.batch_size


def clip_flops(config: TrainClipConfig) -> float:
    """Return the FLOPs of a CLIP's training: its two towers."""
    model = open_clip.CLIP(**config.model.open_clip(config.image_size))
    images = torch.zeros(1, 3, config.image_size, config.image_size)
    ids = torch.zeros(1, config.model.context_length, dtype=torch.long)
    return 3.0 * counted(lambda: model(images, ids)) * config.steps * config.batch_size


def text_flops(config: TrainTextConfig, captions: Sequence[str]) -> float:
    """Return the FLOPs of a text encoder's training, with its head, for captions of the mean length of these."""
    tokenizer = learned_tokenizer(config)
    model = new_model(config, tokenizer, config.training_data().format.codebook_size)
    ids = torch.ones(1, mean_length(model.text, captions), dtype=torch.long)
    return 3.0 * counted(lambda: model.logits(ids, ids > 0)) * config.steps * config.global_batch_size


def mean_length(text: TextEncoders, captions: Sequence[str]) -> int:
    """Return the mean number of text tokens of captions, rounded."""
    return round(text.tokenize(captions).mask.sum(1).float().mean().item())


def unet_flops(config: TrainConfig, captions: Sequence[str]) -> float:
    """Return the FLOPs of the training of U-Net and text encoder, for captions of the mean length of these.

    The share of images that are noised from the model's own draws takes one more forward pass.
    """
    model = TextToTokens(with_text_encoder(config).model)
    length = mean_length(model.text, captions)
    side, unet, yes = config.model.image_size, config.model.unet, torch.ones(1, dtype=torch.bool)
    tokens, ids = torch.zeros(1, *config.model.grid(side, side), dtype=torch.long), torch.zeros(1, length, dtype=torch.long)
    clip = (torch.zeros(1, unet.clip_embd),) * 2 if config.model.text.clip is not None else ()
    inputs = tokens, torch.ones(1), ids, ids == 0, Keep(yes, yes, yes), *clip
    passes = 3.0 + config.noise.own_draws
    return passes * counted(lambda: model(*inputs)) * config.steps * config.global_batch_size
