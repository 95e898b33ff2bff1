"""Ray Train: starting a group of workers, and what each does first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def fit(worker: Callable[[dict], None], arguments: dict, output: Path, num_workers: int, cpus_for_data: int = 0) -> None:
    """Run `worker(arguments)` on every worker; checkpoints lie in `output`/checkpoints, and a rerun finds them there.
    Workers share the CPUs, all but `cpus_for_data`, which are for Ray Data's tasks.

    Raises RuntimeError with the worker's message where training failed for good.
    """
    gpu = torch.cuda.is_available()
    cpus = max(1, (int(ray.cluster_resources().get("CPU", 1)) - cpus_for_data) // num_workers)
    trainer = TorchTrainer(
        worker,
        train_loop_config=arguments | {"cpus_per_worker": cpus},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(output),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


def setup_worker(arguments: dict, seed: int) -> tuple[int, int, torch.device]:
    """Seed and threads of this worker; returns rank, world size and device."""
    context = ray.train.get_context()
    torch.manual_seed(seed)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # this worker's share of the machine: workers that each take all cores slow each other down
        torch.set_num_threads(arguments["cpus_per_worker"])
    return context.get_world_rank(), context.get_world_size(), device


@contextmanager
def resume_directory() -> Iterator[str | None]:
    """A local directory with the newest checkpoint, or None at the start of a run."""
    newest = ray.train.get_checkpoint()
    if newest is None:
        yield None
    else:
        with newest.as_directory() as directory:
            yield directory
