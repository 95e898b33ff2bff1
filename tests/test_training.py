"""A training step: noise that belongs to the sample, loss by noise level, averages, schedule, checkpoints."""

import dataclasses

import pytest
import torch

from paella.checkpoint import TrainingState
from paella.config import PRESETS
from paella.ema import Ema
from paella.levels import LevelBalance
from paella.objective import add_noise
from paella.parallel import compute_dtype, count_parameters
from paella.training import Keep, NoiseConfig, OptimConfig, TextToTokens, draw_noise, loss_and_metrics, metrics_of

TINY = PRESETS["tiny"]
SMALL = dataclasses.replace(
    TINY,
    unet=dataclasses.replace(TINY.unet, c_hidden=(16, 16), c_in=8, c_out=8, c_cond=16, nhead=(2, 2), blocks=(1, 1),
                             level_config=("CTA", "CTA")),
)  # fmt: skip
OPTIONS = {"leave_one_out": True, "position_grid": 8}


def with_options(config, **options):
    return dataclasses.replace(config, unet=dataclasses.replace(config.unet, **options))


def losses_of(model, tokens, draws, text, label_smoothing=0.1, chunk=None):
    inputs = (draws.noised, draws.t, text.ids, text.mask, draws.keep)
    return model.losses(tokens, *inputs, label_smoothing=label_smoothing, chunk=chunk)


def test_noise_belongs_to_the_sample_not_to_the_worker():
    tokens = torch.randint(256, (4, 8, 8))
    together = draw_noise(tokens, 256, 7, range(4), NoiseConfig())
    apart = [draw_noise(tokens[part], 256, 7, part, NoiseConfig()) for part in ([0, 1], [2, 3])]
    assert torch.equal(together.noised, torch.cat([part.noised for part in apart]))
    assert torch.equal(together.t, torch.cat([part.t for part in apart]))
    again = draw_noise(tokens, 256, 7, range(4, 8), NoiseConfig())
    assert not torch.equal(together.t, again.t)


def test_the_random_numbers_of_a_run_stay_what_they_are():
    """Those of a run that was begun with an earlier version, and those that no option is about."""
    tokens = torch.arange(32).view(2, 4, 4)
    published = draw_noise(tokens, 64, 7, [11, 12], NoiseConfig(), 5)
    assert published.t.tolist() == pytest.approx([0.8845992, 1.0], abs=1e-7) and published.own is None
    expected = (
        [10, 23, 12, 24, 51, 33, 32, 4, 31, 29, 27, 7, 3, 21, 18, 44],
        [7, 63, 48, 8, 14, 28, 24, 46, 10, 15, 39, 30, 41, 19, 10, 15],
    )
    assert published.noised.flatten(1).tolist() == list(expected)
    assert published.keep.clip.tolist() == [True, True] and published.keep.clip_image.tolist() == [False, False]
    assert draw_noise(tokens, 64, 7, [11, 12], NoiseConfig(drop_by="batch"), 5).keep.clip.tolist() == [False, False]
    more = draw_noise(tokens, 64, 7, [11, 12], NoiseConfig(own_draws=0.5, balance=1.0), 5)
    assert torch.equal(more.t, published.t) and torch.equal(more.noised, published.noised)
    spread = draw_noise(tokens, 64, 7, [11, 12], NoiseConfig(stratified=True), 5, 64)
    assert not torch.equal(spread.t, published.t) and torch.equal(spread.keep.clip, published.keep.clip)


def test_stratified_levels_cover_their_range_in_every_batch():
    """Whoever has which part of the batch, and in another order each step."""
    tokens, config = torch.zeros(16, 2, 2, dtype=torch.long), NoiseConfig(stratified=True, t_scale=1.0)
    orders = []
    for step in range(3):
        samples = range(16 * step, 16 * step + 16)
        t = draw_noise(tokens, 16, 3, samples, config, step, 16).t
        assert ((1 - t) * 16).long().sort().values.tolist() == list(range(16)), "one in each sixteenth"
        orders.append(((1 - t) * 16).long().tolist())
        parts = [draw_noise(tokens[:4], 16, 3, samples[first : first + 4], config, step, 16).t for first in range(0, 16, 4)]
        assert torch.equal(torch.cat(parts), t)
    assert orders[0] != orders[1] != orders[2]
    wide = draw_noise(torch.zeros(200, 2, 2, dtype=torch.long), 16, 0, range(200), NoiseConfig(stratified=True, t_scale=2.0)).t
    assert (wide == 1).sum() == 100, "exactly the share that is all noise"


@pytest.mark.parametrize("name, value", [("own_draws", 1.5), ("own_draws_ahead", -0.1), ("balance", float("nan"))])
def test_noise_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=rf"noise\.{name}={value} is not allowed: 0 to 1"):
        NoiseConfig(**{name: value})


def test_noise_has_its_rate_and_captions_are_dropped():
    tokens = torch.zeros(400, 16, 16, dtype=torch.long)
    draws = draw_noise(tokens, 256, 0, range(400), NoiseConfig(drop_caption=0.25, keep_clip=0.5, keep_clip_image=0.75))
    share = (draws.noised != 0).float().mean((1, 2))
    torch.testing.assert_close(share, draws.t * 255 / 256, atol=0.15, rtol=0)
    shares = [kept.float().mean().item() for kept in (draws.keep.caption, draws.keep.clip, draws.keep.clip_image)]
    assert shares == pytest.approx([0.75, 0.5, 0.75], abs=0.07)
    both = (draws.keep.caption & draws.keep.clip_image).float().mean().item()
    assert both == pytest.approx(0.75**2, abs=0.07), "each is drawn on its own"
    with pytest.raises(ValueError, match="num_labels"):
        add_noise(tokens, draws.t)


def test_conditions_are_kept_by_the_batch_if_wanted():
    """All workers drop the same, and each batch by itself."""
    tokens, config = torch.zeros(4, 2, 2, dtype=torch.long), NoiseConfig(drop_caption=0.5, keep_clip=0.5, drop_by="batch")
    seen = [draw_noise(tokens, 16, 0, range(4 * step, 4 * step + 4), config, step).keep for step in range(100)]
    for name in ("caption", "clip"):
        kept = torch.stack([getattr(keep, name) for keep in seen])  # (steps,B)
        assert torch.equal(kept.all(1), kept.any(1))
        assert kept.float().mean().item() == pytest.approx(0.5, abs=0.15)
    other = draw_noise(tokens[:1], 16, 0, [17], config, 4).keep
    assert torch.equal(other.caption, seen[4].caption[:1])
    with pytest.raises(ValueError, match=r"noise\.drop_by"):
        NoiseConfig(drop_by="epoch")


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["published", "options"])
@pytest.mark.parametrize("chunk", [None, 50, 10_000])
def test_losses_are_those_of_the_logits(chunk, options):
    """In chunks or not: the same losses and gradients as from whole logits, to float32's rounding."""
    torch.manual_seed(0)
    model = TextToTokens(with_options(SMALL, **options))
    torch.nn.init.normal_(model.unet.clf[1].weight, std=0.1)
    tokens, text = torch.randint(256, (3, 8, 8)), model.text.tokenize(["a", "b", "a longer caption"])
    draws = draw_noise(tokens, 256, 0, range(3), NoiseConfig(drop_caption=0.0))
    logits = model(draws.noised, draws.t, text.ids, text.mask, draws.keep)
    expected = torch.nn.functional.cross_entropy(logits, tokens, label_smoothing=0.1, reduction="none").flatten()
    expected.mean().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    losses, right = losses_of(model, tokens, draws, text, chunk=chunk)
    losses.mean().backward()
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(right, (logits.argmax(1) == tokens).flatten())
    for name, value in model.named_parameters():
        if name in gradients:
            off = (value.grad - gradients[name]).norm() / gradients[name].norm()
            assert off < 1e-4, f"{name}: {off}"  # single numbers of a gradient are further off where larger ones cancel


def test_noise_levels_reach_all_noise():
    draws = draw_noise(torch.zeros(500, 2, 2, dtype=torch.long), 16, 0, range(500), NoiseConfig(t_scale=2.0))
    assert abs((draws.t == 1).float().mean().item() - 0.5) < 0.07
    assert 0 < draws.t.min() < 0.05


def test_loss_falls_on_one_batch_and_dropped_captions_do_not_matter():
    torch.manual_seed(0)
    model = TextToTokens(SMALL)
    (optimizer,) = OptimConfig(lr=1e-2, warmup_steps=1).optimizers(model)
    tokens = torch.randint(4, (8, 8, 8))
    text = model.text.tokenize([f"caption {i}" for i in range(8)])
    draws = draw_noise(tokens, 256, 0, range(8), NoiseConfig(drop_caption=0.0))
    losses = []
    for _ in range(60):
        loss, _ = loss_and_metrics(*losses_of(model, tokens, draws, text, 0.0), draws)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    nothing = Keep(*torch.zeros(3, 8, dtype=torch.bool))
    other = model.text.tokenize([f"another {i}" for i in range(8)])
    assert other.mask.shape == text.mask.shape
    assert torch.equal(
        model(draws.noised, draws.t, text.ids, text.mask, nothing),
        model(draws.noised, draws.t, other.ids, text.mask, nothing),
    )


def test_training_sees_clip_as_sampling_does():
    """A dropped image embedding is as if there were none, a dropped text is zeros, and both matter where they are kept."""
    torch.manual_seed(0)
    model = TextToTokens(dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, clip="encoders/clip"))).eval()
    torch.nn.init.normal_(model.unet.clf[1].weight)
    assert model.text.clip is None, "the embeddings come with the tokens"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"unet.clip_mapper.weight", "unet.clip_image_mapper.weight"} <= trained
    tokens, t = torch.randint(256, (2, 8, 8)), torch.ones(2)
    text = model.text.tokenize(["a circle", "a much longer caption"])
    clip, clip_image = torch.randn(2, 2, SMALL.unet.clip_embd)
    states = model.text.states(text.ids, text.mask)
    yes, no = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)

    def trained_with(*keep: torch.Tensor) -> torch.Tensor:
        return model(tokens, t, text.ids, text.mask, Keep(*keep), clip, clip_image)

    def sampled_with(**conditions: torch.Tensor) -> torch.Tensor:
        return model.unet(tokens, t, byt5_mask=text.mask, **conditions)

    zero, image = torch.zeros_like(clip), {"clip_image": clip_image}
    torch.testing.assert_close(trained_with(yes, yes, yes), sampled_with(byt5=states, clip=clip, **image))
    torch.testing.assert_close(trained_with(yes, yes, no), sampled_with(byt5=states, clip=clip))
    torch.testing.assert_close(trained_with(yes, no, no), sampled_with(byt5=states, clip=zero))
    torch.testing.assert_close(trained_with(no, yes, yes), sampled_with(byt5=states * 0, clip=zero, **image))
    assert not torch.equal(trained_with(yes, yes, yes), trained_with(yes, yes, no))
    assert not torch.equal(trained_with(yes, yes, no), trained_with(yes, no, no))


def test_metrics_by_noise_level():
    tokens = torch.zeros(2, 4, 4, dtype=torch.long)
    draws = draw_noise(tokens, 16, 0, range(2), NoiseConfig(drop_caption=0.0))
    draws = dataclasses.replace(draws, t=torch.tensor([0.1, 0.9]))
    logits = torch.zeros(2, 16, 4, 4)
    logits[0, 0] = 9.0
    losses = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    _, sums = loss_and_metrics(losses, logits.argmax(1) == tokens, draws)
    metrics = metrics_of(sums, 1)
    assert metrics["loss_t_0.00_0.25"] == pytest.approx(0, abs=0.01)
    assert metrics["loss_t_0.75_1.00"] == pytest.approx(torch.tensor(16.0).log().item(), abs=1e-4)
    assert "loss_t_0.25_0.50" not in metrics
    assert metrics["loss"] == pytest.approx((metrics["loss_t_0.00_0.25"] + metrics["loss_t_0.75_1.00"]) / 2, abs=1e-4)
    balance = LevelBalance()
    balance.means[2], balance.means[18] = 0.5, 1.5  # weights 1.5 and 0.5
    loss, balanced_sums = loss_and_metrics(losses, logits.argmax(1) == tokens, draws, balance, 1.0)
    assert loss.item() == pytest.approx((1.5 * metrics["loss_t_0.00_0.25"] + 0.5 * metrics["loss_t_0.75_1.00"]) / 2, abs=1e-4)
    assert torch.equal(balanced_sums, sums), "metrics say the plain loss"


def test_equal_logits_are_never_right():
    model = TextToTokens(dataclasses.replace(SMALL, unet=dataclasses.replace(SMALL.unet, leave_one_out=False)))
    torch.nn.init.zeros_(model.unet.out_mapper[1].weight)
    tokens, text = torch.zeros(2, 8, 8, dtype=torch.long), model.text.tokenize(["a", "b"])
    some = torch.ones(2, dtype=torch.bool)
    inputs = (tokens, torch.ones(2), text.ids, text.mask, Keep(some, some, some))
    assert not model.losses(tokens, *inputs, label_smoothing=0.0)[1].any()


def test_a_taught_text_encoder_learns_at_a_share_of_the_rate():
    model = TextToTokens(SMALL)
    (adamw,) = (optim := OptimConfig(lr=1e-2, warmup_steps=1, text_lr_share=0.25)).optimizers(model)
    optim.set_lr([adamw], 0, 10)
    rates = {parameter: group["lr"] for group in adamw.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {rates[each] for name, each in trained.items() if name.startswith("text.")} == {2.5e-3}
    assert {rates[each] for name, each in trained.items() if not name.startswith("text.")} == {1e-2}


def test_noise_moves_from_its_first_settings_to_its_last():
    noise = NoiseConfig(t_scale=1.4, final_t_scale=1.0, balance=0.5, final_balance=1.0, own_draws=0.5)
    assert noise.at(0) == NoiseConfig(t_scale=1.4, balance=0.5, own_draws=0.5)
    assert (noise.at(0.25).t_scale, noise.at(0.25).balance) == (pytest.approx(1.3), pytest.approx(0.625))
    assert NoiseConfig(balance=0.3).at(0.7) == NoiseConfig(balance=0.3)
    for wrong in ({"final_t_scale": 0.5}, {"final_balance": 0.5}, {"balance": 0.5, "final_balance": 2.0}):
        with pytest.raises(ValueError, match="is not allowed"):
            NoiseConfig(**wrong)


def test_schedule():
    model = TextToTokens(SMALL)
    optim = OptimConfig(lr=1.0, matrix_lr=4.0, warmup_steps=10, final_lr_fraction=0.1)
    adamw, muon = optim.optimizers(model)
    assert optim.set_lr([adamw, muon], 0, 100) == pytest.approx(0.1)
    assert [group["lr"] for group in adamw.param_groups + muon.param_groups] == pytest.approx([0.1, 0.4])
    assert optim.set_lr([adamw], 9, 100) > 0.9
    assert optim.set_lr([adamw], 100, 100) == pytest.approx(0.1)
    assert OptimConfig(lr=1.0, warmup_steps=1).set_lr([adamw], 50, 100) == 1.0
    for name in ("lr", "matrix_lr"):
        with pytest.raises(ValueError, match=rf"optim\.{name}"):
            OptimConfig(**{name: 0.0})


def test_every_trained_parameter_has_one_optimizer_and_muon_the_matrices_of_blocks():
    model = TextToTokens(with_options(SMALL, **OPTIONS))
    adamw, muon = (
        {id(p) for group in o.param_groups for p in group["params"]} for o in OptimConfig(matrix_lr=1e-2).optimizers(model)
    )
    assert adamw | muon == {id(p) for p in model.parameters() if p.requires_grad}
    assert not adamw & muon
    names = {name for name, parameter in model.named_parameters() if id(parameter) in muon}
    assert {name.split(".")[-2] for name in names} == {"0", "4", "attn", "out_proj"}  # the MLP's two, and attention's
    assert all("_blocks" in name for name in names)
    assert id(model.unet.positions) in adamw


def test_ema_follows_and_swaps_back():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = Ema(model, 0.9)
    model.weight.data.fill_(1.0)
    ema.update(model, 10_000)
    assert ema.shadow["weight"].item() == pytest.approx(0.1)
    with ema.swapped_into(model):
        assert model.weight.item() == pytest.approx(0.1)
    assert model.weight.item() == 1.0


def test_without_decay_there_are_no_averages_to_keep():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(model, 0.0)
    ema.update(model, 3)
    assert not ema.shadow
    before = model.weight.clone()
    with ema.swapped_into(model):
        assert torch.equal(model.weight, before)


def test_checkpoint_restores_weights_optimizer_and_averages(tmp_path):
    def build():
        torch.manual_seed(0)
        model = TextToTokens(SMALL)
        return model, OptimConfig(matrix_lr=1e-3).optimizers(model), Ema(model, 0.9)

    def train(model, optimizers, ema, steps):
        tokens = torch.randint(256, (2, 8, 8), generator=torch.Generator().manual_seed(1))
        text = model.text.tokenize(["a", "b"])
        for step in steps:
            draws = draw_noise(tokens, 256, 0, range(2 * step, 2 * step + 2), NoiseConfig(drop_caption=0.0))
            loss_and_metrics(*losses_of(model, tokens, draws, text), draws)[0].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            ema.update(model, step)

    undisturbed = build()
    train(*undisturbed, range(4))
    first = build()
    train(*first, range(2))
    TrainingState(*first).save(tmp_path).result()
    resumed = build()
    TrainingState(*resumed).load(str(tmp_path))
    train(*resumed, range(2, 4))
    for (name, ours), (_, theirs) in zip(resumed[0].state_dict().items(), undisturbed[0].state_dict().items(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    for name, value in resumed[2].shadow.items():
        torch.testing.assert_close(value, undisturbed[2].shadow[name], msg=name)


def test_precision():
    cpu = torch.device("cpu")
    assert compute_dtype("float32", cpu) is torch.float32
    assert compute_dtype("bf16", cpu) is torch.bfloat16
    assert compute_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert count_parameters(torch.nn.Linear(3, 2)) == 8
