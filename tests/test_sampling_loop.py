"""A running batch alone: pictures of mixed sizes and steps are those of `sample`, errors reach those who wait and nobody else."""

import pytest
import torch

from paella import edits
from paella.bundle import load_bundle
from paella.sampler import SamplingConfig, sample
from pipelines.sampling_loop import SamplingLoop


@pytest.fixture(scope="module")
def bundle(clip_bundle):
    return load_bundle(str(clip_bundle))


@pytest.fixture
def loop(bundle):
    loop = SamplingLoop(bundle, batch_size=3)
    yield loop
    loop.close()
    assert not loop.thread.is_alive() and not loop.waited


def canvas(bundle, seed):
    size, config = (64, 64 - 32 * (seed % 2)), SamplingConfig(num_inference_steps=1 + seed % 3)
    return edits.text_to_image(bundle, "x", seed=seed, size=size, config=config)


def test_pictures_are_those_of_sample(bundle, loop):
    canvases = loop.encoded(lambda: [canvas(bundle, seed) for seed in range(9)])
    futures = [loop.submit(each) for each in canvases]
    for seed, future in enumerate(futures):
        expected = bundle.decode(sample(bundle.unet, [canvas(bundle, seed)]))[0]
        made = future.result(60)
        assert torch.equal(made.picture, expected) and made.sample_s > 0 and made.decode_s > 0


def test_an_error_is_those_who_wait_for_it(bundle, loop):
    with pytest.raises(ZeroDivisionError):
        loop.encoded(lambda: 1 / 0)
    broken = canvas(bundle, 0)
    broken.tokens = torch.zeros(3, 3, dtype=torch.long)  # a grid that the network refuses
    with pytest.raises(ValueError):
        loop.submit(broken).result(60)
    assert loop.submit(canvas(bundle, 1)).result(60).picture.shape == (3, 32, 64)
