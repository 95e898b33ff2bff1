"""Paella: text-to-image models over VQGAN tokens (arXiv 2211.07292), in plain PyTorch."""

from paella.bundle import Bundle, load_bundle
from paella.config import PRESETS, ModelConfig, PaellaConfig, VQConfig
from paella.sampler import SamplingConfig, sample
from paella.unet import Paella
from paella.vqgan import VQModel

__all__ = [
    "PRESETS",
    "Bundle",
    "ModelConfig",
    "Paella",
    "PaellaConfig",
    "SamplingConfig",
    "VQConfig",
    "VQModel",
    "load_bundle",
    "sample",
]
