"""A trained state becomes a bundle with a model card."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from paella.bundle import load_vqgan, save_bundle
from paella.training import TextToTokens
from pipelines.train_config import TrainConfig


def save_trained(config: TrainConfig, state: dict[str, Tensor]) -> None:
    """Write the bundle from the full state of the trained module (rank 0)."""
    vqgan, _ = load_vqgan(config.vqgan)
    trained = TextToTokens(config.model)
    trained.load_state_dict(state)
    card = MODEL_CARD.format(
        steps=config.steps,
        batch=config.global_batch_size,
        data=config.data.rstrip("/").rsplit("/", 1)[-1],
        images=config.steps * config.global_batch_size,
    )
    weights = {"unet": trained.unet.state_dict(), "vqgan": vqgan.state_dict()}
    made = trained.text if config.model.text.new_byt5 is not None else None
    save_bundle(Path(config.output) / "model", config.model, weights, card, made)


MODEL_CARD = """# A Paella text-to-image model

Trained by paella-ray for {steps} steps of {batch} images ({images} image views) on the token dataset `{data}`.
The weights are the exponential moving average at the last step. Images it makes are made by a model: say so where they are shown.

    python pipelines/generate.py --model . --prompts prompts.txt --output images
"""
