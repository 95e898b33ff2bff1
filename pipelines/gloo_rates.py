"""How fast two processes of this machine exchange what FSDP does: weights that are gathered, gradients that are summed."""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2**26
"""Bytes that each of them has in the end."""
ROUNDS = 20


@functools.cache
def gloo_rates() -> tuple[float, float]:
    """Bytes a second that a process receives: of shards that it gathers, and of sums that are scattered."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_exchange, (directory,), nprocs=2)
        gathered, scattered = json.loads(Path(directory, "rates").read_text())
    return gathered, scattered


def _exchange(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    whole, part = torch.ones(SIZE // 4), torch.ones(SIZE // 8)
    collectives = (lambda: dist.all_gather_into_tensor(whole, part), lambda: dist.reduce_scatter_tensor(part, whole))
    times: list[list[float]] = [[], []]
    for index in [0, 1] * ROUNDS:
        dist.barrier()  # or one would be charged with the wait for the other
        began = time.perf_counter()
        collectives[index]()
        times[index].append(time.perf_counter() - began)
    if rank == 0:
        rates = [SIZE / 2 / statistics.median(values) for values in times]
        Path(directory, "rates").write_text(json.dumps(rates))
    dist.destroy_process_group()
