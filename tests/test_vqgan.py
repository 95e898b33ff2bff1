"""The VQGAN: shapes, quantization, and a codebook that starts from data and does not collapse."""

import pytest
import torch

from paella import codebook
from paella.config import VQConfig
from paella.metrics import codebook_use, psnr
from paella.vqgan import Codebook, VQModel
from pipelines.vq_step import (
    encoder_blocks,
    encoder_strides,
    freeze_encoder_context,
    leave_out_encoder_context,
    without_ring,
)

CONFIG = VQConfig(bottleneck_blocks=1, c_hidden=16, codebook_size=32)


def test_shapes_and_bad_sizes():
    model = VQModel(CONFIG).eval()
    indices = model.encode(torch.rand(2, 3, 32, 16))
    assert indices.shape == (2, 8, 4)
    assert model.decode_indices(indices).shape == (2, 3, 32, 16)
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(torch.rand(1, 3, 30, 16))


def test_nearest_equals_the_plain_distance():
    book = Codebook(64, 4)
    torch.nn.init.normal_(book.codebook.weight)
    latents = torch.randn(3, 4, 50, 40)
    flat = codebook.flatten(latents)
    plain = torch.cdist(flat.double(), book.codebook.weight.double()).argmin(1).view(3, 50, 40)
    assert torch.equal(book.nearest(latents), plain)


def test_straight_through_gradients_reach_encoder_and_codes():
    model = VQModel(CONFIG)
    images = torch.rand(2, 3, 16, 16)
    reconstruction, _, _, loss = model(images)
    ((reconstruction - images).square().mean() + loss).backward()
    assert model.in_block[1].weight.grad.abs().sum() > 0
    assert model.vquantizer.codebook.weight.grad.abs().sum() > 0


def test_codebook_starts_from_data_rare_latents_included():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(5000, 4, generator=generator) * 0.01
    rare = torch.randn(8, 4, generator=generator) * 0.01 + 10
    book = Codebook(16, 4)
    codebook.kmeans_init(book, torch.cat([common, rare]), generator)
    assert (book.codebook.weight.mean(1) > 5).any()
    with pytest.raises(ValueError, match="at least as many latents"):
        codebook.kmeans_init(book, common[:3], generator)


def test_collapsed_codebook_revives():
    generator = torch.Generator().manual_seed(0)
    book = Codebook(32, 4)
    book.codebook.weight.data.zero_()
    latents = torch.randn(2000, 4, generator=generator)
    for _ in range(3):
        indices = book.nearest(latents[:, :, None, None])
        used = torch.bincount(indices.flatten(), minlength=32) > 0
        codebook.revive(book, latents, used, generator)
    share, perplexity = codebook_use(book.nearest(latents[:, :, None, None]), 32)
    assert share > 0.9
    assert perplexity > 10
    assert codebook.revive(book, latents, torch.ones(32, dtype=torch.bool), generator) == 0


def test_metrics():
    images = torch.full((2, 3, 4, 4), 0.5)
    assert psnr(images, images + 0.1).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert codebook_use(torch.tensor([0, 0, 1, 1]), 4) == (0.5, pytest.approx(2.0))


def test_without_encoder_context_a_token_depends_on_its_own_pixels_alone():
    torch.manual_seed(0)
    model = VQModel(CONFIG).eval()
    leave_out_encoder_context(model)
    image, side = torch.rand(1, 3, 32, 32), model.config.downsampling
    changed = torch.rand(1, 3, 32, 32)
    own = (..., slice(2 * side, 3 * side), slice(3 * side, 4 * side))
    changed[own] = image[own]
    with torch.no_grad():
        before, after = model.encode_latents(image), model.encode_latents(changed)
    assert torch.equal(before[..., 2, 3], after[..., 2, 3])
    assert not torch.equal(before[..., 2, 2], after[..., 2, 2])


def test_training_leaves_the_encoder_without_context():
    torch.manual_seed(0)
    model = VQModel(CONFIG)
    leave_out_encoder_context(model)
    freeze_encoder_context(model)
    model.encode_latents(torch.rand(2, 3, 32, 32)).square().sum().backward()
    for stride in encoder_strides(model):
        assert stride.weight.grad is not None
        assert stride.weight.grad[:, :, 1:-1, 1:-1].abs().sum() > 0
        assert torch.equal(stride.weight.grad, without_ring(stride.weight.grad))
    assert not any(parameter.requires_grad for block in encoder_blocks(model) for parameter in block.depthwise.parameters())
