"""Train a VQGAN on anybody's images, or fine-tune one: on any number of workers, with a codebook that stays in use.

    python pipelines/train_vqgan.py tiny --data runs/demo/images --output runs/my-vqgan
    python pipelines/train_vqgan.py f4 --data my/photos --output runs/f4 --loss.perceptual 1 --loss.perceptual-model lpips
    python pipelines/train_vqgan.py f4 --init runs/released --train decoder --data my/photos --output runs/sharper

The same command again continues from the newest checkpoint; a finished run says so and does nothing.
The output holds `model` (a bundle with the VQGAN alone), `report.json` and a sheet of reconstructions; with a new
decoder for a bundle that can generate, `bundle`, a copy of it with that decoder.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from paella import codebook, command_line
from paella.bundle import load_vqgan, replace_vqgan, save_vqgan, vqgan_digests
from paella.ema import Ema
from paella.images import contact_sheet, to_tensor, to_uint8
from paella.metrics import codebook_use, psnr, use_and_perplexity
from paella.parallel import mean_over_workers
from paella.storage import new_file
from paella.vq_losses import perceptual_distance
from paella.vqgan import VQModel
from paella.weights import read_config
from pipelines import cli, loop, tracking
from pipelines.progress import Progress
from pipelines.vq_config import TrainVQConfig, presets
from pipelines.vq_images import ImageSet, InMemory, Stream
from pipelines.vq_step import Step, Trained
from pipelines.workers import fit, setup_worker

__all__ = ["TrainVQConfig", "presets", "reconstruct", "reconstruction_sheet", "run"]


def run(config: TrainVQConfig) -> Path:
    """Train; returns the bundle's directory. Raises ValueError for mistakes, before a worker starts, and for a collapse."""
    config = dataclasses.replace(config, data=cli.absolute(config.data), output=cli.absolute(config.output))
    if config.init is not None:
        init = cli.absolute(config.init)
        config = dataclasses.replace(config, init=init, model=load_vqgan(init)[0].config)
    images = ImageSet.find(config.data, config.crop)
    if config.loss.perceptual > 0:
        assert config.loss.perceptual_model is not None
        name = cli.absolute_if_directory(config.loss.perceptual_model)
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual_model=name))
        perceptual_distance(str(name))
    output = loop.require_places(config)
    values = cli.config_values(config)
    cli.require_same_config(output, values, config)
    bundle = output / "model"
    if (output / "report.json").exists():
        print(f"VQGAN training is finished: {bundle}")
        return bundle
    if not (collapse := output / "collapse.txt").exists():
        cli.start_ray()
        cpus_for_data = _cpus_for_data(config, images)
        mlflow_run = tracking.open_run(output, f"train_vqgan {output.name}", values)
        fit(train_worker, {"config": config, "mlflow_run": mlflow_run}, cpus_for_data)
        tracking.finish_run(mlflow_run)
    if collapse.exists():
        raise ValueError(collapse.read_text())
    report = json.loads((output / "report.json").read_text())
    print(
        f"trained: {bundle}  PSNR {report['psnr']:.1f} dB, {report['codebook_use']:.0%} of the codebook in use "
        f"(perplexity {report['perplexity']:.0f})"
    )
    return bundle


def _cpus_for_data(config: TrainVQConfig, images: ImageSet) -> int:
    """CPUs that workers leave to the tasks that read images: a quarter of them, if images do not fit in memory."""
    if images.num_bytes <= config.memory_gb * 1e9:
        return 0
    cpus = int(ray.cluster_resources().get("CPU", 1))
    if cpus <= config.num_workers:
        raise ValueError(
            f"the images need {images.num_bytes / 1e9:.1f} GB in memory, above memory_gb={config.memory_gb}, and reading them as "
            f"training goes on needs a CPU beside the {config.num_workers} workers, but there are {cpus}"
        )
    return max(1, min(cpus // 4, cpus - config.num_workers))


def train_worker(arguments: dict) -> None:
    """One worker of the training group."""
    config: TrainVQConfig = arguments["config"]
    rank, world_size, device = setup_worker(arguments, config.seed)
    trained = Trained(config).to(device).train()
    vqgan = trained.vqgan
    optimizers = [config.optim.optimizers(module) for module in (vqgan, trained.discriminator) if module is not None]
    flat = [optimizer for some in optimizers for optimizer in some]
    ema = Ema(vqgan, config.ema_decay)
    mlflow_run = arguments["mlflow_run"]
    training = loop.Training(config, mlflow_run, trained, flat, ema, first_checkpoint=config.first_coded_step + 1)
    images = ImageSet.find(config.data, config.crop)
    source = make_source(config, images, rank, world_size)
    step_of = Step(config, trained, optimizers, device, training.guard)
    if rank == 0:
        print(f"VQGAN on {len(images.training)} images, {type(source).__name__}, from step {training.step}", flush=True)
    log = Log(config, mlflow_run, training.step, enabled=rank == 0)
    for step, batch_of in training.steps(functools.partial(_batches, source, config, rank, world_size)):
        # one generator per step: a resumed run draws what an undisturbed one would
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        if step == config.first_coded_step:
            _start_codebook(trained, source.pool(), config, generator, step_of)
            ema.restart(vqgan)
        batch = to_tensor(batch_of(generator)).to(device)
        config.optim.set_lr(flat, step, config.steps)
        losses, indices, latents = step_of(batch, step)
        ema.update(vqgan, step)
        done = step + 1
        if indices is not None and done % config.revive_every == 0:
            counts, collapsed = trained.health.counts.clone(), trained.health.collapsed()
            moved = 0
            if trained.moves_codes and step < config.settling_step:
                moved = _revive(trained, source, latents, config, generator, step_of)
            trained.health.counts.zero_()
            log.metrics(losses, counts, moved, done)
            if collapsed:
                if rank == 0:
                    write_collapse(config, counts, done)
                return
        log.progress.update(done)
    if training.ended:
        return
    with ema.swapped_into(vqgan):
        if rank == 0:
            finish(config, vqgan.cpu().eval(), images.read_held_back(), mlflow_run)
    dist.barrier()


def make_source(config: TrainVQConfig, images: ImageSet, rank: int, world_size: int) -> InMemory | Stream:
    """Where batches come from: memory, if the images fit."""
    if images.num_bytes <= config.memory_gb * 1e9:
        loaded = list(images.read(images.training).values())
        if len(loaded) < len(images.training) and rank == 0:
            left_out = len(images.training) - len(loaded)
            print(f"{left_out} of {images.num_images} images in {config.data} cannot be used and are left out", flush=True)
        return InMemory(loaded, config.crop, config.seed, config.batch_size)
    return Stream(images, config.seed, config.batch_size, _part(config, rank, world_size))


def _part(config: TrainVQConfig, rank: int, world_size: int) -> slice:
    size = config.batch_size // world_size
    return slice(rank * size, (rank + 1) * size)


def _batches(
    source: InMemory | Stream, config: TrainVQConfig, rank: int, world_size: int, start: int
) -> Iterator[Callable[[torch.Generator], np.ndarray]]:
    """This worker's share of the batch of each step from `start` on, made with the step's generator."""
    if isinstance(source, InMemory):
        part = _part(config, rank, world_size)
        yield from (functools.partial(source.batch, step, part) for step in itertools.count(start))
        return
    for batch in source.batches(start, config.steps):
        yield functools.partial(_ready, batch)


def _ready(batch: np.ndarray, generator: torch.Generator) -> np.ndarray:
    return batch


class Log:
    """Metrics to MLflow and the console, from one worker."""

    def __init__(self, config: TrainVQConfig, mlflow_run: tracking.Run, start: int, *, enabled: bool) -> None:
        self.config, self.mlflow_run = config, mlflow_run
        self.curve = tracking.Curve(mlflow_run, "codebook_use") if enabled else None
        self.progress = Progress("vqgan", config.steps, start, enabled=enabled)

    def metrics(self, losses: dict[str, Tensor], counts: Tensor, moved: int, done: int) -> None:
        """Losses, use of codes and how many moved; now and then a picture of how often each is used. Every rank must call it."""
        means = mean_over_workers(torch.stack([value.detach().float() for value in losses.values()])).tolist()
        use, perplexity = use_and_perplexity(counts)
        if self.curve is not None:
            values = dict(zip(losses, means, strict=True))
            values |= {"codebook_use": use, "perplexity": perplexity, "revived_codes": float(moved)}
            self.curve.log(values, done)
            error = next(values[name] for name in ("l1", "l2", "perceptual") if name in values)
            self.progress.update(done, f"loss {error:.4f}  {use:.0%} of codes in use")
            if done % (20 * self.config.revive_every) == 0:
                tracking.log_figure(self.mlflow_run, usage_figure(counts), f"codebook_use/step-{done:07d}.png")


def usage_figure(counts: Tensor):
    """How often each code is used, from the most to the least used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot((counts / counts.sum().clamp(min=1)).sort(descending=True).values.cpu().numpy())
    axes.set(xlabel="code, by use", ylabel="share of tokens", yscale="log")
    return figure


def write_collapse(config: TrainVQConfig, counts: Tensor, step: int) -> None:
    """Say why the run has stopped."""
    use, perplexity = use_and_perplexity(counts)
    with new_file(Path(config.output) / "collapse.txt") as file:
        file.write_text(
            f"the codebook has collapsed: after {step} steps only {use:.1%} of {config.model.codebook_size} codes are in use "
            f"(perplexity {perplexity:.1f}), time and again in spite of new starts, so that tokens say next to nothing; what "
            "helps is a lower optim.lr, more continuous_steps, more varied images, a smaller model.codebook_size, or "
            "model.quantizer fsq or cosine, with another --output"
        )


def _revive(
    trained: Trained, source: InMemory | Stream, latents: Tensor, config: TrainVQConfig, generator: torch.Generator, step: Step
) -> int:
    """Move codes that are not in use, or all where next to nothing is; how many moved."""
    counts, quantizer = trained.health.counts, trained.vqgan.vquantizer
    if trained.health.is_poor(counts):
        return _start_codebook(trained, source.pool(), config, generator, step)
    return trained.health.revive(quantizer, latents, counts.cpu() > 0, generator)


@torch.no_grad()
def _start_codebook(trained: Trained, images: InMemory, config: TrainVQConfig, generator: torch.Generator, step: Step) -> int:
    """Codes from the latents of 16 batches or more, unless those that are there are in use; how many moved.

    All workers do the same.
    """
    quantizer, size = trained.vqgan.vquantizer, config.model.codebook_size
    trained.health.restart_means(quantizer)
    if not trained.moves_codes:
        return 0
    trained.vqgan.latent_norm.eval()
    per_batch = config.batch_size * (config.image_size // config.model.downsampling) ** 2
    latents, counts = [], torch.zeros(size, dtype=torch.long, device=step.device)
    with step.autocast():
        for _ in range(max(16, -(-2 * size // per_batch))):
            batch = to_tensor(images.batch(config.first_coded_step, slice(None), generator)).to(step.device)
            found = trained.vqgan.encode_latents(batch)
            latents.append(codebook.flatten(found))
            if config.init is not None:
                counts += torch.bincount(quantizer.nearest(found).flatten(), minlength=size)
    if config.init is not None and not trained.health.is_poor(counts):
        return 0
    rows = torch.cat(latents)
    chosen = torch.randperm(len(rows), generator=generator)[: max(16_384, 8 * size)]
    codebook.kmeans_init(quantizer, rows[chosen.to(rows.device)], generator)
    if config.num_workers > 1:
        dist.broadcast(quantizer.codebook.weight, 0)
    trained.health.restart_means(quantizer)
    return size


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
    same_tokens = vqgan_digests(config.init) if config.train == "decoder" and config.init is not None else []
    digest = save_vqgan(output / "model", model, same_tokens)
    if config.init is not None and same_tokens and "unet" in read_config(config.init)[1]:
        replace_vqgan(config.init, str(output / "model"), output / "bundle")
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
    tracking.log_metrics(
        mlflow_run, {f"held_back_{name}": value for name, value in report.items() if isinstance(value, float)}, config.steps
    )
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
