"""Killed at any instant, a generating job continues to the same manifest and pictures: none lost, none twice, nothing torn."""

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, killed_when, worker_here
from test_generate import settled, small
from tokenizing import family, kill, kill_all, named, wait_until

from paella.sampler import SamplingConfig
from pipelines import generate, manifest
from pipelines.output_store import Output


def arguments(model, prompts, output, steps: int) -> list[str]:
    flags = ["--unit-size", 4, "--batch-size", 4, "--sampling.num-inference-steps", steps]
    return list(map(str, ["--model", model, "--prompts", prompts, "--output", output, *flags]))


def test_killed_and_rerun_completes(ray_session, model_bundle, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(f"circle number {i}" for i in range(24)))
    program = [sys.executable, ROOT / "pipelines/generate.py"]
    killed_when(program + arguments(model_bundle, prompts, output, 20), lambda: list(output.glob("manifest/part-*.parquet")))
    first = list(manifest.rows(Output(str(output))))
    assert 0 < len(first) < 24
    config = small(model_bundle, prompts, output, unit_size=4, batch_size=4, sampling=SamplingConfig(num_inference_steps=20))
    generate.run(config)
    rows = list(manifest.rows(Output(str(output))))
    assert [row["order"] for row in rows] == list(range(24))
    assert all(row in rows for row in first)
    assert_whole(output, rows)


def assert_whole(output: Path, rows: list[dict]) -> None:
    """Every picture is there and whole, and nothing else."""
    assert {file.name for file in (output / "images").iterdir()} == {Path(row["file"]).name for row in rows}
    assert all(hashlib.sha256((output / row["file"]).read_bytes()).hexdigest() == row["sha256"] for row in rows)
    assert {file.stem for file in (output / "gallery").iterdir()} == {
        file.stem.removeprefix("part-") for file in (output / "manifest").iterdir()
    }
    assert not list(output.rglob(".*"))


@pytest.fixture(scope="module")
def long_job(model_bundle, tmp_path_factory) -> tuple[Path, list[dict]]:
    """60 prompts, and the manifest of an undisturbed run."""
    root = tmp_path_factory.mktemp("long")
    (root / "prompts.txt").write_text("\n".join(f"circle number {i}" for i in range(60)))
    settings = {"unit_size": 4, "batch_size": 4, "sampling": SamplingConfig(num_inference_steps=20)}
    with worker_here():
        generate.run(small(model_bundle, root / "prompts.txt", root / "out", **settings))
    return root / "prompts.txt", settled(manifest.rows(Output(str(root / "out"))))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(10))
def test_killed_at_a_random_instant(long_job, model_bundle, tmp_path, number):
    """The driver, everything, or a worker is killed; the same command then ends with the same manifest and pictures."""
    (prompts, undisturbed), output = long_job, tmp_path / "out"
    seed, kind = random.randrange(2**32), ("driver", "everything", "actor")[number % 3]
    rng = random.Random(seed)
    parts, delay_s = rng.randrange(14), rng.uniform(0, 0.5)
    print(f"seed {seed}: {kind} {delay_s:.2f} s after part {parts}", flush=True)
    process = started(arguments(model_bundle, prompts, output, 20))
    wait_until(lambda: output.exists() and len(list(output.glob("manifest/part-*.parquet"))) >= parts, process)
    time.sleep(delay_s)
    relatives = family(process.pid)
    if kind == "everything":
        kill_all(process)
    elif kind == "driver":  # and the rerun begins while what it left behind may still write
        process.kill()
        process.communicate()
    else:
        victims = named(relatives, "ray::MapWorker")
        kill(victims[:1])
    if kind != "actor":
        process = started(arguments(model_bundle, prompts, output, 20))
    out, err = process.communicate(timeout=600)
    kill(relatives)
    assert process.returncode == 0, (out, err)
    rows = list(manifest.rows(Output(str(output))))
    assert settled(rows) == undisturbed
    assert_whole(output, rows)


def started(arguments: list[str]) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, ROOT / "pipelines/generate.py", *arguments], text=True, start_new_session=True, **pipes
    )
