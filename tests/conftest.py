"""What several test files share: Ray on this machine, a small set of scenes, bundles with random weights, running a program."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from paella.bundle import save_bundle, save_vqgan
from paella.conditioning import TextEncoders
from paella.config import PRESETS, ModelConfig, VQConfig
from paella.unet import Paella
from paella.vqgan import VQModel
from pipelines import cli, img2dataset_layout, scenes

os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ROOT = Path(__file__).resolve().parents[1]
SMALL_VQ = VQConfig(bottleneck_blocks=1, c_hidden=16, codebook_size=32)


def small_config() -> ModelConfig:
    """`tiny`, but small enough for a test."""
    tiny = PRESETS["tiny"]
    unet = dataclasses.replace(
        tiny.unet,
        num_labels=32,
        c_hidden=(16, 16),
        c_in=8,
        c_out=8,
        c_cond=16,
        nhead=(2, 2),
        blocks=(1, 1),
        level_config=("CT", "CTA"),
    )
    return dataclasses.replace(tiny, unet=unet, vqgan=SMALL_VQ)


@pytest.fixture(scope="session")
def ray_session():
    """Ray as the programs start it."""
    import ray

    cli.start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory) -> Path:
    """96 captioned scenes in webdataset shards of 32."""
    path = tmp_path_factory.mktemp("data") / "shards"
    return img2dataset_layout.write_webdataset(path, scenes.scenes(96, seed=5, held_out=False), shard_size=32)


@pytest.fixture(scope="session")
def vqgan_bundle(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vqgan") / "bundle"
    save_vqgan(path, VQModel(SMALL_VQ))
    return path


@pytest.fixture(scope="session")
def model_bundle(tmp_path_factory) -> Path:
    """A bundle that can generate, with random weights."""
    torch.manual_seed(0)
    path, config = tmp_path_factory.mktemp("model") / "bundle", small_config()
    text = TextEncoders.create(config.text)
    weights = {"unet": Paella(config.unet).state_dict(), "vqgan": VQModel(config.vqgan).state_dict()}
    save_bundle(path, config, weights, "card", text)
    return path


@pytest.fixture
def program():
    """Run a program as a user would; returns the finished process."""

    def run(name: str, *arguments: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "pipelines" / f"{name}.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)

    return run


def killed_when(command: list, happened: Callable[[], object], timeout_s: float = 200) -> None:
    """Start a program and kill it, with all its descendants, as soon as `happened()`."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    often = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}  # Ray takes note of checkpoints this often, not every 2 s
    process = subprocess.Popen(command, start_new_session=True, env=often, **quiet)
    deadline = time.monotonic() + timeout_s
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for relative in family:  # Ray's own processes are in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            relative.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)
    assert happened(), "the program was over, or too slow, before there was something to interrupt"


def checkpointed(output: Path) -> bool:
    """Whether a training run has a checkpoint that a rerun continues from: one that Ray has taken note of."""
    return (output / "checkpoints" / "checkpoint_manager_snapshot.json").exists()


def assert_one_sentence(process: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and exactly one line that names the problem."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, process.stderr
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in lines[0], lines[0]
