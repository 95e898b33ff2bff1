"""A run of the demo as one line of docs/pulse.md: what it took, and what its pictures show of their captions."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paella.parallel import compute_dtype
from pipelines.cli import ROOT

ACCURACY = ("background", "size", "colour", "position", "shape", "all")
"""From what is learned first to what is learned last."""


def pulse(flops: Mapping[str, float], seconds: float, accuracy: Mapping[str, float]) -> dict[str, Any]:
    """Return the run's line, in its parts and as a row of docs/pulse.md's table.

    Args:
        flops: of each training stage.
        seconds: of the whole run.
        accuracy: share of pictures that show what their captions say, by attribute; {} for images that no checker knows.
    """
    values = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "tflop": round(sum(flops.values()) / 1e12, 1),
        "tflop_by_stage": {name: round(number / 1e12, 1) for name, number in flops.items()},
        "seconds": round(seconds),
        "machine": machine(),
        "accuracy": {name: round(accuracy[name], 2) for name in ACCURACY if name in accuracy},
    }
    return values | {"row": row(values)}


def row(values: Mapping[str, Any]) -> str:
    """Return a line as a row of a Markdown table."""
    accuracy = [f"{values['accuracy'][name]:.2f}" if name in values["accuracy"] else "–" for name in ACCURACY]
    cells = (values["date"], values["commit"], f"{values['tflop']:.1f}", values["seconds"], values["machine"], *accuracy)
    return f"| {' | '.join(map(str, cells))} |"


def commit() -> str:
    """Return the commit of this checkout, with -dirty where files differ from it; "unknown" where there is no repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    """Return what the demo runs on: cores, their name, and whether they multiply bfloat16; the GPU where there is one."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    bf16 = compute_dtype("auto", torch.device("cpu")) == torch.bfloat16
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {name}{' with bfloat16' if bf16 else ''}{gpu}"
