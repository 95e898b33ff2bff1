"""Train a VQGAN on a folder or shards of images: reconstruction, codebook from data, revival of dead codes.

    python pipelines/train_vqgan.py tiny --data runs/demo/images --output runs/my-vqgan

The same command again continues from the newest checkpoint; a finished run says so and does nothing.
The output holds `model` (a bundle with the VQGAN alone), `report.json` and a sheet of reconstructions.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paella import codebook, command_line
from paella.bundle import save_vqgan
from paella.config import PRESETS, VQConfig
from paella.ema import Ema
from paella.images import contact_sheet, to_tensor, to_uint8
from paella.metrics import codebook_use, psnr
from paella.parallel import compute_dtype
from paella.storage import new_file
from paella.training import OptimConfig
from paella.vqgan import VQModel, VQResBlock
from pipelines import cli, loop, tracking
from pipelines.progress import Progress
from pipelines.sources import decode_all, find_units
from pipelines.workers import fit, setup_worker


@dataclass(frozen=True, kw_only=True)
class TrainVQConfig:
    """One VQGAN training run."""

    data: str
    """Images: a folder, or img2dataset's shards."""
    output: str
    """Directory of the run; the same command with the same output continues it."""
    model: VQConfig
    """The VQGAN."""
    image_size: int = 256
    """Side of the training images in pixels."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule."""
    steps: int = 100_000
    """Optimizer steps."""
    batch_size: int = 32
    """Images per step."""
    continuous_steps: int = 200
    """First steps without quantization, so that the codebook starts from latents that mean something."""
    encoder_context: bool = True
    """Whether the encoder's depthwise convolutions are trained. Without, a token knows little more than its own pixels: a flat
    colour keeps its code beside an edge, which makes tokens easy to predict, and the decoder smooths what the encoder cannot."""
    revive_every: int = 50
    """Steps between revivals of unused codes."""
    ema_decay: float = 0.99
    """Decay of the averaged weights, which are the result."""
    max_images: int = 20_000
    """Images held in memory; an evenly spaced selection of a larger set."""
    precision: str = "auto"
    """Of forward and backward: bf16, float32, or auto."""
    seed: int = 0
    """Initial weights and order of the images."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        if self.image_size < self.model.downsampling or self.image_size % self.model.downsampling:
            raise ValueError(f"image_size={self.image_size} is not allowed: a multiple of {self.model.downsampling} is needed")
        if not 0 < self.continuous_steps < self.steps:
            raise ValueError(f"continuous_steps={self.continuous_steps} is not allowed: 1 to steps-1={self.steps - 1}")


def presets() -> dict[str, TrainVQConfig]:
    """Training settings for each model preset; `data` and `output` have to be given."""
    from tyro import MISSING

    tiny = TrainVQConfig(
        data=MISSING,
        output=MISSING,
        model=PRESETS["tiny"].vqgan,
        image_size=64,
        optim=OptimConfig(lr=3e-3, warmup_steps=50, final_lr_fraction=0.02, weight_decay=0.0, betas=(0.9, 0.95)),
        steps=1100,
        continuous_steps=150,
        encoder_context=False,
    )
    f4 = TrainVQConfig(data=MISSING, output=MISSING, model=PRESETS["paella-1b"].vqgan)
    return {"tiny": tiny, "f4": f4}


def run(config: TrainVQConfig) -> Path:
    """Train; returns the bundle's directory. Raises ValueError for the user's mistakes, before the worker starts."""
    config = dataclasses.replace(config, data=cli.absolute(config.data), output=cli.absolute(config.output))
    find_units(config.data)
    output = cli.require_writable(config.output)
    values = cli.config_values(config)
    cli.require_same_config(output, values)
    bundle = output / "model"
    if (output / "report.json").exists():
        print(f"VQGAN training is finished: {bundle}")
        return bundle
    cli.start_ray()
    mlflow_run = tracking.open_run(output, f"train_vqgan {output.name}", values)
    fit(train_worker, {"config": config, "mlflow_run": mlflow_run}, output, num_workers=1)
    tracking.finish_run(mlflow_run)
    report = json.loads((output / "report.json").read_text())
    print(
        f"trained: {bundle}  PSNR {report['psnr']:.1f} dB, {report['codebook_use']:.0%} of the codebook in use "
        f"(perplexity {report['perplexity']:.0f})"
    )
    return bundle


def train_worker(arguments: dict) -> None:
    """The training worker; one process, with all CPUs or one GPU."""
    config: TrainVQConfig = arguments["config"]
    mlflow_run: tracking.Run = arguments["mlflow_run"]
    _, _, device = setup_worker(arguments, config.seed)
    images, held_back = _split(decode_all(config.data, config.image_size, config.max_images))
    model = VQModel(config.model).to(device).train()
    if not config.encoder_context:
        leave_out_encoder_context(model)
    optimizers = config.optim.optimizers(model)
    ema = Ema(model, config.ema_decay)
    start = loop.resume(model, optimizers, ema)
    print(f"VQGAN on {len(images)} images, from step {start}", flush=True)
    dtype = compute_dtype(config.precision, device)
    used = torch.zeros(config.model.codebook_size, dtype=torch.bool, device=device)
    progress = Progress("vqgan", config.steps, start)
    for step in range(start, config.steps):
        # one generator per step: a resumed run draws what an undisturbed one would
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        # with codes, the same colour must give the same latent in every batch, whatever else is in the batch
        model.latent_norm.train(step < config.continuous_steps)
        if step == config.continuous_steps:
            _start_codebook(model, images, config, generator, device, dtype)
            ema = Ema(model, config.ema_decay)
        batch = _batch(images, config.batch_size, generator).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses, indices, latents = vqgan_losses(model, batch, quantize=step >= config.continuous_steps)
        config.optim.set_lr(optimizers, step, config.steps)
        loop.optimizer_step(model, optimizers, torch.stack(list(losses.values())).sum(), config.optim.grad_clip)
        ema.update(model, step)
        if indices is not None:
            used[indices.unique()] = True
        if indices is not None and (step + 1) % config.revive_every == 0:
            share = used.float().mean().item()
            if step < 0.8 * config.steps:  # the last codes to move still need time to settle
                codebook.revive(model.vquantizer, codebook.flatten(latents).cpu(), used.cpu(), generator)
            used.zero_()
            values = {name: value.item() for name, value in losses.items()} | {"codebook_use": share}
            tracking.log_metrics(mlflow_run, values, step + 1)
            progress.update(step + 1, f"loss {losses['l1'].item():.4f}  {share:.0%} of codes in use")
        progress.update(step + 1)
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            loop.save_checkpoint(model, optimizers, ema, step + 1)
    with ema.swapped_into(model):
        finish(config, model.cpu().eval(), held_back, mlflow_run)


@torch.no_grad()
def leave_out_encoder_context(model: VQModel) -> None:
    """Set the encoder's depthwise convolutions to zero, for good."""
    for block in model.down_blocks.children():
        if isinstance(block, VQResBlock):
            for parameter in block.depthwise.parameters():
                parameter.zero_().requires_grad_(False)


def vqgan_losses(model: VQModel, images: Tensor, *, quantize: bool) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
    """Losses by name, indices (None without quantization) and latents of a batch (B,3,H,W).

    The edge loss compares differences of neighbouring pixels: on flat pictures the mean error hardly sees the outlines.
    """
    if quantize:
        reconstruction, latents, indices, quantization = model(images)
    else:
        latents = model.encode_latents(images)
        reconstruction, indices, quantization = model.decode_codes(latents), None, latents.new_zeros(())
    reconstruction = reconstruction.float()
    edges = sum(F.l1_loss(reconstruction.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3))
    losses = {
        "l1": F.l1_loss(reconstruction, images),
        "l2": 4 * F.mse_loss(reconstruction, images),
        "edges": edges,
        "quantization": quantization.float(),
    }
    return losses, indices, latents


@torch.no_grad()
def _start_codebook(
    model: VQModel, images: np.ndarray, config: TrainVQConfig, generator: torch.Generator, device, dtype: torch.dtype
) -> None:
    """Codes from the latents of up to 16 batches."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        batches = [_batch(images, config.batch_size, generator).to(device) for _ in range(16)]
        latents = torch.cat([codebook.flatten(model.encode_latents(batch)).cpu() for batch in batches])
    chosen = torch.randperm(len(latents), generator=generator)[: max(16_384, 8 * config.model.codebook_size)]
    codebook.kmeans_init(model.vquantizer, latents[chosen], generator)


def _batch(images: np.ndarray, size: int, generator: torch.Generator) -> Tensor:
    return to_tensor(images[torch.randint(len(images), (size,), generator=generator).numpy()])


def _split(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training images, and every 50th (at least one, at most 512) held back to measure reconstruction."""
    held_back = np.zeros(len(images), dtype=bool)
    held_back[:: max(50, len(images) // 512)] = True
    return (images[~held_back] if len(images) > 1 else images), images[held_back]


@torch.inference_mode()
def reconstruct(model: VQModel, images: np.ndarray, batch_size: int = 64) -> tuple[np.ndarray, Tensor, Tensor]:
    """Reconstructions (B,H,W,3) uint8, PSNR (B,) and indices (B,h,w) of images (B,H,W,3) uint8."""
    parts = [to_tensor(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    indices = [model.encode(part) for part in parts]
    outputs = [model.decode_indices(part).clamp(0, 1) for part in indices]
    values = torch.cat([psnr(output, part) for output, part in zip(outputs, parts, strict=True)])
    return np.concatenate([to_uint8(output) for output in outputs]), values, torch.cat(indices)


def finish(config: TrainVQConfig, model: VQModel, held_back: np.ndarray, mlflow_run: tracking.Run) -> None:
    """Write bundle, sheet and, last, the report that marks the run as finished."""
    output = Path(config.output)
    digest = save_vqgan(output / "model", model)
    images, values, indices = reconstruct(model, held_back)
    use, perplexity = codebook_use(indices, config.model.codebook_size)
    sheet = reconstruction_sheet(held_back[:16], images[:16], values[:16])
    sheet.save(output / "reconstructions.png")
    tracking.log_image(mlflow_run, sheet, "reconstructions", config.steps)
    report = {
        "psnr": values.mean().item(),
        "psnr_min": values.min().item(),
        "codebook_use": use,
        "perplexity": perplexity,
        "images": len(held_back),
        "digest": digest,
    }
    tracking.log_metrics(mlflow_run, {k: v for k, v in report.items() if isinstance(v, float)}, config.steps)
    with new_file(output / "report.json") as file:
        file.write_text(json.dumps(report, indent=1) + "\n")


def reconstruction_sheet(originals: np.ndarray, reconstructions: np.ndarray, psnr_values: Tensor):
    """Originals above their reconstructions, with PSNR."""
    rows: list[np.ndarray] = []
    captions: list[str] = []
    for start in range(0, len(originals), 8):
        part = slice(start, start + 8)
        rows += [*originals[part], *reconstructions[part]]
        captions += ["original"] * len(originals[part]) + [f"{value:.1f} dB" for value in psnr_values[part].tolist()]
    return contact_sheet(rows, captions)


if __name__ == "__main__":
    from pipelines.train_vqgan import presets as _presets
    from pipelines.train_vqgan import run as _run

    command_line.main(_run, _presets(), __doc__)
