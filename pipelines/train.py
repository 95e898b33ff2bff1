"""Train the U-Net (and, in `tiny` or with --text, its text encoder) on a token dataset, on any number of workers.

    python pipelines/train.py tiny --data runs/demo/tokens --vqgan runs/demo/vqgan --output runs/mine --steps 200
    ray job submit --working-dir . -- python pipelines/train.py paella-1b --data s3://me/tokens …

The same command again continues from the newest complete checkpoint; a finished run says so and does nothing.
The output holds `model` (a bundle), `samples/`, checkpoints and the id of the run in MLflow.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch.distributed as dist

from paella import command_line
from paella.bundle import load_vqgan
from paella.ema import Ema
from paella.parallel import compute_dtype, count_parameters, full_state_dict, shard
from paella.storage import new_file
from paella.training import TextToTokens, metrics_of
from pipelines import cli, initial_weights, loop, tracking
from pipelines.export import write_bundle
from pipelines.gauges import TrainingGauges
from pipelines.progress import Progress
from pipelines.samples import Samples
from pipelines.sight import Trace, Utilisation
from pipelines.text_stage import TextStage, start_actors
from pipelines.train_config import TrainConfig, check_data, presets, resolved
from pipelines.train_step import train_step
from pipelines.validation import Validation
from pipelines.workers import fit, setup_worker


def run(config: TrainConfig) -> Path:
    """Train; returns the bundle's directory. Raises ValueError for the user's mistakes, before any worker starts."""
    config = initial_weights.with_text_encoder(resolved(config))
    check_data(config)
    initial_weights.check(config)
    output = loop.require_places(config)
    values = cli.config_values(config)
    cli.require_same_config(output, values, config)
    bundle, finished = output / "model", output / "registered_model.txt"
    if finished.exists():
        print(f"training is finished: {bundle} (MLflow: {finished.read_text().strip()})")
        return bundle
    mlflow_run = tracking.open_run(output, f"train {output.name}", values)
    if not (bundle / "config.json").exists():
        cli.start_ray()
        actors = start_actors(config)
        fit(train_worker, {"config": config, "mlflow_run": mlflow_run, "text_actors": actors}, cpus_beside=len(actors))
    uri = tracking.finish_run(mlflow_run, bundle, config.register_as)
    with new_file(finished) as file:
        file.write_text(f"{uri}\n")
    print(f"trained: {bundle} (MLflow: {uri})")
    return bundle


def train_worker(arguments: dict) -> None:
    """One worker of the training group."""
    config: TrainConfig = arguments["config"]
    rank, world_size, device = setup_worker(arguments, config.seed)
    dtype = compute_dtype(config.precision, device)
    model = TextToTokens(
        config.model,
        device=device,
        text_dtype=dtype,
        text_root=initial_weights.text_root(config),
        balance=config.noise.balance > 0,
    )
    vqgan = load_vqgan(config.vqgan)[0]
    initial_weights.initialise(model, vqgan.vquantizer.codebook.weight, config)
    model, vqgan = model.to(device).train(), vqgan.to(device)
    if config.given_states:
        model.text.free()  # only sheets of samples need it
    num_parameters = count_parameters(model)
    shard(model, dtype, config.parallel)
    # an encoder that is new has nothing to lose, and learns at the full rate
    optim = config.optim if config.model.text.train else dataclasses.replace(config.optim, text_lr_share=1.0)
    optimizers = optim.optimizers(model, dtype)
    ema = Ema(model, config.ema_decay)
    use = Utilisation(config.model, device, dtype, world_size)
    trace = Trace(config.profile, Path(config.output), arguments["mlflow_run"], enabled=rank == 0)
    text_stage = TextStage(arguments["text_actors"], rank, config.images_per_pass)
    validation = Validation(config, vqgan, arguments["mlflow_run"], device, text_stage)
    report = loop.Report(
        arguments["mlflow_run"],
        metrics_of,
        shown=("loss", "accuracy"),
        steps=config.steps,
        global_batch_size=config.global_batch_size,
        unit="images",
        more=use.metrics,
        observe=TrainingGauges(Path(config.output).name).set,
    )
    training = loop.Training(config, arguments["mlflow_run"], model, optimizers, ema, report)
    samples = Samples(config, vqgan, arguments["mlflow_run"], rank, world_size, device)
    if rank == 0:
        print(f"{num_parameters / 1e6:.1f} M parameters on {world_size} workers, from step {training.step}", flush=True)
    progress = Progress("train", config.steps, training.step, enabled=rank == 0)
    stream = config.token_stream()
    clip = config.model.text.clip is not None
    batches = functools.partial(stream.batches, rank, world_size, clip=clip, states=config.stored_text)
    for step, batch in training.steps(lambda start: use.watched(text_stage(batches(start)))):
        trace.before(step)
        sums, norm, lr = train_step(model, optimizers, config, step, batch, device, training.guard)
        ema.update(model, step)
        progress.update(step + 1, report.step(step, sums, norm, lr))
        trace.after(step)
        done = step + 1
        if due(config.validate_every, done, config.steps):
            training.score = validation.measure(model, ema, done)
        if due(config.sample_every, done, config.steps):
            samples.draw(model, ema, done)
    if training.ended:
        return
    with ema.swapped_into(model):
        state = full_state_dict(model)
    if rank == 0:
        metrics = tracking.metrics_at(arguments["mlflow_run"], config.steps)
        write_bundle(Path(config.output) / "model", config, state, config.steps, metrics)
    dist.barrier()


def due(every: int, done: int, steps: int) -> bool:
    """Whether something that is to happen every so many steps, and after the last, is to happen now; 0 is never."""
    return every > 0 and (done % every == 0 or done == steps)


if __name__ == "__main__":
    from pipelines.train import run as _run

    command_line.main(_run, presets(), __doc__)
