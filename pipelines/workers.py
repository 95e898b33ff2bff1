"""Ray Train: starting a group of workers, and what each does first."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines import recovery
from pipelines.checkpoints import open_directory, read, write

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray's own list of checkpoints, of which it writes no whole or nothing; ours are found by their manifests."""


def fit(worker: Callable[[dict], None], arguments: dict[str, Any], cpus_beside: int = 0) -> None:
    """Run `worker(arguments)` on every worker, and anew from the newest checkpoint where one fails.

    Workers share the CPUs of their nodes; without GPUs all but `cpus_beside`, which are for Ray Data's tasks or other actors.
    `arguments["config"]` is the program's: its output, num_workers (or min_workers to that), recovery and, if it has one, the
    accelerator. SIGTERM asks for a last checkpoint and an end.

    Raises RuntimeError with the worker's message where training failed for good; SystemExit where it has been asked to end.
    """
    config = arguments["config"]
    policy: recovery.RecoveryConfig = config.recovery
    gpu = ray.cluster_resources().get("GPU", 0) > 0  # of the cluster: this process may be on a head without
    accelerator = getattr(config, "accelerator", None)
    cpus = _cpus_per_worker(_resources_of_nodes(accelerator), config.num_workers, cpus_beside)
    place = policy.place(config.output)
    filesystem, root = open_directory(place)
    filesystem.create_dir(root)
    for name in (recovery.STOP_FILE, recovery.ENDED_FILE, SNAPSHOT):
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(f"{root}/{name}")
    trainer = TorchTrainer(
        worker,
        train_loop_config=arguments | {"cpus_per_worker": cpus},
        torch_config=_ListeningTorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
            timeout_s=round(2 * policy.stuck_after_s + 60),  # the watchdog comes first, and knows more
        ),
        scaling_config=ScalingConfig(
            num_workers=_scale(config),  # type: ignore[arg-type]
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpu else {}),
            accelerator_type=accelerator,
        ),
        run_config=RunConfig(
            name=root.rsplit("/", 1)[1],
            storage_path=place.rsplit("/", 1)[0],
            failure_config=FailureConfig(max_failures=policy.max_failures),
        ),
    )
    with _stopping(filesystem, f"{root}/{recovery.STOP_FILE}"):
        trainer.fit()
    if ended := read(filesystem, f"{root}/{recovery.ENDED_FILE}"):
        end = json.loads(ended)
        if end["failed"]:
            raise RuntimeError(end["reason"])
        print(end["reason"], file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)


def _resources_of_nodes(accelerator: str | None) -> list[Mapping[str, float]]:
    """What the nodes with that kind of GPU have; all nodes, where the autoscaler has still to start one of them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if f"accelerator_type:{accelerator}" in node] or nodes


def _cpus_per_worker(nodes: Sequence[Mapping[str, float]], num_workers: int, cpus_beside: int) -> float:
    """CPUs of each worker: what its node has for a GPU, on the node that has least; without GPUs the most that nodes have room
    for, since a worker is on one; a fraction where there are fewer CPUs than workers. Raises ValueError where there are none."""
    shares = [node.get("CPU", 0) / node["GPU"] for node in nodes if node.get("GPU", 0) > 0]
    if shares:
        share = min(shares)
        return int(share) if share >= 1 else share
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    free = sum(cpus) - cpus_beside
    if free < 1:
        raise ValueError("there are no CPUs for workers in the cluster")
    for share in range(max(cpus), 0, -1):
        if sum(cpu // share for cpu in cpus) >= num_workers and num_workers * share <= free:
            return share
    return 1 / math.ceil(num_workers / free)


def _scale(config: Any) -> int | tuple[int, int]:
    fewest = getattr(config, "min_workers", None)
    return config.num_workers if fewest is None else (fewest, config.num_workers)


@contextmanager
def _stopping(filesystem: pafs.FileSystem, stop_file: str) -> Iterator[None]:
    """SIGTERM to this process asks the workers to stop; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: object) -> None:
        print("stopping after a last checkpoint", file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write(filesystem, stop_file, b"")

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _ListeningBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Torch's process group; workers take SIGTERM as a request, which only their main thread can set up."""

    def on_training_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(recovery.listen)


@dataclass
class _ListeningTorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type:
        return _ListeningBackend


def setup_worker(arguments: dict, seed: int) -> tuple[int, int, torch.device]:
    """Seed and threads of this worker; returns rank, world size and device."""
    context = ray.train.get_context()
    torch.manual_seed(seed)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # this worker's share of the machine: workers that each take all cores slow each other down
        torch.set_num_threads(max(1, int(arguments["cpus_per_worker"])))
    return context.get_world_rank(), context.get_world_size(), device
