"""U-Net training that is interrupted, in every way there is, gives what an undisturbed run gives: curve, weights, samples seen.

What it is compared with runs on two workers in float32. Ids are written down by recorded_train.py.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import pyarrow.fs as pafs
import pytest
import ray.cloudpickle
import recorded_train
import torch
from conftest import ROOT, checkpointed, killed_when, small_config
from process_groups import without_a_cluster
from safetensors.torch import load_file
from test_token_stream import write_tokens

from paella.bundle import vqgan_digests
from paella.sampler import SamplingConfig
from pipelines import tracking, train
from pipelines.checkpoints import open_directory
from pipelines.recovery import RecoveryConfig
from pipelines.train_config import TrainConfig, presets

ray.cloudpickle.register_pickle_by_value(recorded_train)

STEPS, BATCH, ROWS = 60, 8, 104
EPOCH = ROWS // BATCH


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the tests' runs are, and what they train on."""

    root: Path
    tokens: Path
    vqgan: Path

    def config(self, name: str, **changes) -> TrainConfig:
        values = {
            "data": str(self.tokens), "vqgan": str(self.vqgan), "output": str(self.root / name), "num_workers": 2,
            "model": dataclasses.replace(small_config(), image_size=32), "steps": STEPS, "global_batch_size": BATCH,
            "checkpoint_every": 7, "sample_every": 1000, "precision": "float32", "register_as": "test-resume",
            "sampling": SamplingConfig(num_inference_steps=2), "validation_images": 0,
        }  # fmt: skip
        return dataclasses.replace(presets()["tiny"], **(values | changes))

    def command(self, name: str, *more: object) -> list:
        """The same run as a program; which samples it sees is in `name`.ids."""
        program = [sys.executable, ROOT / "tests/recorded_train.py", self.root / f"{name}.ids"]
        return [*program, *self.train_arguments(name), *map(str, more)]

    def train_arguments(self, name: str) -> list:
        """Of train.py."""
        return ["tiny", "--data", self.tokens, "--vqgan", self.vqgan, "--output", self.root / name, *FLAGS]

    def run(self, name: str, poisoned_step: int | None = None, **changes) -> Path:
        """Run in this process's Ray."""
        plain, train.train_worker = train.train_worker, recorded_train.recorded(self.root / f"{name}.ids", poisoned_step)
        try:
            train.run(self.config(name, **changes))
        finally:
            train.train_worker = plain
        return self.root / name


FLAGS = [
    "--model.unet.num-labels", "32", "--model.unet.c-hidden", "16", "16", "--model.unet.c-in", "8", "--model.unet.c-out", "8",
    "--model.unet.c-cond", "16", "--model.unet.nhead", "2", "2", "--model.unet.blocks", "1", "1", "--model.unet.level-config",
    "CT", "CTA", "--model.vqgan.codebook-size", "32", "--model.vqgan.bottleneck-blocks", "1", "--model.vqgan.c-hidden", "16",
    "--model.vqgan.c-latent", "4", "--model.image-size", "32", "--num-workers", "2", "--steps", str(STEPS),
    "--global-batch-size", str(BATCH), "--checkpoint-every", "7", "--sample-every", "1000", "--precision", "float32",
    "--register-as", "test-resume", "--sampling.num-inference-steps", "2", "--sampling.temperature", "0.7", "0.3",
    "--sampling.cfg", "8.0", "8.0", "--validation-images", "0",
]  # fmt: skip
ADAMW = ["--optim.matrix-lr", "None"]
"""Where passes have other sizes and round otherwise; whether Muon's steps agree to 1e-5 then was not measured."""


@pytest.fixture(scope="module")
def place(vqgan_bundle, tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("resume")
    digest = vqgan_digests(str(vqgan_bundle))[0]
    return Place(root, write_tokens(root / "tokens", [ROWS // 4] * 4, digest=digest, side=8, codes=32), vqgan_bundle)


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    with without_a_cluster(train):
        return place.run("undisturbed")


def weights(output: Path) -> dict[str, torch.Tensor]:
    """All but the biases of attention's keys: softmax cancels them, so that AdamW makes its steps of a gradient's rounding."""
    files = [output / "model" / "unet.safetensors", *(output / "model" / "encoders").rglob("*.safetensors")]
    assert len(files) == 2
    found = {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}
    for name in [name for name in found if name.endswith("in_proj_bias")]:
        found[name][len(found[name]) // 3 : 2 * len(found[name]) // 3] = 0
    return found


def curve(output: Path, name: str = "loss") -> dict[int, float]:
    """A metric by step. No step is there twice, or missing, and there is one MLflow run."""
    run = tracking.Run(**json.loads((output / "mlflow_run.json").read_text()))
    history = run.client().get_metric_history(run.run_id, name)
    steps = [metric.step for metric in history]
    assert sorted(steps) == sorted(set(steps)), f"repeated: {steps}"
    found = {metric.step: metric.value for metric in history}
    assert list(found) == list(range(20, max(found) + 1, 20))
    info = run.client().get_run(run.run_id).info
    runs = run.client().search_runs([info.experiment_id], filter_string=f"params.output = '{output}'")
    assert len(runs) == 1
    return found


def by_worker(output: Path) -> list[dict[int, list[str]]]:
    """The ids of each step that a worker has done, for all workers there have been."""
    workers = []
    for file in output.with_name(f"{output.name}.ids").glob("*.jsonl"):
        workers.append({})
        for line in file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed worker
                part = json.loads(line)
                workers[-1].setdefault(part["step"], []).extend(part["ids"])
    return workers


def seen(output: Path) -> dict[int, list[str]]:
    """The ids of each step over all workers; a step that was done again after a restart saw the same."""
    steps: dict[int, set[str]] = {}
    for worker in by_worker(output):
        for step, ids in worker.items():
            steps.setdefault(step, set()).update(ids)
    return {step: sorted(ids) for step, ids in sorted(steps.items())}


def largest_difference(a: Path, b: Path) -> float:
    """Between the weights of two runs."""
    ours, theirs = weights(a), weights(b)
    return max((value - theirs[name]).abs().max().item() for name, value in ours.items())


def assert_same_result(output: Path, expected: Path, steps: int = STEPS) -> None:
    """Curves and weights agree to 1e-5."""
    for name in ("loss", "loss_t_0.75_1.00"):
        ours, theirs = curve(output, name), curve(expected, name)
        assert list(ours) == list(theirs) == list(range(20, steps + 1, 20))
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-5, rtol=0)
    assert largest_difference(output, expected) <= 1e-5


def assert_same(output: Path, expected: Path, steps: int = STEPS) -> None:
    """Curve and weights agree to 1e-5, and samples are those of the other run, each once an epoch."""
    assert_same_result(output, expected, steps)
    ids = seen(output)
    assert ids == seen(expected) and list(ids) == list(range(steps))
    for epoch in range(steps // EPOCH):
        samples = [sample for step in range(epoch * EPOCH, (epoch + 1) * EPOCH) for sample in ids[step]]
        assert len(samples) == len(set(samples)) == ROWS


@contextlib.contextmanager
def in_thread(action: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    yield
    thread.join(timeout=60)
    assert not thread.is_alive(), "there was nothing to interrupt"


def kill_a_worker(output: Path, after: int, how: int = signal.SIGKILL) -> None:
    """End a worker once it has done `after` steps."""
    while True:
        for file in output.with_name(f"{output.name}.ids").glob("*.jsonl"):
            if file.read_text().count("\n") >= after and psutil.pid_exists(int(file.stem)):
                os.kill(int(file.stem), how)
                return
        time.sleep(0.02)


def test_a_killed_worker_and_then_a_killed_cluster_change_nothing(ray_session, undisturbed, place):
    """First a worker, so that two new ones go on; then driver, workers and Ray, so that the same command continues."""
    output = place.root / "killed"

    def going_on() -> bool:
        return sum(len(steps) >= 5 for steps in by_worker(output)) == 4

    with in_thread(lambda: kill_a_worker(output, after=16)):  # two checkpoints: the first is whole when the second begins
        killed_when(place.command("killed"), going_on)
    assert not (output / "model").exists(), "the run was over before it was killed"
    place.run("killed")
    assert_same(output, undisturbed)
    began = sorted(min(steps) for steps in by_worker(output))
    assert began[:2] == [0, 0] and began[2] > 0 and len(began) == 6, "each time from a checkpoint"


@pytest.mark.slow
def test_a_bad_step_is_skipped_or_rolled_back(ray_session, place, undisturbed):
    output = place.run("skipped", poisoned_step=25, steps=40)
    skipped = curve(output)
    assert all(np.isfinite(list(skipped.values())))
    assert all(torch.isfinite(value).all() for value in weights(output).values())
    output = place.run("back", poisoned_step=25, steps=40, recovery=RecoveryConfig(on_bad_step="rollback"))
    whole, ids = seen(undisturbed), seen(output)
    assert set(ids[21]) == set(whole[21]) | set(whole[26]), "back to step 21, and on with the data after step 25"
    assert set(ids[30]) == set(whole[35])
    assert all(np.isfinite(list(curve(output).values())))
    assert abs(skipped[20] - curve(output)[20]) < 1e-5, "the same before the bad step"


@pytest.mark.slow
def test_sigterm_leaves_a_last_checkpoint(place, undisturbed):
    """To the program: it saves and ends; to a worker: it saves and goes on."""
    output, more = place.root / "stopped", ["--checkpoint-every", "1000"]
    process = subprocess.Popen(place.command("stopped", *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while sum(len(ids) for ids in seen(output).values()) < 10 * BATCH and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "as asked, with a checkpoint of step" in said
    (saved,) = output.glob("checkpoints/step-*/manifest.json")
    step = json.loads(saved.read_text())["step"]
    with in_thread(lambda: kill_a_worker(output, after=5, how=signal.SIGTERM)):
        place.run("stopped", checkpoint_every=1000)
    assert len(list(output.glob("checkpoints/step-*/manifest.json"))) == 2 and step > 0
    assert_same(output, undisturbed)


@pytest.mark.slow
def test_divergence_stops_the_run(ray_session, place):
    """A learning rate that cannot be: weights of infinite size."""
    optim = dataclasses.replace(presets()["tiny"].optim, lr=1e30, matrix_lr=None, warmup_steps=1)
    with pytest.raises(RuntimeError, match="is not finite, the 5. bad step in a row"):
        place.run("diverged", optim=optim, recovery=RecoveryConfig(max_bad_steps=5))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_ten_random_instants(place):
    """A worker, the program or the whole cluster; on 2, 1 and 2 workers in turn."""
    steps = ["--steps", "200"]
    whole = place.root / "whole"
    finished = subprocess.run(place.command("whole", *steps), capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    output, rng = place.root / "random", random.SystemRandom()
    for number in range(10):
        what, done = ("worker", "driver", "cluster")[number % 3], rng.randint(1, 12)
        print(f"killed: a {what}, {done} steps after the start", flush=True)
        if number % 2 == 0:
            _interrupt(place.command("random", *steps), output, what, done)
            continue
        with one_cpu() as environment:  # a worker with as many threads and as many images in a pass as each of two
            alone = ["--num-workers", "1", "--parallel.accumulate", "2"]
            _interrupt(place.command("random", *steps, *alone), output, what, done, environment)
    finished = subprocess.run(place.command("random", *steps), capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert_same(output, whole, 200)
    losses = np.abs(np.subtract(list(curve(output).values()), list(curve(whole).values()))).max()
    print(f"weights differ by {largest_difference(output, whole):.1e}, losses by {losses:.1e}")


@contextlib.contextmanager
def one_cpu() -> Iterator[dict[str, str]]:
    """The environment of a program that is to run on a cluster with one CPU."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        yield {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()


def _interrupt(command: list, output: Path, what: str, steps: int, environment: Mapping[str, str] = {}) -> None:
    """Start a run, and kill a part of it in or after a step; if a worker, then the rest after as many steps of the new ones."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ids = output.with_name(f"{output.name}.ids")
    before = set(ids.glob("*.jsonl"))
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | environment, **quiet)

    def workers() -> list[int]:
        """The new ones, once they have done the steps."""
        while process.poll() is None:
            new = [file for file in set(ids.glob("*.jsonl")) - before if psutil.pid_exists(int(file.stem))]
            if any(file.read_text().count("\n") >= steps for file in new):
                time.sleep(random.uniform(0, 0.05))
                return [int(file.stem) for file in new]
            time.sleep(0.02)
        raise AssertionError("the run was over before it was killed")

    pids = workers()
    if what == "worker":
        before |= set(ids.glob("*.jsonl"))
        os.kill(random.choice(pids), signal.SIGKILL)
        workers()
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    if what != "driver":
        for relative in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                relative.kill()
    process.wait()
    psutil.wait_procs(family, timeout=60)  # without their driver, Ray's processes end by themselves
    for relative in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            relative.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_two_and_four_workers_agree_over_60_steps(place, tmp_path):
    """At the same global batch: in float32 to 1e-5, in bfloat16 to 2e-2."""
    losses = {}
    for precision in ("float32", "bf16"):
        for number in (1, 2, 4):
            name = f"{precision}-{number}"
            flags = ["--num-workers", number, "--precision", precision]
            finished = subprocess.run(place.command(name, *flags, *ADAMW), capture_output=True, text=True, timeout=600)
            assert finished.returncode == 0, finished.stderr
            losses[name] = np.array(list(curve(place.root / name).values()))
    exact = max(np.abs(losses[f"float32-{number}"] - losses["float32-1"]).max() for number in (2, 4))
    rough = max(np.abs(losses[f"bf16-{number}"] - losses["float32-1"]).max() for number in (1, 2, 4))
    print(f"float32: {exact:.1e}, bf16: {rough:.1e}")
    assert exact < 1e-5 and rough < 2e-2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_leaves_fewer_workers_and_the_same_result(place):
    """Two machines with a CPU each; one disappears. With min_workers the run goes on on the other."""
    from ray.cluster_utils import Cluster

    whole, output = place.root / "nodes-whole", place.root / "nodes"
    assert subprocess.run(place.command("nodes-whole"), capture_output=True, timeout=400).returncode == 0
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    other = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    try:
        command = place.command("nodes", "--min-workers", "1")
        environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_health_check_period_ms": "1000"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, env=environment, **streams)
        deadline = time.monotonic() + 200
        while not checkpointed(output) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(other, allow_graceful=False)
        said = process.communicate(timeout=400)[0]
        assert process.returncode == 0, said
        assert "on 2 workers, from step 0" in said and "on 1 workers, from step" in said, said
    finally:
        cluster.shutdown()
    assert_same(output, whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_on_s3_survive_a_kill_of_everything(place, bucket):
    whole, output = place.root / "s3-whole", place.root / "s3"
    assert subprocess.run(place.command("s3-whole"), capture_output=True, timeout=400).returncode == 0
    command = place.command("s3", "--recovery.checkpoints", f"{bucket}/run/checkpoints")
    filesystem, root = open_directory(f"{bucket}/run/checkpoints")
    killed_when(command, lambda: _names(filesystem, root, "manifest.json"))
    assert not (output / "model").exists() and not (output / "checkpoints").exists()
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stderr
    assert "from step 0" not in finished.stdout
    assert len(_names(filesystem, root, "manifest.json")) == 2
    assert_same(output, whole)


def _names(filesystem: pafs.FileSystem, root: str, end: str) -> list[str]:
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    return [info.path for info in found if info.path.endswith(end)]
