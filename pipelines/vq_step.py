"""One step of VQGAN training: what is trained, and how a batch moves it, on each of any number of workers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paella import codebook
from paella.bundle import load_vqgan
from paella.discriminator import Discriminator, adaptive_weight, generator_loss
from paella.parallel import SharedBatchNorm2d, average_gradients, compute_dtype
from paella.vq_losses import perceptual_distance, reconstruction_losses
from paella.vqgan import VQModel, VQResBlock
from pipelines import loop
from pipelines.recovery import Guard
from pipelines.vq_config import TrainVQConfig


class Trained(nn.Module):
    """All that a checkpoint keeps: the VQGAN, what is known of its codebook, and the discriminator if there is one."""

    def __init__(self, config: TrainVQConfig) -> None:
        super().__init__()
        self.vqgan = VQModel(config.model)
        if config.init is not None:
            self.vqgan.load_state_dict(load_vqgan(config.init)[0].state_dict())
        self.health = codebook.Health(config.model.codebook_size, config.model.c_latent)
        self.discriminator = Discriminator(config.loss.discriminator_width) if config.loss.adversarial else None
        if config.num_workers > 1:
            self._share_batch_norm()
        self._freeze(config)

    def _share_batch_norm(self) -> None:
        own = self.vqgan.latent_norm
        shared = SharedBatchNorm2d(own.num_features)
        shared.load_state_dict(own.state_dict())
        self.vqgan.down_blocks[-1][1] = shared  # type: ignore[index,operator]

    def _freeze(self, config: TrainVQConfig) -> None:
        vqgan = self.vqgan
        if not config.encoder_context:
            if config.init is None:
                leave_out_encoder_context(vqgan)
            freeze_encoder_context(vqgan)
        if config.codebook_update == "ema":
            vqgan.vquantizer.requires_grad_(False)
        if config.train == "decoder":
            for module in (vqgan.in_block, vqgan.down_blocks, vqgan.vquantizer):
                module.requires_grad_(False)

    @property
    def moves_codes(self) -> bool:
        """Whether codes are trained, so that they can die and be revived."""
        return self.vqgan.vquantizer.learned and next(self.vqgan.in_block.parameters()).requires_grad


def encoder_blocks(model: VQModel) -> Iterable[VQResBlock]:
    """The encoder's residual blocks."""
    return [block for block in model.down_blocks.children() if isinstance(block, VQResBlock)]


def encoder_strides(model: VQModel) -> Iterable[nn.Conv2d]:
    """The encoder's 4×4 convolutions of stride 2, whose outer ring reads the neighbours' pixels."""
    return [module for module in model.down_blocks.children() if isinstance(module, nn.Conv2d)]


@torch.no_grad()
def leave_out_encoder_context(model: VQModel) -> None:
    """Set to zero whatever lets a token see more than its own pixels."""
    for block in encoder_blocks(model):
        for parameter in block.depthwise.parameters():
            parameter.zero_()
    for stride in encoder_strides(model):
        stride.weight.copy_(2 * without_ring(stride.weight))  # a quarter of the inputs is left: the outputs keep their size


def freeze_encoder_context(model: VQModel) -> None:
    """Keep what lets a token see more than its own pixels from being trained."""
    for block in encoder_blocks(model):
        block.depthwise.requires_grad_(False)
    for stride in encoder_strides(model):
        stride.weight.register_hook(without_ring)


def without_ring(kernels: Tensor) -> Tensor:
    """Kernels (D,C,4,4) with zeros all around their inner 2×2."""
    return F.pad(kernels[:, :, 1:-1, 1:-1], (1, 1, 1, 1))


class Step:
    """An optimizer step of the VQGAN, and of its discriminator, on this worker's share of a batch."""

    def __init__(
        self,
        config: TrainVQConfig,
        trained: Trained,
        optimizers: list[list[torch.optim.Optimizer]],
        device: torch.device,
        guard: Guard | None = None,
    ) -> None:
        self.config, self.trained, self.optimizers, self.device = config, trained, optimizers, device
        self.guard = guard or Guard(config.recovery)
        self.dtype = compute_dtype(config.precision, device)
        name = config.loss.perceptual_model
        self.perceptual = perceptual_distance(name).to(device) if config.loss.perceptual and name is not None else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def __call__(self, images: Tensor, step: int) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
        """Unweighted losses by name, indices (none without quantization) and latents of images (B,3,H,W)."""
        config, vqgan = self.config, self.trained.vqgan
        coded = step >= config.first_coded_step
        vqgan.latent_norm.train(self._norm_learns(step))
        with self.autocast():
            reconstruction, latents, indices, quantization = self.reconstruct(images, coded)
            losses = reconstruction_losses(reconstruction, images, config.loss, self.perceptual)
        loss = sum(getattr(config.loss, name) * value for name, value in losses.items())
        assert isinstance(loss, Tensor)
        losses["quantization"] = quantization.float()
        weight = config.loss.adversarial_weight(step - config.first_coded_step) if coded else 0.0
        total = loss + losses["quantization"]
        if weight > 0:
            total = total + self.adversarial(reconstruction, loss, weight, losses)
        self.update(vqgan, self.optimizers[0], total)
        if weight > 0:
            self.train_discriminator(images, reconstruction, step, losses)
        if indices is not None:
            self.trained.health.count(indices)
            if config.codebook_update == "ema" and self.trained.moves_codes:
                self.trained.health.update_means(vqgan.vquantizer, latents, indices)
        return losses, indices, latents

    def _norm_learns(self, step: int) -> bool:
        """With codes, the same colour must give the same latent in every batch, whatever else is in the batch.

        Fixed codes cannot follow latents, so with them the norm goes on for a while; not for long, since what rounding makes of
        latents differs from batch to batch then.
        """
        if self.trained.vqgan.vquantizer.learned or self.config.init is not None:
            return step < self.config.first_coded_step
        return step < max(self.config.first_coded_step, self.config.steps * 3 // 10)

    def reconstruct(self, images: Tensor, coded: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Reconstruction (B,3,H,W) in float32, latents, indices and the quantizer's loss."""
        vqgan = self.trained.vqgan
        if coded:
            reconstruction, latents, indices, quantization = vqgan(images, self.config.loss.commitment)
            return reconstruction.float(), latents, indices, quantization
        latents = vqgan.encode_latents(images)
        return vqgan.decode_codes(latents).float(), latents, None, latents.new_zeros(())

    def adversarial(self, reconstruction: Tensor, loss: Tensor, weight: float, losses: dict[str, Tensor]) -> Tensor:
        """The weighted adversarial loss; adds its parts to the losses."""
        discriminator = self.trained.discriminator
        assert discriminator is not None
        with self.autocast():
            losses["adversarial"] = generator_loss(discriminator, reconstruction)
        losses["adversarial_weight"] = torch.tensor(weight, device=self.device)
        if self.config.loss.adaptive:
            last = self.trained.vqgan.out_block[0].weight
            assert isinstance(last, nn.Parameter)
            losses["adversarial_weight"] = weight * adaptive_weight(loss, losses["adversarial"], last)
        return losses["adversarial_weight"] * losses["adversarial"]

    def train_discriminator(self, images: Tensor, reconstruction: Tensor, step: int, losses: dict[str, Tensor]) -> None:
        """The discriminator's own step; adds its parts to the losses."""
        discriminator = self.trained.discriminator
        assert discriminator is not None
        discriminator.zero_grad()  # of what the VQGAN's loss left there
        with self.autocast():
            parts = discriminator.loss(images, reconstruction, self.config.loss, step)
        self.update(discriminator, self.optimizers[1], torch.stack(list(parts.values())).sum())
        losses |= parts

    def update(self, module: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor) -> None:
        """Backward pass and update of a module that is replicated over workers."""
        loss.backward()
        average_gradients(module.parameters())
        loop.update(module, optimizers, loss, self.config.optim.grad_clip, self.guard)
