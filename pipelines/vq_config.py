"""The settings of a VQGAN training run, and its presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from paella.config import PRESETS, VQConfig
from paella.training import OptimConfig
from paella.vq_losses import VQLossConfig
from pipelines import loop
from pipelines.recovery import RecoveryConfig
from pipelines.vq_images import Crop


@dataclass(frozen=True, kw_only=True)
class TrainVQConfig:
    """One VQGAN training run."""

    data: str
    """Images: a folder, or img2dataset's shards."""
    output: str
    """Directory of the run; the same command with the same output continues it."""
    model: VQConfig
    """The VQGAN; that of `init`, if given."""
    init: str | None = None
    """Bundle whose VQGAN is trained on, in place of a new one."""
    train: str = "all"
    """What of that is trained: all, or the decoder alone, which leaves the tokens of all images as they are."""
    image_size: int = 256
    """Side of the training images in pixels."""
    augment: bool = True
    """Random crops and horizontal flips; without, the centre of each image."""
    load_size: int | None = None
    """Shorter side that images are scaled to before they are cropped at random; 5/4 of image_size if not given."""
    memory_gb: float = 4.0
    """Images are held in memory, by each worker, if they need less than this; otherwise they are read as training goes on."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule, of the discriminator too."""
    loss: VQLossConfig = field(default_factory=VQLossConfig)
    """Weights of the losses."""
    steps: int = 100_000
    """Optimizer steps."""
    batch_size: int = 32
    """Images per step over all workers."""
    num_workers: int = 1
    """Workers; each has one GPU, or its share of the CPUs."""
    continuous_steps: int = 200
    """First steps without quantization, so that the codebook starts from latents that mean something; none with `init`."""
    encoder_context: bool = True
    """Whether a token may depend on its neighbours' pixels. Without, a flat colour keeps its code beside an edge, which makes
    tokens easy to predict, and the decoder smooths what the encoder cannot."""
    codebook_update: str = "gradient"
    """How codes follow their latents: gradient, or ema (running means)."""
    revive_every: int = 50
    """Steps between revivals of unused codes."""
    ema_decay: float = 0.99
    """Decay of the averaged weights, which are the result."""
    precision: str = "auto"
    """Of forward and backward: bf16, float32, or auto."""
    seed: int = 0
    """Initial weights, order and crops of the images."""
    checkpoint_every: int = 200
    """Steps between checkpoints; there are none before there are codes."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """Checkpoints beside those of checkpoint_every, and what happens when something goes wrong."""

    def __post_init__(self) -> None:
        loop.require_counts(self, "steps", "batch_size", "num_workers", "checkpoint_every", "revive_every")
        if self.image_size < self.model.downsampling or self.image_size % self.model.downsampling:
            raise ValueError(f"image_size={self.image_size} is not allowed: a multiple of {self.model.downsampling} is needed")
        if not 0 < self.continuous_steps < self.steps and self.init is None:
            raise ValueError(f"continuous_steps={self.continuous_steps} is not allowed: 1 to steps-1={self.steps - 1}")
        if self.batch_size % self.num_workers:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of num_workers={self.num_workers}")
        if self.load_size is not None and self.load_size < self.image_size:
            raise ValueError(f"load_size={self.load_size} is not allowed: at least image_size={self.image_size}")
        for name, allowed in {"train": ("all", "decoder"), "codebook_update": ("gradient", "ema")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: {' or '.join(allowed)}")
        if self.train == "decoder" and self.init is None:
            raise ValueError("train=decoder needs init: the bundle whose encoder and codebook are kept")
        if self.codebook_update == "ema" and self.model.quantizer != "codebook":
            raise ValueError(f"codebook_update=ema is not allowed with quantizer={self.model.quantizer!r}: codebook alone")

    @property
    def crop(self) -> Crop:
        """How images become training images."""
        load_size = (self.load_size or self.image_size * 5 // 4) if self.augment else self.image_size
        return Crop(self.image_size, load_size, self.augment)

    @property
    def settling_step(self) -> int:
        """The step after which no code is revived: the last codes to move still need time to settle."""
        return self.steps * 4 // 5

    @property
    def first_coded_step(self) -> int:
        """The first step with codes."""
        return self.continuous_steps if self.init is None else 0


def presets() -> dict[str, TrainVQConfig]:
    """Training settings for each size; `data` and `output` have to be given."""
    from tyro import MISSING

    tiny = TrainVQConfig(
        data=MISSING,
        output=MISSING,
        model=PRESETS["tiny"].vqgan,
        image_size=64,
        augment=False,
        optim=OptimConfig(lr=3e-3, warmup_steps=50, final_lr_fraction=0.02, weight_decay=0.0, betas=(0.9, 0.95)),
        steps=1100,
        continuous_steps=150,
        encoder_context=False,
    )
    f4 = TrainVQConfig(
        data=MISSING,
        output=MISSING,
        model=PRESETS["paella-1b"].vqgan,
        optim=OptimConfig(lr=2e-4, warmup_steps=1000, final_lr_fraction=0.1, weight_decay=0.0, betas=(0.9, 0.95)),
        loss=VQLossConfig(adversarial=0.1, adversarial_start=50_000, lecam=0.001),
        steps=200_000,
        continuous_steps=2000,
        ema_decay=0.999,
        checkpoint_every=2000,
    )
    f8 = dataclasses.replace(f4, model=dataclasses.replace(f4.model, levels=3))
    return {"tiny": tiny, "f4": f4, "f8": f8}
