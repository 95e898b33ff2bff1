"""Numbers about reconstructions equal those of the tools everybody uses."""

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from paella.metrics import PATCH, REGIONS, psnr, regions, squared_error_by_region, ssim


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 8, 6), (64, 48), mode="bicubic").clamp(0, 1)
    return smooth, (smooth + torch.tensor([0.01, 0.1, 0.4]).view(3, 1, 1, 1) * torch.randn_like(smooth)).clamp(0, 1)


def test_psnr_and_ssim_are_scikit_images(pair):
    reference, images = pair
    for i in range(len(images)):
        a, b = (value[i].permute(1, 2, 0).double().numpy() for value in (reference, images))
        expected = structural_similarity(
            a, b, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(images, reference)[i].item() == pytest.approx(expected, abs=1e-3)
        assert psnr(images, reference)[i].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-3)
    assert ssim(reference, reference).tolist() == pytest.approx([1, 1, 1])


def test_regions_tell_flat_areas_edges_and_texture():
    flat, edge = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.2)
    edge[..., 4:12] = 0.9
    checks = (torch.arange(16)[:, None] // 2 + torch.arange(16) // 2) % 2
    texture = checks.float().expand(1, 3, -1, -1)
    for name, images in zip(REGIONS, (flat, edge, texture), strict=True):
        assert (regions(images) == REGIONS.index(name)).all(), name
    images = torch.cat([flat, texture])
    errors, counts = squared_error_by_region(images + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1), images)
    assert counts.tolist() == [(16 // PATCH) ** 2, 0, (16 // PATCH) ** 2]
    assert (errors / counts.clamp(min=1)).tolist() == pytest.approx([0.01, 0, 0.04])
