"""The sampler: the published trace, exact draws, and images that depend on their own seed and prompt only."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import nn

from paella.bundle import Bundle
from paella.conditioning import TextEncoders, unconditional
from paella.config import PRESETS, PaellaConfig
from paella.objective import add_noise
from paella.sampler import SamplingConfig, draw, guided_logits, random_tokens, sample, step_randoms
from paella.unet import Paella
from paella.vqgan import VQModel

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("run, steps, temperature, cfg", [("a", 12, (0.7, 0.3), (8.0, 8.0)), ("b", 5, (1.0, 0.2), (6.0, 2.0))])
@torch.inference_mode()
def test_published_trace(run, steps, temperature, cfg):
    import json

    config = json.loads((FIXTURES / "configs.json").read_text())["unet"]
    model = Paella(PaellaConfig.from_dict(config)).eval()
    model.load_state_dict(torch.load(FIXTURES / "unet.pt", weights_only=True)["state_dict"])
    io, trace = load_file(FIXTURES / "unet_io.safetensors"), load_file(FIXTURES / "sampler_trace.safetensors")
    conditions = {name: io[name] for name in ("byt5", "clip", "clip_image")}
    without = unconditional(conditions)
    assert torch.equal(without["byt5"], trace[f"{run}.byt5_uncond"])
    levels = torch.linspace(1, 0, steps + 1)
    noise = trace[f"{run}.initial_noise"].long()
    for step in range(steps):
        tokens = trace[f"{run}.{step}.tokens_in"].long()
        guidance = torch.linspace(*cfg, steps)[step].item()
        logits = guided_logits(model, tokens, levels[step].expand(2), conditions, without, guidance)
        probs = (logits / torch.linspace(*temperature, steps)[step]).softmax(1)
        # the trace keeps half precision: 1e-4, plus half a unit in the last place
        torch.testing.assert_close(probs, trace[f"{run}.{step}.probs"].float(), atol=1e-4, rtol=2**-11)
        following = trace[f"{run}.{step}.drawn"].long()
        if step < steps - 1:
            mask = trace[f"{run}.{step}.renoise_mask"].long()
            following, _ = add_noise(following, levels[step + 1].expand(2), mask=mask, random_tokens=noise)
            assert torch.equal(following, trace[f"{run}.{step + 1}.tokens_in"].long())
        else:
            assert torch.equal(following, trace[f"{run}.final"].long())


class FixedLogits(nn.Module):
    """Predicts the same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.config = dataclasses.replace(PRESETS["tiny"].unet, num_labels=len(logits))

    def forward(self, tokens, t, **conditions):
        return self.logits[None, :, None, None].expand(len(tokens), -1, *tokens.shape[1:])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -30.0])
    config = SamplingConfig(num_inference_steps=1, temperature=(temperature, temperature), cfg=(1.0, 1.0))
    tokens = sample(FixedLogits(logits), {}, {}, seeds=list(range(100)), size=(40, 40), config=config)
    counts = np.bincount(tokens.flatten().numpy(), minlength=6)
    expected = (logits / temperature).softmax(0).numpy() * counts.sum()
    seen = expected > 5
    assert stats.chisquare(counts[seen], expected[seen] * counts[seen].sum() / expected[seen].sum()).pvalue > 1e-3
    assert counts[~seen].sum() <= 5


def test_renoising_hits_its_rate_and_ends_at_zero():
    seen: list[torch.Tensor] = []

    class Watch(FixedLogits):
        def forward(self, tokens, t, **conditions):
            seen.append(tokens)
            return super().forward(tokens, t)

    model = Watch(torch.tensor([50.0] + [0.0] * 255))  # always draws code 0
    tokens = sample(model, {}, {}, seeds=[1, 2], size=(64, 64), config=SamplingConfig(num_inference_steps=4, cfg=(1, 1)))
    rates = [(grid != 0).float().mean().item() for grid in seen[1:]]
    assert rates == pytest.approx([0.75 * 255 / 256, 0.5 * 255 / 256, 0.25 * 255 / 256], abs=0.02)
    assert (tokens == 0).all()


def test_draw_never_leaves_the_codebook():
    logits = torch.randn(1, 7, 2, 2)
    tokens = draw(logits, torch.full((1, 2, 2), 1 - 2**-24))
    assert tokens.max() < 7
    assert (draw(logits, torch.zeros(1, 2, 2)) == 0).all()


def test_randoms_are_the_images_own():
    together, _ = step_randoms([5, 9], 3, (4, 4))
    alone, _ = step_randoms([9], 3, (4, 4))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(*step_randoms([9], 3, (4, 4)))
    assert random_tokens([0, 1], (8, 8), 16).max() < 16


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    unet = Paella(config.unet).eval()
    with torch.no_grad():  # zero-initialised weights would hide the conditions
        for value in unet.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    return Bundle(config, unet, VQModel(config.vqgan).eval(), TextEncoders.create(config.text).eval(), "none")


def test_images_do_not_depend_on_their_batch(bundle):
    prompts = ["a", "a rather longer prompt than the first", "blue"]
    settings = SamplingConfig(num_inference_steps=4)
    together = bundle.generate_tokens(prompts, [3, 4, 5], sampling=settings)
    shuffled = bundle.generate_tokens(prompts[::-1], [5, 4, 3], sampling=settings).flip(0)
    alone = [bundle.generate_tokens([p], [s], sampling=settings) for p, s in zip(prompts, [3, 4, 5], strict=True)]
    assert torch.equal(together, shuffled)
    # another batch size rounds the logits' last bits otherwise (2e-6 here), which turns a draw in ten thousand
    assert (together != torch.cat(alone)).float().mean() < 0.005
    assert not torch.equal(together[0], bundle.generate_tokens(["b"], [3], sampling=settings)[0])


def test_sizes(bundle):
    settings = SamplingConfig(num_inference_steps=1)
    assert bundle.generate_tokens(["a"], [0], size=(64, 32), sampling=settings).shape == (1, 8, 16)
    with pytest.raises(ValueError, match="multiples of"):
        bundle.generate_tokens(["a"], [0], size=(60, 64))


@pytest.mark.parametrize(
    "values",
    [
        {"num_inference_steps": 0},
        {"temperature": (0.0, 0.3)},
        {"temperature": (float("nan"), 0.3)},
        {"cfg": (float("nan"), 1.0)},
        {"cfg": (-1.0, 1.0)},
        {"renoise_steps": 12},
    ],
)
def test_bad_settings(values):
    with pytest.raises(ValueError, match="is not allowed"):
        SamplingConfig(**values)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed="):
        random_tokens([seed], (2, 2), 4)
