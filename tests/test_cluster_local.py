"""The way of cluster/README.md on a cluster of processes: tokenize → train → evaluate → generate → serve by `ray job submit` and
`serve deploy`, code and data on S3, a node killed in tokenizing and another in training; and the head killed in training."""

import base64
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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

    def submit(self, *command: object, meanwhile: Callable[[], None] = lambda: None, fails: bool = False) -> str:
        """Run a job to its end, and do something as it runs; returns its log."""
        submit = ["ray", "job", "submit", "--runtime-env", ROOT / "cluster" / "base" / "runtime_env.yaml", "--", "python"]
        log = self.root / "job.log"
        with log.open("w") as file:
            arguments = [str(part) for part in (*submit, *command)]
            job = subprocess.Popen(arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            try:
                meanwhile()
                code = job.wait(timeout=900)  # a minute or two where the machine does nothing else
            finally:
                job.kill()
        assert fails == (code != 0), log.read_text()[-8000:]
        return log.read_text()

    def kill(self, node: str, when: Callable[[], object], running: str = "", timeout_s: float = 600) -> None:
        """As soon as something has happened, kill such a node, on which such a process runs, and start another in its place."""
        deadline = time.monotonic() + timeout_s
        while not (when() and (family := self.processes_of(node, running))):
            assert time.monotonic() < deadline, (self.root / "job.log").read_text()[-8000:]
            time.sleep(0.1)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        local(node)

    def processes_of(self, node: str, running: str) -> list[psutil.Process]:
        """Of such a node, on which such a process runs."""
        for entry in json.loads((PLACE / "state.json").read_text())["processes"]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(entry["pid"])
                if entry["name"].startswith(node) and abs(process.create_time() - entry["created"]) < 0.1:
                    children = process.children(recursive=True)
                    if any(running in " ".join(child.cmdline()) for child in children):
                        return [process, *children]
        return []

    def deploy(self) -> None:
        command = ["serve", "deploy", PLACE / "serve.yaml"]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=120)
        deadline = time.monotonic() + 240
        while True:
            try:
                self.picture(timeout_s=120)
                return
            except OSError as error:
                assert time.monotonic() < deadline, f"{error}: {self.status()}"
                time.sleep(1)

    def status(self) -> str:
        """Of the service, by the head."""
        return subprocess.run(["serve", "status"], env=self.environment, capture_output=True, text=True, timeout=120).stdout

    def picture(self, timeout_s: float = 30) -> np.ndarray:
        """By the service. Raises OSError where it does not answer."""
        body = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "guidance_scale": 4.0, "response_format": "b64_json"}
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.variables['PAELLA_API_KEYS']}"}
        url = f"{self.variables['PAELLA_URL']}/v1/images/generations"
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=timeout_s
        ) as response:
            (picture,) = json.load(response)["data"]
        return pixels(io.BytesIO(base64.b64decode(picture["b64_json"])))


def pixels(file: Path | io.BytesIO) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    up = subprocess.run([sys.executable, ROOT / "cluster" / "local.py", "up"], stderr=subprocess.PIPE, text=True, timeout=400)
    if "apt-get install" in up.stderr:
        pytest.skip(up.stderr)
    assert up.returncode == 0, up.stderr
    directory = Path(json.loads((PLACE / "state.json").read_text())["directory"])
    try:
        yield Cluster(tmp_path)
    finally:
        local("down")
    assert not PLACE.exists() and not directory.exists()
    assert [process for process in psutil.process_iter() if works_in(process, directory)] == []


def works_in(process: psutil.Process, directory: Path) -> bool:
    """Whether a process was started there, as all of the cluster are."""
    with contextlib.suppress(psutil.Error):
        return process.cwd().startswith(str(directory))
    return False


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_from_images_to_an_endpoint_with_two_nodes_lost(cluster):
    """A node is lost once there are shards, another with a worker once there is a checkpoint."""
    prepare(cluster)
    tokenize(cluster, meanwhile=lambda: cluster.kill("node", lambda: len(shards(cluster)) >= 2, "DecodeAndEncode"))
    log = train(cluster, "train", meanwhile=lambda: cluster.kill("node", lambda: checkpoints(cluster, "train"), "TrainWorker"))
    assert "from step 0" in log and log.count("from step") >= 2, log[-8000:]
    assert "models:/paella@newest" in log
    evaluate(cluster)
    offline = generated(cluster)
    cluster.deploy()  # after the jobs: what serves keeps its CPUs
    assert np.array_equal(cluster.picture(), offline)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_head_is_lost(cluster):
    """The service answers all the while, and the training job goes on when it is submitted again."""
    prepare(cluster)
    tokenize(cluster)
    train(cluster, "first", "--steps", 2)
    local("node")  # room for a worker beside the service
    cluster.deploy()
    pictures, seconds, lost, stop = [], [], [], threading.Event()

    def ask() -> None:
        while not stop.wait(0.5):
            began = time.monotonic()
            try:
                pictures.append(cluster.picture())
                seconds.append(time.monotonic() - began)
            except ConnectionError as error:  # what the head's own proxy had under way; on Kubernetes it gets no requests
                lost.append(error)

    with ThreadPoolExecutor(1) as asking:
        asked = asking.submit(ask)
        try:
            kill = functools.partial(cluster.kill, "head", lambda: checkpoints(cluster, "train"))
            train(cluster, "train", "--num-workers", 1, meanwhile=kill, fails=True)
            log = train(cluster, "train", "--num-workers", 1)
        finally:
            stop.set()
        asked.result()
    print(f"{len(pictures)} pictures, the slowest in {max(seconds):.1f} s, {len(lost)} lost")
    assert "from step 0" not in log and "models:/paella@newest" in log
    assert len(pictures) > 10 and len(lost) <= 1 and all(np.array_equal(picture, pictures[0]) for picture in pictures)


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


def shards(cluster: Cluster) -> list[str]:
    return [key for key in cluster.keys("tokens/") if key.endswith(".parquet") and "part-" in key]


def checkpoints(cluster: Cluster, name: str) -> list[str]:
    return [key for key in cluster.keys(f"checkpoints/{name}/") if key.endswith("manifest.json")]


def tokenize(cluster: Cluster, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Every sample is there once."""
    cluster.submit(
        "pipelines/tokenize_images.py", "--input", "s3://paella/images", "--vqgan", "s3://paella/models/vqgan",
        "--output", "s3://paella/tokens", "--resolution", 64, "--rows-per-unit", 8, meanwhile=meanwhile,
    )  # fmt: skip
    ids = []
    for key in shards(cluster):
        ids += pq.read_table(io.BytesIO(cluster.s3.get_object(Bucket="paella", Key=key)["Body"].read()))["id"].to_pylist()
    assert len(ids) == len(set(ids)) == NUM_IMAGES


def train(cluster: Cluster, name: str, *flags: object, **how: Any) -> str:
    """Returns the job's log."""
    return cluster.submit(
        "pipelines/train.py", "tiny", "--data", "s3://paella/tokens", "--vqgan", "s3://paella/models/vqgan",
        "--output", cluster.root / name, "--recovery.checkpoints", f"s3://paella/checkpoints/{name}", "--steps", 20,
        "--global-batch-size", 8, "--num-workers", 2, "--min-workers", 1, "--checkpoint-every", 5, "--sample-every", 0,
        "--validation-images", 0, "--validate-every", 0, *flags, **how,
    )  # fmt: skip


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
    return pixels(picture)
