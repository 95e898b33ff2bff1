"""Killed at any instant, a tokenizing job continues to the same dataset: no row lost, none twice, no torn shard to be seen."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from tokenizing import arguments, config, family, kill, kill_all, named, rows_of, run, run_in_process, start, wait_until

from pipelines import tokenize_images
from pipelines.img2dataset_layout import write_webdataset
from pipelines.scenes import scenes
from pipelines.sources import find_units
from pipelines.token_dataset import TokenDataset

pytestmark = pytest.mark.timeout(1200)  # of a machine that others use too
TWO_NODES = Path(__file__).with_name("two_nodes.py")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Enough for a job to be killed in its middle, with copies for de-duplication to find."""
    return write_webdataset(tmp_path_factory.mktemp("images") / "set", [*scenes(200, seed=0, held_out=False)] * 2, shard_size=80)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, images, vqgan_bundle) -> dict[str, dict]:
    return rows_of(run_in_process(config(images, vqgan_bundle, tmp_path_factory.mktemp("tokens") / "undisturbed")))


def shards(output: Path) -> list[Path]:
    return list(output.glob("part-*.parquet"))


def assert_same(output: Path, undisturbed: dict[str, dict]) -> None:
    assert rows_of(output) == undisturbed
    assert TokenDataset(str(output)).num_rows == len(undisturbed)
    assert [file.name for file in output.rglob(".*")] == []


def test_everything_killed_in_the_middle_of_a_write(ray_session, tmp_path, images, vqgan_bundle, undisturbed):
    output = tmp_path / "killed"
    process = start(*arguments(images, vqgan_bundle, output))
    try:
        wait_until(lambda: len(shards(output)) > 3 and any(output.glob(".part-*.tmp")), process)
    finally:
        kill_all(process)
    finished = {file: file.stat().st_mtime_ns for file in shards(output)}
    assert 3 < len(finished) < 100 and not (output / "dataset.json").exists()
    with pytest.raises(ValueError, match="not a finished token dataset"):
        TokenDataset(str(output))
    assert rows_of(output).items() <= undisturbed.items()  # reading them fails on a torn file
    run(config(images, vqgan_bundle, output))
    assert_same(output, undisturbed)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished


@pytest.mark.slow  # test_everything_killed_in_the_middle_of_a_write kills it too
def test_the_driver_alone_is_killed(ray_session, tmp_path, images, vqgan_bundle, undisturbed):
    output = tmp_path / "killed"
    process = start(*arguments(images, vqgan_bundle, output))
    relatives: list[psutil.Process] = []
    try:
        wait_until(lambda: len(shards(output)) > 3, process)
        relatives = family(process.pid)
        process.kill()
        process.communicate()
        run(config(images, vqgan_bundle, output))  # while what the driver left behind may still be writing
    finally:
        kill(relatives)
    assert_same(output, undisturbed)


def test_a_worker_and_an_actor_are_killed(ray_session, tmp_path, images, vqgan_bundle, undisturbed):
    """In a job of separate stages, which goes on by itself."""
    output = tmp_path / "killed"
    settings, units = config(images, vqgan_bundle, output), find_units(str(images), 4)
    killed: list[psutil.Process] = []

    def kill_some() -> None:
        wait_until(lambda: len(shards(output)) > 3)
        for stage in ("ray::Map", "ray::MapWorker"):
            victims = [process for process in named(family(psutil.Process().pid), stage) if process not in killed]
            kill(victims[:1])
            killed.extend(victims[:1])

    thread = threading.Thread(target=kill_some)
    thread.start()
    tokenize_images._encoded(settings, units, separate=True).materialize()
    thread.join()
    assert len(killed) == 2
    run(settings)
    assert_same(output, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_random_instants(tmp_path, images, vqgan_bundle, undisturbed):
    """The driver, everything, Ray without the driver, or an actor is killed; the same command then ends with the same dataset."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    began = time.monotonic()
    start(*arguments(images, vqgan_bundle, tmp_path / "timed")).communicate(timeout=600)
    takes_s = time.monotonic() - began
    for number in range(20):
        output, kind = tmp_path / str(number), ("driver", "everything", "ray", "actor", "write")[number % 5]
        instant = rng.uniform(0.1, 0.95) * takes_s
        print(f"seed {seed}, number {number}: {kind} after {instant:.2f} of {takes_s:.1f} s", flush=True)
        process = start(*arguments(images, vqgan_bundle, output))
        kill_at(process, kind, instant, output)
        again = start(*arguments(images, vqgan_bundle, output))
        out, err = again.communicate(timeout=600)
        assert again.returncode == 0, (out, err)
        assert_same(output, undisturbed)


def kill_at(process: subprocess.Popen, kind: str, instant: float, output: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < instant and process.poll() is None:
        time.sleep(0.01)
    if kind == "write":
        while process.poll() is None and not any(output.glob(".part-*.tmp")):
            time.sleep(0.001)
    relatives = family(process.pid)
    if kind == "actor":
        kill(named(relatives, "ray::MapWorker")[:1])
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, (out, err)
    elif kind == "ray":
        kill(relatives)
        time.sleep(2)
        kill_all(process)
    elif kind == "driver":
        process.kill()
        process.communicate()
    else:
        kill_all(process)


@pytest.mark.slow
def test_one_of_two_nodes_is_lost(tmp_path, images, vqgan_bundle, undisturbed):
    output = tmp_path / "two"
    command = [sys.executable, TWO_NODES, *arguments(images, vqgan_bundle, output)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0 and "node removed with" in finished.stdout, (finished.stdout, finished.stderr)
    assert_same(output, undisturbed)
