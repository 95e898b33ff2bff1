"""Paella: text-to-image models over VQGAN tokens (arXiv 2211.07292), in plain PyTorch."""

from paella import edits
from paella.bundle import Bundle, load_bundle
from paella.config import PRESETS, ModelConfig, PaellaConfig, PriorConfig, VQConfig
from paella.prior import Prior
from paella.sampler import MODEL_CARD, PUBLISHED_DEMO, Canvas, SamplingConfig, sample, step
from paella.unet import Paella
from paella.vqgan import VQModel

__all__ = [
    "MODEL_CARD",
    "PRESETS",
    "PUBLISHED_DEMO",
    "Bundle",
    "Canvas",
    "ModelConfig",
    "Paella",
    "PaellaConfig",
    "Prior",
    "PriorConfig",
    "SamplingConfig",
    "VQConfig",
    "VQModel",
    "edits",
    "load_bundle",
    "sample",
    "step",
]
