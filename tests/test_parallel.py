"""Sharding from outside: what a sharded model sees is what it sees alone."""

import dataclasses

import numpy as np
import pytest
import torch
from process_groups import start_group
from torch.distributed.tensor import DTensor

from paella import parallel
from paella.config import PRESETS
from paella.ema import Ema
from paella.parallel import ParallelConfig, evaluating, full_state_dict, gathered, shard, sum_gradients_with
from paella.training import Keep, NoiseConfig, OptimConfig, TextToTokens, draw_noise, loss_and_metrics
from pipelines import train_config
from pipelines.recovery import Guard, RecoveryConfig
from pipelines.token_dataset import TokenBatch
from pipelines.train_step import train_step

OPTIONS = {"leave_one_out": True, "position_grid": 8}
"""Of the U-Net."""


def _predictions(rank: int, **options: object) -> None:
    """A sharded model's logits, alone and with its weights gathered, are the whole one's to the bit."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], unet=dataclasses.replace(PRESETS["tiny"].unet, **options))
    model = TextToTokens(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    whole = TextToTokens(config).eval()
    whole.load_state_dict(model.state_dict())
    shard(model, torch.bfloat16)
    whole.bfloat16()
    tokens, t = torch.randint(512, (2, 16, 16)), torch.tensor([0.40507, 0.9171])
    text = whole.text.tokenize(["a small red circle", "blue"])
    some = torch.tensor([True, False])
    inputs = (tokens, t, text.ids, text.mask, Keep(some, some, some))
    with torch.no_grad():
        expected = whole(*inputs)
        assert torch.equal(model(*inputs), expected), "noise levels must reach the model unrounded"
        with gathered(model):
            if rank == 0:  # workers may make different numbers of passes
                conditions = {"byt5": model.text.states(text.ids, text.mask), "byt5_mask": text.mask}
                plain = whole.unet(tokens, t, byt5=whole.text.states(text.ids, text.mask), byt5_mask=text.mask)
                assert torch.equal(model.unet(tokens, t, prepared=model.unet.prepare(**conditions)), plain)
        assert torch.equal(model(*inputs), expected)


CAPTIONS = ["a small red circle", "blue", "a large green square left of a cross", "a"] * 2
WAYS = {
    "as it is": ParallelConfig(),
    "recomputed, in two parts": ParallelConfig(activation_checkpointing=True, accumulate=2),
    "in groups, kept, in chunks": ParallelConfig(shard_group_size=2, reshard_after_forward=False, loss_chunk=100),
    "all of it": ParallelConfig(
        shard_group_size=2, reshard_after_forward=False, activation_checkpointing=True, loss_chunk=100, accumulate=2
    ),
}


def small_training(way: ParallelConfig, options: dict | None = None, **changes) -> train_config.TrainConfig:
    """`tiny` with narrow layers, options of the U-Net and both optimizers, eight images a step."""
    tiny = train_config.presets()["tiny"]
    narrow = {"c_hidden": (16, 16), "c_in": 8, "c_out": 8, "c_cond": 16, "nhead": (2, 2), "level_config": ("CTA", "CTA")}
    plain = {"leave_one_out": False, "position_grid": 0}
    unet = dataclasses.replace(tiny.model.unet, **narrow | plain | (options or {}))
    values = {"data": "", "vqgan": "", "output": "", "steps": 10, "global_batch_size": 8, "parallel": way, "num_workers": 4}
    values["noise"] = NoiseConfig(t_scale=tiny.noise.t_scale)
    optim = OptimConfig(lr=1e-3, matrix_lr=1e-3, warmup_steps=1)
    return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, unet=unet), optim=optim, **(values | changes))


def new_model(config: train_config.TrainConfig) -> TextToTokens:
    torch.manual_seed(0)
    model = TextToTokens(config.model).train()
    torch.nn.init.normal_(model.unet.clf[1].weight, std=0.1)
    return model


def tokens_of(step: int) -> torch.Tensor:
    return torch.randint(512, (8, 8, 8), generator=torch.Generator().manual_seed(step))


def plainly(config: train_config.TrainConfig, steps: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and weights of one process that sees whole batches: nothing of the above."""
    model = new_model(config)
    optimizers, losses, norms = config.optim.optimizers(model), [], []
    text = model.text.tokenize(CAPTIONS)
    for step in range(steps):
        config.optim.set_lr(optimizers, step, config.steps)
        draws = draw_noise(tokens_of(step), 512, config.seed, range(8 * step, 8 * step + 8), config.noise)
        inputs = (draws.noised, draws.t, text.ids, text.mask, draws.keep)
        loss, _ = loss_and_metrics(*model.losses(tokens_of(step), *inputs, label_smoothing=config.label_smoothing), draws)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model.state_dict()


def sharded(config: train_config.TrainConfig, rank: int, steps: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same by four workers, as `train` does it."""
    model, losses, norms = new_model(config), [], []
    shard(model, torch.float32, config.parallel)
    optimizers, start = config.optim.optimizers(model), Ema(model, 0.9)
    for step in range(steps):
        text = model.text.tokenize(CAPTIONS[:1])
        with start.swapped_into(model), evaluating(model):  # must not be felt in training
            model(tokens_of(9)[:1], torch.ones(1), text.ids, text.mask, Keep(*torch.ones(3, 1).bool()))
        mine = slice(2 * rank, 2 * rank + 2)
        batch = TokenBatch(tokens_of(step)[mine].numpy().astype(np.int64), CAPTIONS[mine], [""] * 2)
        sums, norm, _ = train_step(model, optimizers, config, step, batch, torch.device("cpu"), Guard(RecoveryConfig()))
        losses.append(parallel.mean_over_workers(sums)[1].item())
        norms.append(norm)
    return losses, norms, full_state_dict(model)


def _ways(rank: int) -> None:
    """Losses and weights after three steps, against one process with whole batches."""
    parallel.MIN_UNIT_PARAMETERS, parallel.MAX_UNITS = 0, 3  # units of several blocks, as in the large model
    plain = small_training(ParallelConfig())
    start = new_model(plain).state_dict()
    expected, expected_norms, weights = plainly(plain, steps=3) if rank == 0 else ([], [], {})
    for name, way in WAYS.items():
        losses, norms, state = sharded(small_training(way), rank, steps=3)
        if rank:  # losses and norms are everybody's, whole weights on rank 0
            continue
        assert losses == pytest.approx(expected, abs=1e-5), name
        assert norms == pytest.approx(expected_norms, rel=1e-3), name  # neither optimizer sees the gradient's size
        for key, value in state.items():
            off, moved = (value - weights[key]).norm(), (weights[key] - start[key]).norm()
            assert off <= 0.01 * moved, f"{name}: {key}: {off / moved}"


def _weights_between_parts() -> None:
    """Weights that are kept are gathered once a step; others are given back after every part."""
    for kept in (False, True):
        way = ParallelConfig(accumulate=2, reshard_after_forward=not kept)
        model = new_model(small_training(way))
        text = model.text.tokenize(CAPTIONS[:1])
        inputs = tokens_of(0)[:1], torch.ones(1), text.ids, text.mask, Keep(*torch.ones(3, 1).bool())
        shard(model, torch.float32, way)
        for is_last in (False, True):
            sum_gradients_with(model, is_last, way)
            model(*inputs).float().square().mean().backward()
            whole = not any(isinstance(value, DTensor) for value in model.unet.parameters())
            assert whole == (kept and not is_last)


def _all_of_it(rank: int) -> None:
    _predictions(rank)
    _predictions(rank, **OPTIONS)
    _ways(rank)
    _weights_between_parts()


def test_sharded_models_predict_and_learn_what_the_whole_one_does(tmp_path):
    """Four workers in every way of spreading the work; float32 losses to 1e-5, gradient norms to 1e-3, weights to 1 %
    of what they moved."""
    start_group(_all_of_it, 4, tmp_path)


def _five_steps(rank: int, num_workers: int, path: str, options: dict) -> None:
    """Leaves the gradients' norms, and the averages of the weights."""
    config, norms, size = small_training(ParallelConfig(), options, num_workers=2), [], 8 // num_workers
    model, mine = new_model(config), slice(size * rank, size * rank + size)
    shard(model, torch.float32, config.parallel)
    optimizers, ema = config.optim.optimizers(model), Ema(model, 0.99)
    for step in range(5):
        batch = TokenBatch(tokens_of(step)[mine].numpy().astype(np.int64), CAPTIONS[mine], [""] * size)
        norms.append(train_step(model, optimizers, config, step, batch, torch.device("cpu"), Guard(RecoveryConfig()))[1])
        ema.update(model, step)
    with ema.swapped_into(model):
        state = full_state_dict(model)
    if rank == 0:
        torch.save((norms, state), path)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["published", "options"])
def test_two_workers_step_as_one_that_takes_two_passes(tmp_path, options):
    """The same gradients, of which AdamW rounds the last numbers of a shard otherwise than in the midst of a whole tensor."""
    for number in (1, 2):
        start_group(_five_steps, number, tmp_path, number, f"{tmp_path}/{number}.pt", options)
    (norms, weights), (expected_norms, expected) = (torch.load(tmp_path / f"{number}.pt") for number in (2, 1))
    assert norms[:2] == expected_norms[:2] and norms == pytest.approx(expected_norms, rel=1e-6)
    for name, value in weights.items():
        pair = value, expected[name]
        if name.endswith("in_proj_bias"):
            # a bias of all keys changes no softmax: its gradient is rounding alone, of which AdamW makes whole steps
            pair = tuple(each.view(3, -1)[[0, 2]] for each in pair)
        torch.testing.assert_close(*pair, atol=1e-6, rtol=0, msg=name)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same():
    """torch.compile on and off, alone and with recomputing: float32 losses to 1e-5 over captions of changing lengths."""
    config = small_training(ParallelConfig())
    unet = dataclasses.replace(config.model.unet, c_hidden=(16,), nhead=(2,), blocks=(1,), level_config=("CTA",))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, unet=unet), optim=OptimConfig(lr=1e-3))
    curves = []
    for way in (None, ParallelConfig(compile=True), ParallelConfig(compile=True, activation_checkpointing=True)):
        model, losses = new_model(config), []
        for block in model.unet.modules():
            if way is not None and isinstance(block, parallel.ResBlock | parallel.AttnBlock):
                parallel._in_training(block, way)
        (optimizer,) = config.optim.optimizers(model)
        for step in range(4):
            text = model.text.tokenize([caption * (step + 1) for caption in CAPTIONS])
            draws = draw_noise(tokens_of(step), 512, 0, range(8 * step, 8 * step + 8), config.noise)
            inputs = (draws.noised, draws.t, text.ids, text.mask, draws.keep)
            loss, _ = loss_and_metrics(*model.losses(tokens_of(step), *inputs, label_smoothing=0.1), draws)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[2] == pytest.approx(curves[0], abs=1e-5)


def test_dropout_is_the_same_in_a_block_that_is_computed_again():
    config = PRESETS["tiny"]
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, dropout=0.3))
    tokens = torch.randint(512, (2, 8, 8))
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = TextToTokens(config).train()
        torch.nn.init.normal_(model.unet.clf[1].weight, std=0.1)
        for block in model.unet.modules():
            if isinstance(block, parallel.ResBlock | parallel.AttnBlock):
                parallel._in_training(block, ParallelConfig(activation_checkpointing=again))
        text, yes = model.text.tokenize(["a", "b"]), torch.ones(2, dtype=torch.bool)
        torch.manual_seed(1)
        model(tokens, torch.tensor([0.5, 0.9]), text.ids, text.mask, Keep(yes, yes, yes)).square().mean().backward()
        gradients.append([value.grad for value in model.parameters() if value.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_ways_that_do_not_fit_are_refused():
    for way, words in [
        (ParallelConfig(shard_group_size=3), "shard_group_size=3 must divide num_workers=4"),
        (ParallelConfig(accumulate=3), "times parallel.accumulate=3"),
    ]:
        with pytest.raises(ValueError, match=words):
            small_training(way)
    with pytest.raises(ValueError, match=r"parallel\.loss_chunk=0"):
        ParallelConfig(loss_chunk=0)
