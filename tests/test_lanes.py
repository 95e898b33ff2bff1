"""Steps in another process: the tokens of `step()`, whoever comes and goes, and no process that stays behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from paella import edits
from paella.bundle import load_bundle
from paella.sampler import SamplingConfig, step
from serve.lanes import StepProcess


@pytest.fixture(scope="module")
def bundle(clip_bundle):
    return load_bundle(str(clip_bundle))


@pytest.fixture(scope="module")
def take_step(bundle):
    process = StepProcess(bundle.unet, bundle.vqgan.vquantizer)
    yield process
    process.close()
    assert process.process.returncode == 0


def canvases(bundle):
    """Of two sizes and several modes and settings."""
    settings = [{}, {"cfg": (1.0, 1.0)}, {"choice": "nearest"}, {"top_k": 5, "renoise_from": "fresh"}]
    configs = [SamplingConfig(num_inference_steps=4, **each) for each in settings]
    made = [
        edits.text_to_image(bundle, "x", seed=seed, size=(64, 64 - 32 * (seed % 2)), config=config)
        for seed, config in enumerate(configs)
    ]
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 32:] = True
    return [*made, edits.inpaint(bundle, image=torch.rand(3, 64, 64), mask=mask, prompt="y", seed=9, config=configs[0])]


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_of_step(bundle, take_step, seed):
    """Canvases come, leave for a while, in which they take steps here, and come back."""
    torch.manual_seed(seed)
    sent = canvases(bundle)
    torch.manual_seed(seed)
    kept = canvases(bundle)
    here = lambda share: step(bundle.unet, share, codebook=bundle.vqgan.vquantizer)  # noqa: E731
    while not all(canvas.done for canvas in kept):
        share = [index for index in torch.randperm(len(kept)).tolist() if not kept[index].done and torch.rand(()) < 0.6]
        if share:
            (take_step if torch.rand(()) < 0.7 else here)([sent[index] for index in share])
            here([kept[index] for index in share])
        for one, other in zip(sent, kept, strict=True):
            assert one.step == other.step
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.prediction, other.prediction)


def test_a_process_that_is_gone_is_told_of(bundle):
    take_step = StepProcess(bundle.unet, bundle.vqgan.vquantizer)
    take_step.process.kill()
    with pytest.raises(RuntimeError, match="exit code -9"):
        take_step(canvases(bundle))
    take_step.close()


OWNER = """
import sys, time
from paella.bundle import load_bundle
from serve.lanes import StepProcess
bundle = load_bundle(sys.argv[1])
print(StepProcess(bundle.unet, bundle.vqgan.vquantizer).process.pid, flush=True)
time.sleep(600)
"""


def ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # an init that does not reap leaves one
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_the_process_that_started_it(clip_bundle, number):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, clip_bundle], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as owner:
        lane = psutil.Process(int(owner.stdout.readline()))
        assert lane.is_running()
        os.kill(owner.pid, number)
    deadline = time.monotonic() + 20
    while not ended(lane):
        assert time.monotonic() < deadline
        time.sleep(0.05)
