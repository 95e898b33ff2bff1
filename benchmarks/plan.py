"""How right `pipelines.plan` is on this machine: its estimates against CPU workers that train.

    python benchmarks/plan.py                     # `tiny` and `small`: about four minutes on 2 cores
    python benchmarks/plan.py --one-billion       # memory of `paella-1b` at 64 pixels: needs 20 GB

Workers are processes with the program's own step, sharding, optimizers, averages and checkpoints, but without Ray, whose
start takes longer than the measurement. Memory is the largest resident set that a worker has had, as the kernel counts it, a
checkpoint included. The table gives ratios, estimated by measured; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from train import CAPTION, FRUGAL, make_text_encoder

from paella.checkpoint import TrainingState
from paella.ema import Ema
from paella.memory import worker_memory
from paella.parallel import ParallelConfig, compute_dtype, cpu_group, shard
from paella.training import TextToTokens
from pipelines import cli, plan, train_config
from pipelines.recovery import Guard
from pipelines.token_dataset import TokenBatch
from pipelines.train_config import TrainConfig
from pipelines.train_step import train_step

WORKERS = (1, 2)
BATCH_SIZES = {"tiny": 64, "small": 4, "paella-1b": 2}
STEPS = {"tiny": 10, "small": 10, "paella-1b": 2}


def make_config(root: Path, name: str, workers: int) -> TrainConfig:
    """A preset on so many workers, with a text encoder that is to be had; `paella-1b` as small as it gets."""
    config = train_config.presets()[name]
    model = config.model
    if model.text.new_byt5 is None:
        text = make_text_encoder(root / "byt5", model.unet.byt5_embd)
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, byt5=str(text), clip=None))
    places = {"data": "-", "vqgan": "-", "output": str(root)}
    config = dataclasses.replace(config, model=model, num_workers=workers, global_batch_size=BATCH_SIZES[name], **places)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, compile=False))
    if name == "paella-1b":
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(model, image_size=64),
            parallel=ParallelConfig(activation_checkpointing=True, loss_chunk=1024),
            precision="bf16",
            ema_decay=0.0,
            recovery=dataclasses.replace(config.recovery, asynchronous=False),
        )
    return config


def worker(rank: int, config: TrainConfig, steps: int) -> None:
    """Steps, and a checkpoint before the last of them; leaves its largest resident set before the model and at the end, and the
    median time of a step."""
    before, workers = largest_resident_set(), config.num_workers
    dist.init_process_group("gloo", init_method=f"file://{config.output}/store", rank=rank, world_size=workers)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // workers))
    device, dtype = torch.device("cpu"), compute_dtype(config.precision, torch.device("cpu"))
    model = TextToTokens(config.model, text_dtype=dtype).train()
    shard(model, dtype, config.parallel)
    optimizers, ema, guard = config.optim.optimizers(model, dtype), Ema(model, config.ema_decay), Guard(config.recovery)
    state, group, saving = TrainingState(model, optimizers, ema), cpu_group(), None
    size = config.global_batch_size // workers
    side = config.model.image_size // config.model.vqgan.downsampling
    rows = np.random.default_rng(rank).integers(config.model.unet.num_labels, size=(size, side, side))
    batch = TokenBatch(rows, [CAPTION] * size, [str(index) for index in range(size)])
    seconds = []
    for step in range(steps):
        if step == steps - 1:
            saving = state.save(Path(config.output) / "checkpoint", group, asynchronous=config.recovery.asynchronous)
        began = time.perf_counter()
        train_step(model, optimizers, config, step, batch, device, guard)
        ema.update(model, step)
        seconds.append(time.perf_counter() - began)
    assert saving is not None
    saving.result()
    found = {"before": before, "peak": largest_resident_set(), "seconds": statistics.median(seconds[1:-1] or seconds)}
    (Path(config.output) / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def largest_resident_set() -> int:
    """Of this process so far, in bytes; getrusage's begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def compare(name: str, workers: int) -> dict[str, Any]:
    """Estimates and measurements of a preset on so many workers."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIRECTORY")) as directory:
        root = Path(directory)
        config = make_config(root, name, workers)
        memory = worker_memory(
            config.model,
            config.global_batch_size // workers,
            compute_dtype(config.precision, torch.device("cpu")),
            num_shards=workers,
            parallel=config.parallel,
            averages=config.ema_decay > 0,
            asynchronous=config.recovery.asynchronous,
        )
        result: dict[str, Any] = {"estimated": vars(memory), "estimated_bytes": memory.total}
        if name != "paella-1b":
            planned = dataclasses.replace(
                plan.presets()[name],
                model=config.model,
                gpu="cpu",
                num_gpus=workers,
                global_batch_size=config.global_batch_size,
                parallel=config.parallel,
            )
            result["estimated_rate"] = plan.images_per_s(planned, config.images_per_pass)
        mp.spawn(worker, (config, STEPS[name]), nprocs=workers)
        found = [json.loads((root / f"found-{rank}.json").read_text()) for rank in range(workers)]
    return result | {
        "measured_bytes": max(one["peak"] for one in found),
        "measured_before": max(one["before"] for one in found),
        "measured_rate": config.global_batch_size / max(one["seconds"] for one in found),
    }


def main(names: list[str], numbers: list[int]) -> None:
    # as the program's workers have it, but that the largest model must fit
    os.environ.update(cli.WORKER_ENVIRONMENT | (FRUGAL if names == ["paella-1b"] else {}))
    results = {f"{name}, {number}": compare(name, number) for name in names for number in numbers}
    print(f"{'':12} {'GB a worker':>12} {'measured':>9} {'ratio':>6} {'images/s':>9} {'measured':>9} {'ratio':>6}")
    for name, found in results.items():
        estimate, measured = found["estimated_bytes"], found["measured_bytes"]
        line = f"{name:12} {estimate / 1e9:12.2f} {measured / 1e9:9.2f} {estimate / measured:6.2f}"
        if "estimated_rate" in found:
            rates = found["estimated_rate"], found["measured_rate"]
            line += f" {rates[0]:9.2f} {rates[1]:9.2f} {rates[0] / rates[1]:6.2f}"
        print(line)
    print(json.dumps({"benchmark": "plan", **results}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-billion", action="store_true")
    parser.add_argument("--only", choices=["tiny", "small"])
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    chosen = parser.parse_args()
    names = ["paella-1b"] if chosen.one_billion else [chosen.only] if chosen.only else ["tiny", "small"]
    main(names, [2] if chosen.one_billion else list(chosen.workers))
