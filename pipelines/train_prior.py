"""Train a prior (CLIP text embedding → CLIP image embedding) on a token dataset's embeddings, on any number of workers.

    python pipelines/train_prior.py tiny --data runs/my/tokens --output runs/my/prior --steps 500
    ray job submit --working-dir . -- python pipelines/train_prior.py paella-1b --data s3://me/tokens --output /shared/prior

The dataset needs the columns clip_text and clip_image; tokens and captions are not read. The same command again continues from
the newest complete checkpoint; a finished run says so and does nothing. The output holds `model` (config.json and
prior.safetensors), checkpoints, the id of the run in MLflow and, with --bundle, a copy of that bundle which has the prior.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from paella import command_line
from paella.bundle import add_prior
from paella.config import PRESETS, PriorConfig
from paella.ema import Ema
from paella.levels import NUM_BUCKETS, means_by_level, sums_by_level
from paella.parallel import compute_dtype, count_parameters, full_state_dict, shard
from paella.prior import Prior, draw_prior_noise, prior_loss, sample_prior, save_prior
from paella.storage import new_file
from paella.training import OptimConfig
from paella.weights import read_config
from pipelines import cli, loop, tracking
from pipelines.progress import Progress
from pipelines.recovery import Guard, RecoveryConfig
from pipelines.token_dataset import ClipBatch, TokenDataset
from pipelines.token_stream import TokenStream, require_mixture
from pipelines.workers import fit, setup_worker


@dataclass(frozen=True, kw_only=True)
class TrainPriorConfig:
    """One training run."""

    data: str
    """Token dataset (directory or URI) with CLIP embeddings."""
    output: str
    """Directory of the run; the same command with the same output continues it."""
    bundle: str | None = None
    """Bundle (directory, URI or models:/name@alias) to give the prior to: `bundle` in the output is then a copy with it."""
    model: PriorConfig
    """The prior; its clip_r is the width of the dataset's embeddings."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    """Optimizer and learning-rate schedule."""
    steps: int = 300_000
    """Optimizer steps."""
    global_batch_size: int = 2048
    """Pairs of embeddings per step over all workers."""
    num_workers: int = 1
    """Workers; each has one GPU, or its share of the CPUs."""
    min_workers: int | None = None
    """Train on as few workers as this where there is no room for num_workers, and on more once there is; None: wait for room."""
    precision: str = "auto"
    """Of forward and backward: bf16, float32, or auto (bf16 where the hardware multiplies it)."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the result."""
    drop_text: float = 0.1
    """Share of text embeddings replaced by zeros, for classifier-free guidance."""
    seed: int = 0
    """Order of the samples, noise and initial weights."""
    checkpoint_every: int = 5000
    """Steps between checkpoints."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """Checkpoints beside those of checkpoint_every, and what happens when something goes wrong."""

    def __post_init__(self) -> None:
        loop.require_run(self)
        if not 0 <= self.drop_text < 1:
            raise ValueError(f"drop_text={self.drop_text} is not allowed: 0 or more, below 1")


def presets() -> dict[str, TrainPriorConfig]:
    """Training settings for each size; `data` and `output` have to be given."""
    from tyro import MISSING

    tiny = TrainPriorConfig(
        data=MISSING,
        output=MISSING,
        model=PriorConfig(clip_r=PRESETS["tiny"].unet.clip_embd, c_hidden=128, c_r=32, num_blocks=4),
        optim=OptimConfig(lr=3e-3, warmup_steps=50, final_lr_fraction=0.02),
        steps=2000,
        global_batch_size=256,
        ema_decay=0.99,
        checkpoint_every=500,
    )
    return {"tiny": tiny, "paella-1b": TrainPriorConfig(data=MISSING, output=MISSING, model=PriorConfig())}


def run(config: TrainPriorConfig) -> Path:
    """Train; returns the prior's directory. Raises ValueError for the user's mistakes, before any worker starts."""
    config = dataclasses.replace(
        config,
        data=cli.absolute(config.data),
        output=cli.absolute(config.output),
        bundle=None if config.bundle is None else cli.absolute(config.bundle),
    )
    _check_data(config)
    output = loop.require_places(config)
    values = cli.config_values(config)
    cli.require_same_config(output, values, config)
    model, finished = output / "model", output / "logged_model.txt"
    if finished.exists():
        print(f"training is finished: {model} (MLflow: {finished.read_text().strip()})")
        return model
    mlflow_run = tracking.open_run(output, f"train_prior {output.name}", values)
    if not (model / "config.json").exists():
        cli.start_ray()
        fit(train_worker, {"config": config, "mlflow_run": mlflow_run})
    join_bundle(config, model)
    uri = tracking.log_directory(mlflow_run, model)
    tracking.finish_run(mlflow_run)
    with new_file(finished) as file:
        file.write_text(f"{uri}\n")
    print(f"trained: {model} (MLflow: {uri})")
    return model


def join_bundle(config: TrainPriorConfig, model: Path) -> None:
    """Write the bundle with the prior, if one is asked for and there is none yet."""
    joined = Path(config.output) / "bundle"
    if config.bundle is not None and not joined.exists():
        add_prior(config.bundle, str(model), joined)
        print(f"bundle with the prior: {joined}")


def _check_data(config: TrainPriorConfig) -> None:
    dataset = TokenDataset(config.data)
    dataset.require_clip()
    clip = dataset.head(1024, clip=True).clip
    assert clip is not None
    if not clip.complete.any():
        raise ValueError(f"{config.data} has no row with both clip_text and clip_image among its first {len(clip.ids)}")
    if (width := clip.text.shape[1]) != config.model.clip_r:
        raise ValueError(f"{config.data} has CLIP embeddings of width {width}, the model's clip_r is {config.model.clip_r}")
    require_mixture([dataset], (), config.global_batch_size)
    if config.bundle is not None:
        _, values = read_config(config.bundle)
        if (width := values.get("unet", {}).get("clip_embd")) != config.model.clip_r:
            raise ValueError(
                f"{config.bundle} takes CLIP embeddings of width {width}, the model's clip_r is {config.model.clip_r}"
            )


def train_worker(arguments: dict) -> None:
    """One worker of the training group."""
    config: TrainPriorConfig = arguments["config"]
    rank, world_size, device = setup_worker(arguments, config.seed)
    model = Prior(config.model).to(device).train()
    num_parameters = count_parameters(model)
    shard(model, compute_dtype(config.precision, device))
    optimizers = config.optim.optimizers(model)
    ema = Ema(model, config.ema_decay)
    report = loop.Report(
        arguments["mlflow_run"], means, steps=config.steps, global_batch_size=config.global_batch_size, unit="pairs"
    )
    training = loop.Training(config, arguments["mlflow_run"], model, optimizers, ema, report)
    if rank == 0:
        print(f"{num_parameters / 1e6:.1f} M parameters on {world_size} workers, from step {training.step}", flush=True)
    progress = Progress("prior", config.steps, training.step, enabled=rank == 0)
    stream = TokenStream([TokenDataset(config.data)], seed=config.seed, global_batch_size=config.global_batch_size)
    for step, batch in training.steps(functools.partial(stream.clip_batches, rank, world_size)):
        sums, norm, lr = train_step(model, optimizers, config, step, batch, device, training.guard)
        ema.update(model, step)
        progress.update(step + 1, report.step(step, sums, norm, lr))
    if training.ended:
        return
    with ema.swapped_into(model):
        state = full_state_dict(model)
    if rank == 0:
        finish(config, state, device, arguments["mlflow_run"])
    dist.barrier()


def train_step(
    model: Prior,
    optimizers: loop.Optimizers,
    config: TrainPriorConfig,
    step: int,
    batch: ClipBatch,
    device: torch.device,
    guard: Guard,
) -> tuple[Tensor, float, float]:
    """One optimizer step on this worker's slice of a global batch; returns the metrics' sums, the gradient's norm, the rate."""
    lr = config.optim.set_lr(optimizers, step, config.steps)
    numbers = loop.sample_numbers(step, config.global_batch_size)
    draws = draw_prior_noise(config.model.clip_r, config.seed, numbers, config.drop_text).to(device)
    image, text, complete = (torch.from_numpy(values).to(device) for values in (batch.image, batch.text, batch.complete))
    losses = prior_loss(model, image, text, draws)
    # incomplete rows count as 0 rather than being left out of the mean, which would weigh the others by their worker
    loss = (losses * complete).mean()
    sums = sums_by_level(draws.t, losses, complete)
    return sums, loop.optimizer_step(model, optimizers, loss, config.optim.grad_clip, guard), lr


def means(sums: Tensor, num_steps: int) -> dict[str, float]:
    """Named means from the sums of some steps."""
    total, number = sums.view(2, NUM_BUCKETS).sum(dim=1)
    return {"loss": (total / number.clamp(min=1e-9)).item()} | means_by_level(sums)


def finish(config: TrainPriorConfig, state: dict[str, Tensor], device: torch.device, mlflow_run: tracking.Run) -> None:
    """Say how good the averaged weights are, and write them (rank 0)."""
    model = Prior(config.model)
    model.load_state_dict(state)
    cosine, of_another = agreement(model.to(device).eval(), config.data)
    tracking.log_metrics(mlflow_run, {"cosine": cosine, "cosine_of_another": of_another}, config.steps)
    print(f"the prior's embeddings have a cosine of {cosine:.3f} with their images', {of_another:.3f} with others'", flush=True)
    save_prior(Path(config.output) / "model", model)


def agreement(model: Prior, data: str, num: int = 64) -> tuple[float, float]:
    """Mean cosine of embeddings that the prior makes for a dataset's texts with those of their images, and with those of others.

    The texts are the first of the training data: this tells a prior that works from one that does not, not how well it
    does with texts it has not seen.
    """
    batch = TokenDataset(data).head(num, clip=True).clip
    assert batch is not None
    text, image = torch.from_numpy(batch.text[batch.complete]), torch.from_numpy(batch.image[batch.complete])
    made = F.normalize(sample_prior(model, text, seeds=range(len(text))).cpu())
    cosines = made @ F.normalize(image).T  # (B,B)
    own, num = cosines.diagonal(), len(text)
    return own.mean().item(), ((cosines.sum() - own.sum()) / max(1, num * num - num)).item()


if __name__ == "__main__":
    from pipelines.train_prior import presets as _presets
    from pipelines.train_prior import run as _run

    command_line.main(_run, _presets(), __doc__)
