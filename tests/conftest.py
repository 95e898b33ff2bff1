"""What several test files share: Ray on this machine, a small set of scenes, bundles with random weights, running a program."""

import contextlib
import dataclasses
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

# Torch's threads spin while they wait for each other: 8 ms for every operation where another process has their CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # encoders that do not exist are asked for there five times over

import numpy as np
import psutil
import pytest
import torch
from processes import Processes
from seaweedfs import start_s3
from served import KEYS, ROOT, serving
from two_processes import pytest_xdist_make_scheduler

from paella.bundle import save_bundle, save_vqgan
from paella.conditioning import TextEncoders
from paella.config import PRESETS, ModelConfig, VQConfig
from paella.images import to_tensor
from paella.unet import Paella
from paella.vqgan import VQModel
from pipelines import cli, img2dataset_layout, scenes, train_clip

__all__ = ["pytest_xdist_make_scheduler"]  # a hook

os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how soon the end of a run is seen
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more for each run; no test has nodes that go

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


@pytest.fixture(scope="session", autouse=True)
def mlflow_runs(tmp_path_factory) -> Iterator[None]:
    """One database for all runs: to make one takes MLflow seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory) -> Path:
    """96 captioned scenes in webdataset shards of 32."""
    path = tmp_path_factory.mktemp("data") / "shards"
    return img2dataset_layout.write_webdataset(path, scenes.scenes(96, seed=5, held_out=False), shard_size=32)


@pytest.fixture(scope="session")
def vqgan_bundle(tmp_path_factory) -> Path:
    """A VQGAN with random weights whose codes all occur: with the initial codebook near 0, one would be nearest to everything."""
    torch.manual_seed(0)
    path, model = tmp_path_factory.mktemp("vqgan") / "bundle", VQModel(SMALL_VQ).eval()
    with torch.inference_mode():
        images = np.stack([image for _, image in scenes.scenes(16, seed=9, held_out=False)])
        latents = model.encode_latents(to_tensor(images)).permute(0, 2, 3, 1).reshape(-1, 4)
        model.vquantizer.codebook.weight.copy_(latents[torch.randperm(len(latents))[:32]])
    save_vqgan(path, model)
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


@pytest.fixture(scope="session")
def clip_directory(tmp_path_factory) -> Path:
    """A small CLIP with random weights, in open_clip's format."""
    import open_clip

    torch.manual_seed(0)
    path, config = tmp_path_factory.mktemp("clip") / "model", train_clip.ClipConfig(patch_size=16, width=32, layers=1)
    train_clip.save_clip(path, open_clip.CLIP(**config.open_clip(32)), config, 32)
    return path


@pytest.fixture(scope="session")
def clip_bundle(tmp_path_factory, clip_directory) -> Path:
    """A bundle with random weights, in which every condition can be heard, and a CLIP."""
    torch.manual_seed(0)
    path, config = tmp_path_factory.mktemp("model") / "bundle", small_config()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, clip=str(clip_directory)))
    unet = Paella(config.unet)
    torch.nn.init.normal_(unet.clf[1].weight)
    weights = {"unet": unet.state_dict(), "vqgan": VQModel(config.vqgan).state_dict()}
    save_bundle(path, config, weights, "card", TextEncoders.create(config.text))
    return path


@pytest.fixture(scope="session")
def server(clip_bundle):
    """Address and process of a server with two API keys and room for 24 images."""
    with serving(clip_bundle, "--max-queued-images", "24", PAELLA_API_KEYS=", ".join(KEYS)) as (address, process):
        yield address, process


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The variables that name an S3 server: of the environment, or of a SeaweedFS that is started here."""
    if "AWS_ENDPOINT_URL" in os.environ:
        yield {}
        return
    directory = tmp_path_factory.mktemp("s3")
    state = Processes(directory / "processes.json")
    state.place = str(directory)
    try:
        start_s3(state)
        yield state.variables
    finally:
        state.end()


@pytest.fixture
def bucket(s3_server, monkeypatch) -> Iterator[str]:
    """A new bucket, as s3://…, on a real S3 server."""
    import s3fs

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # they remember other variables
    filesystem = s3fs.S3FileSystem()
    name = f"paella-{uuid.uuid4().hex[:12]}"
    filesystem.mkdir(name)
    yield f"s3://{name}"
    filesystem.rm(name, recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def running(command: list, url: str, timeout_s: float = 90) -> Iterator[None]:
    """A server, from when it answers at `url` until the block ends."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            assert process.poll() is None and time.monotonic() < deadline, f"{command[0]} does not answer"
            time.sleep(0.2)
        yield
    finally:
        family = [psutil.Process(process.pid)] if process.poll() is None else []
        for member in [child for parent in family for child in parent.children(recursive=True)] + family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


@pytest.fixture
def program(monkeypatch, capfd):
    """Run a program's file as a user would, but in this process, which has imported everything; returns how it ended."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "pipelines" / f"{name}.py"), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capfd.readouterr()  # what was there before
        code = 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(command, code, *capfd.readouterr())

    return run


@contextlib.contextmanager
def worker_here() -> Iterator[None]:
    """A generating job's worker in this process, for tests of something else than how Ray runs it."""
    import pyarrow as pa

    from pipelines import generate
    from pipelines.picture_stages import GeneratePictures

    class Rows(list):
        def iter_rows(self):
            return iter(self)

    def generated(config, digest, missing):
        stage = GeneratePictures(config, digest)
        tables = [stage(pa.table({"unit": [pickle.dumps(unit)]})) for unit in missing]
        stage.loop.close()
        return Rows(table.to_pylist()[0] for table in tables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "generated", generated)
        patch.setattr(cli, "start_ray", lambda: None)
        yield


@pytest.fixture
def without_ray():
    with worker_here():
        yield


def killed_when(command: list, happened: Callable[[], object], timeout_s: float = 200) -> None:
    """Start a program and kill it, with all its descendants, as soon as `happened()`."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
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
    """Whether a training run has a checkpoint that a rerun continues from."""
    return any(output.glob("checkpoints/step-*/manifest.json"))


def assert_one_sentence(process: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and exactly one line that names the problem."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, process.stderr
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in lines[0], lines[0]
