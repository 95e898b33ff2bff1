"""The sampler: the published trace, exact draws, and images that depend on their own seed, prompt and settings only."""

import copy
import dataclasses
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import nn

from paella import cuda_graphs
from paella.bundle import Bundle
from paella.conditioning import TextEncoders, unconditional
from paella.config import PRESETS, PaellaConfig
from paella.cuda_graphs import GraphedUnet
from paella.objective import add_noise
from paella.sampler import (
    MODEL_CARD,
    PUBLISHED_DEMO,
    Canvas,
    SamplingConfig,
    _rng,
    predictions,
    random_tokens,
    sample,
    start,
    step,
)
from paella.unet import Paella, Prepared
from paella.vqgan import VQModel

FIXTURES = Path(__file__).parent / "fixtures"
OPTIONS = {"leave_one_out": True, "position_grid": 16}
NOTHING = Prepared((), None, torch.device("cpu"))  # the conditions of a model that looks at none


@pytest.mark.parametrize("run, steps, temperature, cfg", [("a", 12, (0.7, 0.3), (8.0, 8.0)), ("b", 5, (1.0, 0.2), (6.0, 2.0))])
@torch.inference_mode()
def test_published_trace(run, steps, temperature, cfg):
    model = Paella(PaellaConfig.from_dict(json.loads((FIXTURES / "configs.json").read_text())["unet"])).eval()
    model.load_state_dict(torch.load(FIXTURES / "unet.pt", weights_only=True)["state_dict"])
    io, trace = load_file(FIXTURES / "unet_io.safetensors"), load_file(FIXTURES / "sampler_trace.safetensors")
    conditions = {name: io[name] for name in ("byt5", "clip", "clip_image")}
    assert torch.equal(unconditional(conditions)["byt5"], trace[f"{run}.byt5_uncond"])
    config = SamplingConfig(num_inference_steps=steps, temperature=temperature, cfg=cfg)
    noise = trace[f"{run}.initial_noise"].long()
    canvases = []
    for index in range(2):
        own = {name: value[index : index + 1] for name, value in conditions.items()}
        prepared = model.prepare(**own), model.prepare(**unconditional(own))
        canvas = start(64, (16, 16), prepared[:1], prepared[1], seed=index, config=config)
        canvases.append(dataclasses.replace(canvas, source=noise[index]))
    for number in range(steps):
        for canvas, tokens in zip(canvases, trace[f"{run}.{number}.tokens_in"].long(), strict=True):
            canvas.tokens, canvas.step = tokens, number
        now = config.at(number)
        logits = torch.stack([guided for _, guided in predictions(model, canvases)])
        # the trace keeps half precision: 1e-4, plus half a unit in the last place
        expected = trace[f"{run}.{number}.probs"].float()
        torch.testing.assert_close((logits / now.temperature).softmax(1), expected, atol=1e-4, rtol=2**-11)
        following = trace[f"{run}.{number}.drawn"].long()
        if number < steps - 1:
            mask = trace[f"{run}.{number}.renoise_mask"].long()
            following, _ = add_noise(following, torch.full((2,), now.next_t), mask=mask, random_tokens=noise)
            assert torch.equal(following, trace[f"{run}.{number + 1}.tokens_in"].long())
        else:
            assert now.next_t == 0 and torch.equal(following, trace[f"{run}.final"].long())


class FixedLogits(nn.Module):
    """Predicts the same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.config = dataclasses.replace(PRESETS["tiny"].unet, num_labels=len(logits))

    def forward(self, tokens, t, *, prepared):
        return self.logits[None, :, None, None].expand(len(tokens), -1, *tokens.shape[1:])


def canvases_of(model, seeds, size, config) -> list[Canvas]:
    return [start(model.config.num_labels, size, [NOTHING], NOTHING, seed=seed, config=config) for seed in seeds]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_labels", [6, 2048])
def test_draws_follow_the_softmax(temperature, num_labels):
    logits = torch.cat([torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -30.0]), torch.full((num_labels - 6,), -5.0)])
    config = SamplingConfig(num_inference_steps=1, temperature=(temperature,), cfg=(1.0,))
    model = FixedLogits(logits)
    tokens = sample(model, canvases_of(model, range(256), (20, 20), config))  # 102,400 draws
    counts = np.bincount(tokens.flatten().numpy(), minlength=num_labels)
    expected = (logits.double() / temperature).softmax(0).numpy() * counts.sum()
    seen = expected > 5
    assert seen.sum() >= 5
    assert stats.chisquare(counts[seen], expected[seen] * counts[seen].sum() / expected[seen].sum()).pvalue > 1e-3
    assert counts[~seen].sum() <= 5 * (~seen).sum()


@pytest.mark.parametrize("renoise_from", ["start", "previous", "fresh"])
def test_renoising_hits_its_rate_and_ends_at_zero(renoise_from):
    seen: list[torch.Tensor] = []

    class Watch(FixedLogits):
        def forward(self, tokens, t, *, prepared):
            seen.append(tokens)
            return super().forward(tokens, t, prepared=prepared)

    model = Watch(torch.tensor([50.0] + [0.0] * 255))  # always draws code 0
    config = SamplingConfig(num_inference_steps=4, cfg=(1,), renoise_from=renoise_from)
    tokens = sample(model, canvases_of(model, [1], (256, 256), config))
    rates = [(grid != 0).float().mean().item() for grid in seen[1:]]
    shares = {"start": [0.75, 0.5, 0.25], "fresh": [0.75, 0.5, 0.25], "previous": [0.75, 0.75 * 0.5, 0.75 * 0.5 * 0.25]}
    assert rates == pytest.approx([share * 255 / 256 for share in shares[renoise_from]], abs=0.01)
    assert (tokens == 0).all()


def test_every_image_has_its_own_randoms():
    assert random_tokens(0, (8, 8), 16).max() < 16
    assert torch.equal(random_tokens(9, (8, 8), 512), random_tokens(9, (8, 8), 512))
    assert not torch.equal(random_tokens(9, (8, 8), 512), random_tokens(8, (8, 8), 512))


@pytest.fixture(scope="module")
def bundle(request) -> Bundle:
    """Of `tiny`, with the U-Net's options that a test may give."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], unet=dataclasses.replace(PRESETS["tiny"].unet, **getattr(request, "param", {})))
    unet = Paella(config.unet).eval()
    with torch.no_grad():  # zero-initialised weights would hide the conditions
        for value in unet.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    return Bundle(config, unet, VQModel(config.vqgan).eval(), TextEncoders.create(config.text).eval(), "none")


def requests(bundle: Bundle) -> list[Canvas]:
    """32 canvases of different prompts, steps, guidance, sizes and modes."""
    made = []
    image_tokens = random_tokens(99, (16, 16), bundle.config.unet.num_labels)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:12, 4:12] = True
    for index in range(32):
        conditions = bundle.conditions(["a", "a rather longer prompt than the first", "blue"][index % 3])
        negative = bundle.negative(conditions, "red" if index % 5 == 0 else None)
        config = SamplingConfig(
            num_inference_steps=2 + index % 4,
            cfg=(1.0 + index % 3,),
            top_k=50 if index % 4 == 0 else None,
            choice="argmax" if index % 7 == 6 else "multinomial",
            noise=(0.6, 0.0) if index % 4 == 2 else (1.0, 0.0),
        )
        extra = {"size": (32, 64) if index % 2 else (64, 64)}
        if index % 4 == 2:
            extra = {"tokens": image_tokens}
        elif index % 8 == 4:
            extra = {"tokens": image_tokens, "mask": mask}
        made.append(bundle.canvas(conditions, negative, seed=index, config=config, **extra))
    return made


@pytest.mark.parametrize("bundle", [{}, OPTIONS], indirect=True, ids=["published", "options"])
def test_images_do_not_depend_on_their_company(bundle):
    alone = [sample(bundle.unet, [canvas])[0] for canvas in requests(bundle)]
    mixed = requests(bundle)
    order = random.Random(0)
    while waiting := [canvas for canvas in mixed if not canvas.done]:
        size = order.choice(waiting).tokens.shape  # one size at a time, any of its canvases, each at its own step
        same = [canvas for canvas in waiting if canvas.tokens.shape == size]
        step(bundle.unet, order.sample(same, order.randint(1, len(same))))
    assert all(torch.equal(canvas.tokens, own) for canvas, own in zip(mixed, alone, strict=True))
    whole = requests(bundle)
    for size in {canvas.tokens.shape for canvas in whole}:
        sample(bundle.unet, [canvas for canvas in whole if canvas.tokens.shape == size])
    assert all(torch.equal(canvas.tokens, own) for canvas, own in zip(whole, alone, strict=True))


@pytest.mark.parametrize("bundle", [{}, OPTIONS], indirect=True, ids=["published", "options"])
def test_prompts_do_not_depend_on_their_company(bundle):
    prompts = ["a", "a rather longer prompt than the first", "blue"]
    settings = SamplingConfig(num_inference_steps=4)
    together = bundle.generate_tokens(prompts, [3, 4, 5], sampling=settings)
    alone = [bundle.generate_tokens([p], [s], sampling=settings) for p, s in zip(prompts, [3, 4, 5], strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], bundle.generate_tokens(["b"], [3], sampling=settings)[0])


@torch.inference_mode()
def test_prepared_conditions_are_the_same(bundle):
    conditions = bundle.conditions("a small red circle")
    tokens, t = random_tokens(0, (16, 16), 512)[None], torch.tensor([0.5])
    plain = bundle.unet(tokens, t, **conditions)
    torch.testing.assert_close(bundle.unet(tokens, t, prepared=bundle.unet.prepare(**conditions)), plain)
    longer = bundle.unet.prepare(**bundle.conditions("a much longer prompt, so that the first is padded"))
    stacked = Prepared.stack([bundle.unet.prepare(**conditions), longer])
    both = bundle.unet(tokens.repeat(2, 1, 1), t.repeat(2), prepared=stacked)
    torch.testing.assert_close(both[:1], plain)


class Watched:
    """A bfloat16 U-Net, whose passes many images share, that takes down the conditions of each."""

    def __init__(self, unet: Paella) -> None:
        self.unet, self.config, self.seen = unet, unet.config, []

    def parameters(self):
        return self.unet.parameters()

    def __call__(self, tokens, t, *, prepared):
        self.seen.append(prepared)
        return self.unet(tokens, t, prepared=prepared)


def test_conditions_are_stacked_once_for_as_long_as_images_go_on_together(bundle):
    half = dataclasses.replace(bundle, unet=copy.deepcopy(bundle.unet).bfloat16())
    model, config = Watched(half.unet), SamplingConfig(num_inference_steps=9)
    first, second, third = (
        half.canvas(conditions, half.negative(conditions), seed=0, config=config)
        for conditions in map(half.conditions, ("a", "a rather longer prompt", "blue"))
    )
    for company in ([first], [first], [first, second], [first, second], [second, first], [second], [second, third]):
        step(model, company)
        rows = [row for canvas in company for row in (*canvas.prompts, canvas.negative)]
        given, expected = model.seen[-1], Prepared.stack(rows)
        assert all(torch.equal(a, b) for a, b in zip(given.keys_values, expected.keys_values, strict=True))
        assert given.mask is expected.mask or torch.equal(given.mask, expected.mask)
    again = [new is old for new, old in itertools.pairwise(model.seen)]
    assert again == [True, False, True, False, False, False]


def test_previews(bundle):
    seen: list[torch.Tensor] = []
    config = SamplingConfig(num_inference_steps=3)
    tokens = bundle.generate_tokens(["a"], [0], sampling=config, on_step=lambda done: seen.append(done[0].prediction))
    assert len(seen) == 3 and torch.equal(seen[-1], tokens[0])


def test_guidance_only_in_an_interval():
    rows: list[int] = []

    class Count(FixedLogits):
        def forward(self, tokens, t, *, prepared):
            rows.append(len(tokens))
            return super().forward(tokens, t, prepared=prepared)

    model = Count(torch.zeros(8))
    config = SamplingConfig(num_inference_steps=5, guided_steps=(1, 3))
    sample(model, canvases_of(model, [0], (4, 4), config))
    assert rows == [1, 2, 2, 1, 1]


def test_named_settings():
    assert [MODEL_CARD.at(i).temperature for i in (0, 11)] == pytest.approx([0.7, 0.3])
    assert MODEL_CARD.at(10).next_t == pytest.approx(1 / 12) and MODEL_CARD.at(11).next_t == 0
    assert [PUBLISHED_DEMO.at(i).cfg for i in (19, 20)] == [8, 1]
    assert PUBLISHED_DEMO.at(25).next_t > 0 and PUBLISHED_DEMO.at(26).next_t == 0
    by_step = SamplingConfig(num_inference_steps=3, cfg=(1, 5, 2), noise=(1.0, 0.9, 0.2, 0.0))
    assert [by_step.at(i).cfg for i in range(3)] == [1, 5, 2] and by_step.at(1).next_t == pytest.approx(0.2)


@pytest.mark.parametrize("choice", ["argmax", "nearest"])
def test_other_choices(bundle, choice):
    config = SamplingConfig(num_inference_steps=2, choice=choice)
    tokens = bundle.generate_tokens(["a"], [0], sampling=config)
    assert tokens.shape == (1, 16, 16) and tokens.max() < 512


def test_nearest_needs_the_codebook():
    model = FixedLogits(torch.zeros(8))
    with pytest.raises(ValueError, match="codebook"):
        sample(model, canvases_of(model, [0], (4, 4), SamplingConfig(num_inference_steps=1, choice="nearest")))


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
        {"cfg": (1.0, 2.0, 3.0)},
        {"noise": (1.5, 0.0)},
        {"guided_steps": (5, 2)},
        {"top_k": 0},
        {"top_p": 0.0},
        {"typical_p": 1.5},
    ],
)
def test_bad_settings(values):
    with pytest.raises(ValueError, match="is not allowed"):
        SamplingConfig(**values)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed="):
        random_tokens(seed, (2, 2), 4)


def test_few_shapes_are_recorded_whatever_is_asked_for(bundle, monkeypatch):
    """A client that varies sizes and prompts must not fill the memory with recordings."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(cuda_graphs, "_Graph", lambda unet, *shape: Watched(unet))
    monkeypatch.setattr(Watched, "replay", lambda graph, tokens, t, prepared: "replayed", raising=False)
    plain: list[tuple[int, ...]] = []
    monkeypatch.setattr(bundle.unet, "forward", lambda tokens, t, **conditions: plain.append(tuple(tokens.shape)))
    graphs = GraphedUnet(bundle.unet, (16, 16))
    for rows in range(1, 20):
        for length in range(1, 200, 3):
            prepared = Prepared((torch.zeros(rows, length, 4),), None, torch.device("cpu"))
            for side in (8, 16):
                graphs(torch.zeros(rows, side, 16, dtype=torch.long), torch.ones(rows), prepared=prepared)
    assert set(graphs.graphs) == {(rows, length, 16, 16) for rows in (1, 2, 4, 8, 16) for length in (64, 128, 256)}
    assert {shape for shape in plain if shape[1] == 16} == {(17, 16, 16), (18, 16, 16), (19, 16, 16)}
    assert {shape[0] for shape in plain if shape[1] == 8} == set(range(1, 20))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, OPTIONS, {"position_grid": 8}], ids=["published", "options", "stretched"])
@torch.inference_mode()
def test_graphs_say_what_the_unet_says(monkeypatch, options):
    """Padded rows and texts, several shapes in turn, each replayed with other inputs than it was recorded with."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which rounds other shapes otherwise
    torch.manual_seed(0)
    model = Paella(dataclasses.replace(PRESETS["tiny"].unet, **options)).eval().cuda()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    graphs = GraphedUnet(model, (16, 16))
    for rows, length in ((2, 5), (3, 70), (1, 64), (2, 9), (17, 5)):
        prepared = [model.prepare(byt5=torch.randn(1, length - row % 2, 128, device="cuda")) for row in range(rows)]
        stacked = Prepared.stack(prepared)
        for _ in range(2):  # the second time with the same conditions
            tokens, t = torch.randint(512, (rows, 16, 16), device="cuda"), torch.rand(rows, device="cuda")
            expected = model(tokens, t, prepared=stacked)
            torch.testing.assert_close(graphs(tokens, t, prepared=stacked), expected, atol=1e-4, rtol=1e-3)
    assert set(graphs.graphs) == {(2, 64, 16, 16), (4, 128, 16, 16), (1, 64, 16, 16)}


def test_random_numbers_are_philox_s_of_seed_step_and_stream():
    expected = np.random.Generator(np.random.Philox(key=[2**32 - 1, 2 * 5 + 1]))
    rng = _rng(2**32 - 1, 5, stream=1)
    assert (rng.random(1000, dtype=np.float32) == expected.random(1000, dtype=np.float32)).all()
    assert (rng.integers(8192, size=100) == expected.integers(8192, size=100)).all()
