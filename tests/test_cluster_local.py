"""The way of cluster/README.md on a cluster of processes: tokenize → train → evaluate → generate → serve by `ray job submit` and
`serve deploy`, code and data on S3, a node killed in tokenizing and another in training."""

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import Image

from paella.bundle import save_vqgan
from paella.config import PRESETS
from paella.vqgan import VQModel
from pipelines import img2dataset_layout, scenes

PLACE = ROOT / "runs" / "cluster"
BIN = Path(sys.executable).parent
NUM_IMAGES = 192
PROMPT = "a small red circle on a black background"
SAMPLING = ("--sampling.num-inference-steps", "4", "--sampling.temperature", "1.0", "0.3", "--sampling.cfg", "4.0")


def local(action: str) -> None:
    subprocess.run([sys.executable, ROOT / "cluster" / "local.py", action], check=True, timeout=400)


class Cluster:
    """What is up, and what the story does to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        pairs = [line.split("=", 1) for line in (PLACE / "env").read_text().splitlines()]
        self.variables = dict(pairs)
        self.environment = os.environ | self.variables | {"PATH": f"{BIN}:{os.environ['PATH']}"}
        self.s3 = boto3.client(
            "s3",
            endpoint_url=self.variables["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.variables["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def upload(self, directory: Path, prefix: str) -> None:
        for file in directory.rglob("*"):
            if file.is_file():
                self.s3.upload_file(str(file), "paella", f"{prefix}/{file.relative_to(directory)}")

    def keys(self, prefix: str) -> list[str]:
        return [item["Key"] for item in self.s3.list_objects_v2(Bucket="paella", Prefix=prefix).get("Contents", [])]

    def submit(self, *command: object, meanwhile: Callable[[], None] = lambda: None, timeout_s: float = 300) -> str:
        """Run a job to its end; returns its log."""
        submit = ["ray", "job", "submit", "--runtime-env", ROOT / "cluster" / "base" / "runtime_env.yaml", "--", "python"]
        log = self.root / "job.log"
        with log.open("w") as file:
            arguments = [str(part) for part in (*submit, *command)]
            job = subprocess.Popen(arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            try:
                meanwhile()
                code = job.wait(timeout=timeout_s)
            finally:
                job.kill()
        assert code == 0, log.read_text()[-8000:]
        return log.read_text()

    def kill_node(self, when: Callable[[], object], running: str, timeout_s: float = 240) -> None:
        """As soon as something has happened, kill a node on which such a process runs, and start another."""
        deadline = time.monotonic() + timeout_s
        while True:
            assert time.monotonic() < deadline, (self.root / "job.log").read_text()[-8000:]
            time.sleep(0.1)
            if when() and (family := self.node_with(running)):
                break
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        local("node")

    def node_with(self, running: str) -> list[psutil.Process]:
        """The processes of a node on which such a process runs."""
        for entry in json.loads((PLACE / "state.json").read_text())["processes"]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if entry["name"].startswith("node-"):
                    process = psutil.Process(entry["pid"])
                    children = process.children(recursive=True)
                    if any(running in " ".join(child.cmdline()) for child in children):
                        return [process, *children]
        return []


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    local("up")
    started = [entry["pid"] for entry in json.loads((PLACE / "state.json").read_text())["processes"]]
    directory = Path(json.loads((PLACE / "state.json").read_text())["directory"])
    try:
        yield Cluster(tmp_path)
    finally:
        local("down")
    assert not PLACE.exists() and not directory.exists()
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in started)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_from_images_to_an_endpoint_with_two_nodes_lost(cluster):
    prepare(cluster)
    tokenize(cluster)
    train(cluster)
    evaluate(cluster)
    assert np.array_equal(served(cluster), generated(cluster))


def prepare(cluster: Cluster) -> None:
    """Images and a VQGAN (of random weights) on S3."""
    shards = cluster.root / "shards"
    img2dataset_layout.write_webdataset(shards, scenes.scenes(NUM_IMAGES, seed=5, held_out=False), shard_size=32)
    cluster.upload(shards, "images")
    held_out = cluster.root / "held-out"
    img2dataset_layout.write_webdataset(held_out, scenes.scenes(8, seed=6, held_out=True), shard_size=8)
    cluster.upload(held_out, "images-held-out")
    torch.manual_seed(0)
    save_vqgan(cluster.root / "vqgan", VQModel(PRESETS["tiny"].vqgan))
    cluster.upload(cluster.root / "vqgan", "models/vqgan")


def tokenize(cluster: Cluster) -> None:
    """A node is lost once there are shards; every sample is there once."""

    def shards() -> list[str]:
        return [key for key in cluster.keys("tokens/") if key.endswith(".parquet") and "part-" in key]

    cluster.submit(
        "pipelines/tokenize_images.py", "--input", "s3://paella/images", "--vqgan", "s3://paella/models/vqgan",
        "--output", "s3://paella/tokens", "--resolution", 64, "--rows-per-unit", 8,
        meanwhile=lambda: cluster.kill_node(lambda: len(shards()) >= 2, "DecodeAndEncode"),
    )  # fmt: skip
    ids = []
    for key in shards():
        ids += pq.read_table(io.BytesIO(cluster.s3.get_object(Bucket="paella", Key=key)["Body"].read()))["id"].to_pylist()
    assert len(ids) == len(set(ids)) == NUM_IMAGES


def train(cluster: Cluster) -> None:
    """A node with a worker is lost once there is a checkpoint."""

    def checkpoints() -> list[str]:
        return [key for key in cluster.keys("checkpoints/train/") if key.endswith("manifest.json")]

    log = cluster.submit(
        "pipelines/train.py", "tiny", "--data", "s3://paella/tokens", "--vqgan", "s3://paella/models/vqgan",
        "--output", cluster.root / "train", "--recovery.checkpoints", "s3://paella/checkpoints/train", "--steps", 30,
        "--global-batch-size", 8, "--num-workers", 2, "--min-workers", 1, "--checkpoint-every", 5, "--sample-every", 0,
        "--validation-images", 0, "--validate-every", 0,
        meanwhile=lambda: cluster.kill_node(checkpoints, "TrainWorker"), timeout_s=400,
    )  # fmt: skip
    assert "from step 0" in log and log.count("from step") >= 2, log[-8000:]
    assert "models:/paella@newest" in log


def evaluate(cluster: Cluster) -> None:
    output = cluster.root / "evaluated"
    cluster.submit(
        "pipelines/evaluate.py", "--model", "models:/paella@newest", "--reference", "s3://paella/images-held-out",
        "--output", output, "--metrics", "scenes", "--num-images", 8, *SAMPLING,
    )  # fmt: skip
    assert json.loads((output / "report.json").read_text())["cells"]


def generated(cluster: Cluster) -> np.ndarray:
    """A picture by generate.py."""
    prompts, output = cluster.root / "prompts.txt", cluster.root / "pictures"
    prompts.write_text(f"{PROMPT}\n")
    arguments = ("--model", "models:/paella@newest", "--prompts", prompts, "--output", output, "--seed", 3, *SAMPLING)
    cluster.submit("pipelines/generate.py", *arguments)
    (picture,) = output.rglob("images/**/*.png")
    return np.asarray(Image.open(picture).convert("RGB"))


def served(cluster: Cluster) -> np.ndarray:
    """The same picture by the service."""
    subprocess.run(["serve", "deploy", PLACE / "serve.yaml"], env=cluster.environment, check=True, capture_output=True)
    port = next(line.split(":")[1].strip() for line in (PLACE / "serve.yaml").read_text().splitlines() if "  port:" in line)
    body = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "guidance_scale": 4.0, "response_format": "b64_json"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images/generations",
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {cluster.variables['PAELLA_API_KEYS']}"},
    )
    deadline = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.load(response)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                status = subprocess.run(["serve", "status"], env=cluster.environment, capture_output=True, text=True).stdout
                raise AssertionError(f"{error}: {status}") from error
            time.sleep(1)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB"))
