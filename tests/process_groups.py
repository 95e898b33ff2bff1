"""Groups of processes that work together without a Ray cluster. Importing takes seconds: one process has imported what they need,
and they are forked from it.
"""

import contextlib
import functools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import free_ports
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines import cli

IMPORTED = ["pytest", "mlflow", "open_clip", "transformers.models.t5.modeling_t5", "pipelines.train", "pipelines.train_vqgan"]


def start_group(function: Callable[..., None], num_workers: int, root: Path, *arguments: object, join: bool = True):
    """Call `function(rank, *arguments)` in each of so many processes, which are one gloo group.

    Raises what one of them raises. What they print goes to files in `root`, see `said`.
    """
    store = f"file://{root}/store-{function.__name__}-{num_workers}"
    return _fork(_in_gloo, num_workers, root, (num_workers, store, function, arguments), join)


def said(root: Path) -> str:
    """What the workers have printed."""
    return "".join(file.read_text() for file in root.glob("said-*"))


@contextlib.contextmanager
def without_a_cluster(program: ModuleType) -> Iterator[None]:
    """In this block a training program has its workers from here, by Ray Train's local mode and as torchrun would start them:
    a run of Ray's own actors takes half a minute longer.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        patch.setattr(cli, "start_ray", lambda: None)
        patch.setattr(program, "fit", functools.partial(_fit, Path(root)))
        yield


def _fit(root: Path, worker: Callable[[dict], None], arguments: dict[str, Any], cpus_beside: int = 0) -> None:
    """In place of `pipelines.workers.fit`, for runs that nothing interrupts."""
    config = arguments["config"]
    Path(config.recovery.place(config.output)).mkdir(parents=True, exist_ok=True)
    group = {"WORLD_SIZE": config.num_workers, "LOCAL_WORLD_SIZE": config.num_workers, "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": free_ports(1)[0]}
    _fork(_in_local_mode, config.num_workers, root, (group, worker, arguments | {"cpus_per_worker": 1}), join=True)


def _fork(start: Callable[..., None], num_workers: int, root: Path, given: tuple, join: bool):
    multiprocessing.set_forkserver_preload(IMPORTED)
    given = (start, dict(os.environ), str(root), given)
    return mp.start_processes(_forked, given, nprocs=num_workers, join=join, start_method="forkserver")


def _forked(rank: int, start: Callable[..., None], environment: dict[str, str], root: str, given: tuple) -> None:
    os.environ.update(environment)  # this test's, which may be younger than the process that forked this one
    sys.stdout = sys.stderr = Path(root, f"said-{rank}").open("a", 1)  # noqa: SIM115 (the server’s own were the first test’s)
    torch.set_num_threads(1)
    start(rank, *given)


def _in_gloo(rank: int, num_workers: int, store: str, function: Callable[..., None], arguments: tuple) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_workers)
    function(rank, *arguments)
    dist.destroy_process_group()


def _in_local_mode(rank: int, group: dict[str, object], worker: Callable[[dict], None], arguments: dict[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()})
    TorchTrainer(worker, train_loop_config=arguments, scaling_config=ScalingConfig(num_workers=0)).fit()
