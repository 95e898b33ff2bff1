"""How right `pipelines.plan` is on this machine: its estimates against what train.py takes on two CPU workers.

    python benchmarks/plan.py                     # `tiny` and `small`: about four minutes on 2 cores
    python benchmarks/plan.py --one-billion       # memory of `paella-1b` at 64 pixels: needs 24 GB

Memory is the largest resident set that a worker process has had, as the kernel counts it, checkpoint and end included; images a
second are what the program logs of itself. The table gives ratios, estimated by measured; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from train import ONE_BILLION, WORKERS, make_data, make_text_encoder, run_program

from paella.config import PRESETS, ModelConfig
from paella.memory import worker_memory
from paella.parallel import ParallelConfig, compute_dtype
from pipelines import plan, tracking

STEPS = 40
BATCH_SIZES = {"tiny": 64, "small": 4, "paella-1b": 2}


class Peak:
    """Largest resident set of any training worker below this process; called again and again."""

    def __init__(self, until: Callable[[], bool] = lambda: False) -> None:
        self.num_bytes, self.until = 0, until

    def __call__(self) -> bool:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                if "TrainWorker" in " ".join(process.cmdline()):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    found = re.search(r"VmHWM:\s+(\d+) kB", status)
                    self.num_bytes = max(self.num_bytes, int(found.group(1)) * 1024 if found else 0)
        return self.until()


def estimated_bytes(config: ModelConfig, images: int, parallel: ParallelConfig, precision: str = "auto", **more: bool) -> dict:
    """Parts of a worker's memory."""
    dtype = compute_dtype(precision, torch.device("cpu"))
    memory = worker_memory(config, images, dtype, num_shards=WORKERS, parallel=parallel, **more)
    return vars(memory) | {"total": memory.total}


def compare(name: str) -> dict[str, Any]:
    """Estimates and measurements of a preset."""
    config, batch = PRESETS[name], BATCH_SIZES[name]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_data(root, config, 128)
        arguments: list[object] = [
            name, "--steps", STEPS, "--global-batch-size", batch, "--checkpoint-every", STEPS - 10,
            "--sample-every", 0, "--validation-images", 0, "--validate-every", 0, "--parallel.no-compile",
        ]  # fmt: skip
        if config.text.new_byt5 is None:
            text = dataclasses.replace(config.text, byt5=str(make_text_encoder(root / "byt5", config.unet.byt5_embd)))
            config = dataclasses.replace(config, text=text)
        planned = dataclasses.replace(
            plan.presets()[name], model=config, gpu="cpu", num_gpus=WORKERS, global_batch_size=batch, parallel=ParallelConfig()
        )
        rate = plan.images_per_s(planned, batch)
        memory = estimated_bytes(config, batch // WORKERS, ParallelConfig(loss_chunk=plan.presets()[name].parallel.loss_chunk))
        peak = Peak()
        run = run_program(root, arguments, peak)
        measured = [value for step, value in tracking.metric_history(run, "images_per_s") if step > 20]
    return {
        "estimated_rate": rate,
        "measured_rate": statistics.median(measured),
        "estimated_bytes": memory,
        "measured_bytes": peak.num_bytes,
    }


def one_billion() -> dict[str, Any]:
    """The same of `paella-1b`, memory only, as `benchmarks/train.py --one-billion --image-size 64` runs it."""
    config = dataclasses.replace(PRESETS["paella-1b"], image_size=64)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_data(root, config, 8)
        text = dataclasses.replace(config.text, byt5=str(make_text_encoder(root / "byt5", config.unet.byt5_embd)), clip=None)
        config = dataclasses.replace(config, text=text)
        parallel = ParallelConfig(activation_checkpointing=True, loss_chunk=1024)
        memory = estimated_bytes(config, 1, parallel, "bf16", averages=False, asynchronous=False)

        def done() -> bool:
            saved = list((root / "run" / "checkpoints").glob("*/manifest.json"))
            return bool(saved) and tracking.last_step(tracking.run_of(root / "run"), "loss") == 3

        peak = Peak(done)
        run_program(root, [*ONE_BILLION, "--model.image-size", 64], peak)
    return {"estimated_bytes": memory, "measured_bytes": peak.num_bytes}


def main(names: list[str]) -> None:
    results = {name: one_billion() if name == "paella-1b" else compare(name) for name in names}
    print(f"\n{'':12} {'GB a worker':>12} {'measured':>9} {'ratio':>6} {'images/s':>9} {'measured':>9} {'ratio':>6}")
    for name, found in results.items():
        estimate, measured = found["estimated_bytes"]["total"], found["measured_bytes"]
        line = f"{name:12} {estimate / 1e9:12.2f} {measured / 1e9:9.2f} {estimate / measured:6.2f}"
        if "measured_rate" in found:
            rates = found["estimated_rate"], found["measured_rate"]
            line += f" {rates[0]:9.2f} {rates[1]:9.2f} {rates[0] / rates[1]:6.2f}"
        print(line)
    print(json.dumps({"benchmark": "plan", **results}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-billion", action="store_true")
    parser.add_argument("--only", choices=["tiny", "small"])
    chosen = parser.parse_args()
    main(["paella-1b"] if chosen.one_billion else [chosen.only] if chosen.only else ["tiny", "small"])
