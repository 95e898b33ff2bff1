"""Train the U-Net (and, in `tiny`, its text encoder) on a token dataset, on any number of workers.

    python pipelines/train.py tiny --data runs/demo/tokens --vqgan runs/demo/vqgan --output runs/mine --steps 200
    ray job submit --working-dir . -- python pipelines/train.py paella-1b --data s3://me/tokens …

The same command again continues from the newest complete checkpoint; a finished run says so and does nothing.
The output holds `model` (a bundle), `samples/`, checkpoints and the id of the run in MLflow.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from paella import command_line
from paella.bundle import load_vqgan
from paella.ema import Ema
from paella.parallel import compute_dtype, count_parameters, full_state_dict, shard
from paella.short_run import initialise_byt5, initialise_unet
from paella.storage import new_file
from paella.training import TextToTokens, draw_noise, loss_and_metrics, metrics_of
from pipelines import cli, loop, tracking
from pipelines.export import save_trained
from pipelines.progress import Progress
from pipelines.recovery import Guard
from pipelines.samples import Samples
from pipelines.token_dataset import TokenBatch, TokenDataset
from pipelines.token_stream import TokenStream
from pipelines.train_config import TrainConfig, check_data, presets, resolved
from pipelines.workers import fit, setup_worker


def run(config: TrainConfig) -> Path:
    """Train; returns the bundle's directory. Raises ValueError for the user's mistakes, before any worker starts."""
    config = resolved(config)
    check_data(config)
    output = loop.require_places(config)
    values = cli.config_values(config)
    cli.require_same_config(output, values)
    bundle, finished = output / "model", output / "registered_model.txt"
    if finished.exists():
        print(f"training is finished: {bundle} (MLflow: {finished.read_text().strip()})")
        return bundle
    mlflow_run = tracking.open_run(output, f"train {output.name}", values)
    if not (bundle / "config.json").exists():
        cli.start_ray()
        fit(train_worker, {"config": config, "mlflow_run": mlflow_run})
    uri = tracking.finish_run(mlflow_run, bundle, config.register_as)
    with new_file(finished) as file:
        file.write_text(f"{uri}\n")
    print(f"trained: {bundle} (MLflow: {uri})")
    return bundle


def train_worker(arguments: dict) -> None:
    """One worker of the training group."""
    config: TrainConfig = arguments["config"]
    rank, world_size, device = setup_worker(arguments, config.seed)
    model = TextToTokens(config.model).to(device).train()
    vqgan = load_vqgan(config.vqgan)[0].to(device)
    if config.init == "short-run":
        initialise_unet(model.unet, vqgan.vquantizer.codebook.weight)
        if config.model.text.new_byt5 is not None:
            initialise_byt5(model.text.byt5)
    num_parameters = count_parameters(model)
    shard(model, compute_dtype(config.precision, device))
    optimizers = config.optim.optimizers(model)
    ema = Ema(model, config.ema_decay)
    report = loop.Report(
        arguments["mlflow_run"],
        metrics_of,
        shown=("loss", "accuracy"),
        steps=config.steps,
        global_batch_size=config.global_batch_size,
        unit="images",
    )
    training = loop.Training(config, arguments["mlflow_run"], model, optimizers, ema, report)
    samples = Samples(config, vqgan, arguments["mlflow_run"], rank, world_size, device)
    if rank == 0:
        print(f"{num_parameters / 1e6:.1f} M parameters on {world_size} workers, from step {training.step}", flush=True)
    progress = Progress("train", config.steps, training.step, enabled=rank == 0)
    stream = TokenStream(
        [TokenDataset(uri) for uri in config.datasets],
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        weights=config.data_weights,
    )
    clip = config.model.text.clip is not None
    batches = functools.partial(stream.batches, rank, world_size, clip=clip)
    for step, batch in training.steps(batches):
        sums, norm, lr = train_step(model, optimizers, config, step, batch, device, training.guard)
        ema.update(model, step)
        progress.update(step + 1, report.step(step, sums, norm, lr))
        done = step + 1
        if done % config.sample_every == 0 or done == config.steps:
            samples.draw(model, ema, done)
    if training.ended:
        return
    with ema.swapped_into(model):
        state = full_state_dict(model)
    if rank == 0:
        save_trained(config, state)
    dist.barrier()


def train_step(
    model: TextToTokens,
    optimizers: loop.Optimizers,
    config: TrainConfig,
    step: int,
    batch: TokenBatch,
    device: torch.device,
    guard: Guard,
) -> tuple[Tensor, float, float]:
    """One optimizer step on this worker's slice of a global batch; returns the metrics' sums, the gradient's norm, the rate."""
    lr = config.optim.set_lr(optimizers, step, config.steps)
    tokens = torch.from_numpy(batch.tokens)
    numbers = loop.sample_numbers(step, config.global_batch_size)
    draws = draw_noise(tokens, config.model.unet.num_labels, config.seed, numbers, config.noise)
    text = model.text.tokenize(batch.captions)
    inputs = [value.to(device) for value in (draws.noised, draws.t, text.ids, text.mask)]
    if batch.clip is None:
        logits = model(*inputs, draws.keep.to(device))
    else:
        complete = torch.from_numpy(batch.clip.complete)
        keep = dataclasses.replace(draws.keep, clip=draws.keep.clip & complete, clip_image=draws.keep.clip_image & complete)
        embeddings = [torch.from_numpy(values).to(device) for values in (batch.clip.text, batch.clip.image)]
        logits = model(*inputs, keep.to(device), *embeddings)
    moved = dataclasses.replace(draws, t=draws.t.to(device), weight=draws.weight.to(device))
    loss, sums = loss_and_metrics(logits, tokens.to(device), moved, config.label_smoothing)
    return sums, loop.optimizer_step(model, optimizers, loss, config.optim.grad_clip, guard), lr


if __name__ == "__main__":
    from pipelines.train import run as _run

    command_line.main(_run, presets(), __doc__)
