"""Distances between sets of images: equal to independent implementations, and right where the answer is known."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from paella import distances


@pytest.fixture(scope="module")
def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator)
    made, reference = torch.randn(600, 24, generator=generator) @ mix, torch.randn(500, 24, generator=generator) @ mix + 0.3
    return made, reference


def shifted(features: torch.Tensor, by: float) -> torch.Tensor:
    return features + by


def test_frechet_distance_is_torch_fidelitys(features):
    statistics = [fid_features_to_statistics(part) for part in features]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert distances.frechet_distance(*features) == pytest.approx(expected, abs=1e-3)
    few = features[0][:10], features[1]  # fewer images than features: a singular covariance
    statistics = [fid_features_to_statistics(part) for part in few]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert distances.frechet_distance(*few) == pytest.approx(expected, rel=1e-3)


def test_cmmd_is_the_mean_over_all_pairs(features):
    a, b = (part.double().numpy() / np.linalg.norm(part.numpy(), axis=1, keepdims=True) for part in features)
    kernels = [np.exp(-cdist(x, y, "sqeuclidean") / 200).mean() for x, y in ((a, a), (b, b), (a, b))]
    assert distances.cmmd(*features).item() == pytest.approx(1000 * (kernels[0] + kernels[1] - 2 * kernels[2]), abs=1e-3)


def test_cmmd_without_each_block(features):
    made, reference = features
    expected = [distances.cmmd(made[torch.arange(600) % 7 != block], reference).item() for block in range(7)]
    assert distances.cmmd(made, reference, blocks=7).tolist() == pytest.approx(expected)


def test_what_the_reference_gives_may_be_computed_once(features):
    made, reference = features
    moments = distances.Moments.of(reference)
    assert distances.frechet_distance(made, moments) == distances.frechet_distance(made, reference)
    radii = distances.radii(reference)
    assert distances.prdc(made, reference, reference_radii=radii) == distances.prdc(made, reference)


def test_precision_recall_density_coverage_by_whole_matrices(features):
    made, reference = (part.double().numpy() for part in features)
    radius_made, radius_reference = (np.sort(cdist(part, part), axis=1)[:, 5] for part in (made, reference))
    between = cdist(made, reference)
    expected = {
        "precision": (between <= radius_reference).any(1).mean(),
        "recall": (between <= radius_made[:, None]).any(0).mean(),
        "density": (between <= radius_reference).sum() / (5 * len(made)),
        "coverage": (between.min(0) <= radius_reference).mean(),
    }
    assert distances.prdc(*features) == pytest.approx(expected)


@pytest.mark.parametrize("distance", [distances.frechet_distance, distances.cmmd])
def test_equal_sets_have_no_distance_and_farther_ones_more(distance, features):
    made, _ = features
    assert float(distance(made, made)) == pytest.approx(0, abs=1e-3)
    grows = [float(distance(shifted(made, by), made)) for by in (0.1, 0.5, 2.0)]
    assert grows == sorted(grows) and grows[0] > 1e-3


def test_precision_and_recall_of_equal_and_of_distant_sets(features):
    made, _ = features
    equal, distant = distances.prdc(made, made), distances.prdc(shifted(made, 1000.0), made)
    assert equal["precision"] == equal["recall"] == equal["coverage"] == 1
    assert set(distant.values()) == {0.0}


def test_blocks_change_nothing(features, monkeypatch):
    whole = distances.cmmd(*features), distances.prdc(*features)
    monkeypatch.setattr(distances, "BLOCK", 97)
    assert distances.cmmd(*features).item() == pytest.approx(whole[0].item())
    assert distances.prdc(*features) == whole[1]


def test_clip_scores():
    images, texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(distances.clip_scores(images, texts), torch.tensor([100, 100 / 2**0.5, 0], dtype=torch.float64))


def test_confidence_of_a_mean_is_the_usual_one():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    half = distances.jackknife(lambda rows: values[rows].mean(), len(values), blocks=400)
    assert half.item() == pytest.approx(1.96 * values.std().item() / 4000**0.5, rel=0.1)


def test_too_few_images():
    with pytest.raises(ValueError, match="too few"):
        distances.frechet_distance(torch.randn(1, 4), torch.randn(9, 4))
    with pytest.raises(ValueError, match="more than 5"):
        distances.prdc(torch.randn(5, 4), torch.randn(9, 4))
