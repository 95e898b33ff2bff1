"""A step of VQGAN training: quantizers, losses, the discriminator, workers; without Ray."""

import dataclasses
import sys

import pytest
import torch
from conftest import SMALL_VQ
from process_groups import start_group

from paella.codebook import Health
from paella.config import VQConfig
from paella.discriminator import Discriminator
from paella.metrics import use_and_perplexity
from paella.quantizers import make_quantizer
from paella.vq_losses import VQLossConfig, perceptual_distance
from paella.vqgan import VQModel
from pipelines import train_vqgan
from pipelines.vq_step import Step, Trained

QUANTIZERS = {
    "codebook": SMALL_VQ,
    "cosine": dataclasses.replace(SMALL_VQ, quantizer="cosine"),
    "fsq": dataclasses.replace(SMALL_VQ, quantizer="fsq", fsq_levels=(4, 2, 2, 2)),
    "lfq": dataclasses.replace(SMALL_VQ, quantizer="lfq", c_latent=5),
}

LOSS = VQLossConfig(adversarial=0.1, adversarial_warmup=5, r1=0.1, lecam=0.01, discriminator_width=8)


def config(num_workers: int) -> train_vqgan.TrainVQConfig:
    return dataclasses.replace(
        train_vqgan.presets()["tiny"], data="", output="", model=SMALL_VQ, image_size=32, loss=LOSS, continuous_steps=5,
        batch_size=8, precision="float32", codebook_update="ema", num_workers=num_workers,
    )  # fmt: skip


def step_of(settings: train_vqgan.TrainVQConfig) -> tuple[Trained, list[torch.optim.Optimizer], Step]:
    """What is trained, its optimizers, and what takes a step."""
    torch.manual_seed(0)
    trained = Trained(settings).train()
    modules = [module for module in (trained.vqgan, trained.discriminator) if module is not None]
    optimizers = [settings.optim.optimizers(module) for module in modules]
    step = Step(settings, trained, optimizers, torch.device("cpu"))
    return trained, [optimizer for some in optimizers for optimizer in some], step


def flat_squares(generator: torch.Generator) -> torch.Tensor:
    """Eight pictures of 16 flat squares."""
    return torch.rand(8, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)


def trained_for(settings: train_vqgan.TrainVQConfig, steps: int) -> tuple[Trained, list[dict[str, float]]]:
    """What was trained, and the losses of each step."""
    trained, optimizers, step = step_of(settings)
    generator, losses = torch.Generator().manual_seed(1), []
    for number in range(steps):
        settings.optim.set_lr(optimizers, number, steps)
        if number == steps - 20:
            trained.health.counts.zero_()
        losses.append({name: value.item() for name, value in step(flat_squares(generator), number)[0].items()})
    return trained, losses


@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_are_their_own_nearest_and_training_uses_them(name):
    model = QUANTIZERS[name]
    quantizer = make_quantizer(model)
    if quantizer.learned:
        torch.nn.init.normal_(quantizer.codebook.weight)
    indices = torch.arange(32).view(2, 4, 4)
    assert quantizer.codebook.weight.shape == (32, model.c_latent)
    assert torch.equal(quantizer.nearest(quantizer(indices)), indices)
    settings = dataclasses.replace(
        config(1), model=model, loss=VQLossConfig(), codebook_update="gradient", encoder_context=True, steps=100
    )
    trained, losses = trained_for(settings, 100)
    assert losses[-1]["l1"] < 0.7 * losses[5]["l1"]
    if not quantizer.learned:  # a learned codebook is started and revived by the program
        assert use_and_perplexity(trained.health.counts)[0] > 0.5


def test_equal_codes_are_poor_and_in_the_end_a_collapse():
    health = Health(256, 4)
    health.count(torch.full((1, 10, 10), 7))
    assert [health.collapsed() for _ in range(health.PATIENCE)] == [False] * (health.PATIENCE - 1) + [True]
    health.count(torch.arange(256)[None])
    assert not health.collapsed()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"quantizer": "vq"}, "codebook, cosine, fsq, lfq"),
        ({"quantizer": "fsq", "fsq_levels": (8, 4)}, "as many numbers"),
        ({"quantizer": "fsq", "fsq_levels": (8, 4, 2, 2)}, "the 128 codes of the fsq"),
        ({"quantizer": "lfq"}, "the 16 codes of the lfq"),
        ({"codebook_size": 65_537}, "2 to 65536"),
    ],
)
def test_quantizers_that_cannot_be(values, words):
    with pytest.raises(ValueError, match=words):
        VQConfig(**values)


def test_the_largest_codebook_is_searched_rightly():
    quantizer = make_quantizer(VQConfig(codebook_size=65_536))
    torch.nn.init.normal_(quantizer.codebook.weight)
    some = torch.randint(65_536, (1, 4, 4))
    assert torch.equal(quantizer.nearest(quantizer(some)), some)


def test_f8_is_f4_with_a_level_more():
    presets = train_vqgan.presets()
    f8 = VQModel(presets["f8"].model).eval()
    assert f8.encode(torch.rand(1, 3, 64, 64)).shape == (1, 8, 8)
    assert presets["f4"].model == VQConfig(), "the published model"


def _on_a_part(rank: int, num_workers: int, steps: int, output: str) -> None:
    settings = config(num_workers)
    trained, optimizers, step = step_of(settings)
    generator, part = torch.Generator().manual_seed(1), slice(rank * 8 // num_workers, (rank + 1) * 8 // num_workers)
    for number in range(steps):
        settings.optim.set_lr(optimizers, number, steps)
        _, indices, latents = step(flat_squares(generator)[part], number)
        if indices is not None and number == 7:
            used = trained.health.counts > 0
            trained.health.revive(trained.vqgan.vquantizer, latents, used, torch.Generator().manual_seed(number))
            trained.health.counts.zero_()
    if rank == 0:
        torch.save(trained.state_dict(), output)


def test_two_workers_give_the_weights_of_one(tmp_path):
    """Batch norm, running means, discriminator, adaptive weight and revival see the whole batch."""
    for num_workers in (1, 2):
        start_group(_on_a_part, num_workers, tmp_path, num_workers, 9, str(tmp_path / str(num_workers)))
    one, two = torch.load(tmp_path / "1"), torch.load(tmp_path / "2")
    assert one["health.counts"].sum() == 8 * 64
    for name in one.keys() - {"health.counts"}:
        torch.testing.assert_close(one[name], two[name], atol=5e-3, rtol=5e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert (one["health.counts"] - two["health.counts"]).abs().sum() <= 10, "of 512"


def test_the_discriminator_comes_in_slowly_and_learns():
    loss = VQLossConfig(adversarial=0.2, adversarial_start=10, adversarial_warmup=10, discriminator_width=8)
    assert [loss.adversarial_weight(step) for step in (0, 9, 10, 14, 19, 100)] == pytest.approx([0, 0, 0.02, 0.1, 0.2, 0.2])
    _, losses = trained_for(dataclasses.replace(config(1), loss=loss, codebook_update="gradient"), 60)
    assert "adversarial" not in losses[14]
    assert "adversarial" in losses[15]
    assert losses[-1]["discriminator"] < losses[15]["discriminator"]


def test_r1_is_half_the_squared_gradient():
    torch.manual_seed(0)
    discriminator, images = Discriminator(8).double(), torch.rand(2, 3, 16, 16).double()
    step, direction = 1e-6, torch.randn(2, 3, 16, 16).double()
    with torch.no_grad():
        ahead, behind = (discriminator(images + sign * step * direction).mean((1, 2, 3)) for sign in (1, -1))
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(images).mean((1, 2, 3)).sum(), images)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), (ahead - behind) / (2 * step), atol=1e-5, rtol=1e-3)
    expected = 0.5 * gradient.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(discriminator.float().gradient_penalty(images.detach()), expected.float())


def test_perceptual_distance_of_a_clip(clip_directory):
    distance = perceptual_distance(str(clip_directory))
    images = torch.rand(2, 3, 48, 48)
    assert distance(images, images).tolist() == [0, 0]
    near, far = distance(images + 0.02 * torch.randn_like(images), images), distance(1 - images, images)
    assert (near < far).all()
    settings = VQLossConfig(perceptual=1.0, perceptual_model=str(clip_directory))
    _, losses = trained_for(dataclasses.replace(config(1), loss=settings), 8)
    assert losses[-1]["perceptual"] > 0


def test_losses_that_cannot_be(monkeypatch):
    for values, words in [
        ({"l1": -1.0}, "loss.l1=-1.0"),
        ({"l1": 0, "l2": 0}, "nothing says what"),
        ({"perceptual": 1.0}, "needs loss.perceptual_model"),
        ({"discriminator_width": 12}, "multiple of 8"),
    ]:
        with pytest.raises(ValueError, match=words):
            VQLossConfig(**values)
    monkeypatch.setitem(sys.modules, "lpips", None)  # as where it is not installed
    with pytest.raises(ValueError, match="LPIPS is not at hand"):
        perceptual_distance("lpips")
