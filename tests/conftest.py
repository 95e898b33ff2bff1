"""What several test files share: Ray on this machine, a small set of scenes, bundles with random weights, running a program."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

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
    save_bundle(path, config, Paella(config.unet).state_dict(), VQModel(config.vqgan), text, "card")
    return path


@pytest.fixture
def program():
    """Run a program as a user would; returns the finished process."""

    def run(name: str, *arguments: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "pipelines" / f"{name}.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)

    return run


def assert_one_sentence(process: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and exactly one line that names the problem."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, process.stderr
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in lines[0], lines[0]
