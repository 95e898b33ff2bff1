"""The prior: the published numbers, embeddings that do not depend on their company, and one that learns a relation."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_golden import CONFIGS, FIXTURES, TOLERANCE

from paella.bundle import add_prior, load_bundle
from paella.config import PriorConfig
from paella.prior import (
    Prior,
    alpha_cumprod,
    ddim_step,
    ddpm_step,
    diffuse,
    draw_prior_noise,
    guided_noise,
    load_prior,
    prior_loss,
    sample_prior,
    save_prior,
    seeded_noise,
)


@pytest.fixture(scope="module")
def prior() -> Prior:
    model = Prior(PriorConfig.from_dict(CONFIGS["prior"])).eval()
    model.load_state_dict(torch.load(FIXTURES / "prior.pt", weights_only=True)["state_dict"])
    return model


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "prior_io.safetensors")


@torch.inference_mode()
def test_prediction_and_schedule(prior, io):
    torch.testing.assert_close(prior(io["x"], io["r"], io["c"]), io["prediction"], **TOLERANCE)
    torch.testing.assert_close(alpha_cumprod(io["r"]), io["alpha_cumprod"], **TOLERANCE)
    torch.testing.assert_close(diffuse(io["x"], io["r"], io["noise"]), io["diffused"], **TOLERANCE)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@torch.inference_mode()
def test_sampling_trace(prior, io, method):
    levels, x = torch.linspace(1, 0, 10)[1:], io[f"{method}.x_init"]
    for step in range(8):
        t, next_t = levels[step].expand(3), levels[step + 1].expand(3)
        predicted = guided_noise(prior, x, t, io["c"], 3.0)
        if method == "ddim":
            x = ddim_step(x, predicted, t, next_t)
        else:
            x = ddpm_step(x, predicted, t, next_t, io[f"ddpm.{step}.noise"])
        torch.testing.assert_close(x, io[f"{method}.{step}.x"], **TOLERANCE)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_sampling_takes_those_steps(prior, io, method, monkeypatch):
    """`sample_prior` goes the way of the trace when it is given the trace's noise."""
    recorded = [io[f"{method}.x_init"], *(io[f"ddpm.{step}.noise"] for step in range(8))]
    monkeypatch.setattr("paella.prior.seeded_noise", lambda seeds, step, width: recorded[step])
    x = sample_prior(prior, io["c"], seeds=[0, 1, 2], num_steps=8, method=method)
    torch.testing.assert_close(x, io[f"{method}.7.x"], **TOLERANCE)


def test_released_keys_and_shapes():
    released = json.loads((FIXTURES / "state_dicts.json").read_text())["prior"]
    with torch.device("meta"):
        ours = Prior(PriorConfig()).state_dict()
    assert {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in ours.items()} == released


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_an_embedding_does_not_depend_on_its_company(prior, io, method, cfg):
    def take(rows):
        return sample_prior(prior, io["c"][rows], seeds=[7 + row for row in rows], num_steps=5, method=method, cfg=cfg)

    together = take([0, 1, 2])
    torch.testing.assert_close(take([2, 0]), together[[2, 0]], **TOLERANCE)
    torch.testing.assert_close(take([1]), together[[1]], **TOLERANCE)
    assert take([]).shape == (0, 24)
    again = sample_prior(prior, io["c"], seeds=[0, 1, 2], num_steps=5, method=method, cfg=cfg)
    assert (again - together).abs().min(dim=1).values.max() > 1e-3  # another seed, another embedding


def test_noise_is_normal_and_differs_by_seed_and_step():
    noise = torch.stack([seeded_noise([0, 1, 2**32 - 1], step, 1000) for step in range(3)]).flatten(0, 1)
    torch.testing.assert_close(torch.corrcoef(noise), torch.eye(9), atol=0.15, rtol=0)
    torch.testing.assert_close(noise.std(dim=1), torch.ones(9), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seeds": [1]}, r"shape \(3, 24\), but 1 seeds need \(1, 24\)"),
        ({"seeds": [0, 1, -1]}, "seed=-1 is not allowed"),
        ({"num_steps": 0}, "num_steps=0 is not allowed: 1 to 1000"),
        ({"cfg": -1.0}, "cfg=-1.0 is not allowed"),
        ({"method": "euler"}, "method='euler' is not allowed: ddpm or ddim"),
        ({"clip": torch.zeros(3, 5)}, r"shape \(3, 5\), but 3 seeds need \(3, 24\)"),
    ],
)
def test_bad_input_is_named(prior, io, changes, words):
    arguments = {"clip": io["c"], "seeds": [0, 1, 2]} | changes
    with pytest.raises(ValueError, match=words):
        sample_prior(prior, **arguments)


def test_embeddings_of_another_width_are_named(prior, io):
    with pytest.raises(ValueError, match=r"\(3, 24\) and \(3, 5\), but both must be \(batch, 24\)"):
        prior(io["x"], io["r"], torch.zeros(3, 5))


def test_draws_belong_to_the_sample_and_texts_are_dropped():
    together = draw_prior_noise(4, 7, range(400), drop=0.25)
    apart = [draw_prior_noise(4, 7, part, drop=0.25) for part in (range(100), range(100, 400))]
    for name in ("t", "noise", "keep"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(part, name) for part in apart]))
    assert not torch.equal(together.t, draw_prior_noise(4, 7, range(400, 800)).t)
    assert abs((~together.keep).float().mean().item() - 0.25) < 0.07
    assert abs(together.t.mean().item() - 0.5) < 0.06
    wide = draw_prior_noise(1001, 0, range(1000)).noise
    assert wide.shape == (1000, 1001)
    assert abs(wide.mean().item()) < 0.005 and abs(wide.std().item() - 1) < 0.005
    assert abs((wide.abs() > 2).float().mean().item() - 0.0455) < 0.002
    assert torch.corrcoef(wide[:, ::250].T).fill_diagonal_(0).abs().max() < 0.15


def test_a_dropped_text_does_not_matter(prior, io):
    draws = draw_prior_noise(24, 0, range(3), drop=1.0)
    losses = prior_loss(prior, io["x"], io["c"], draws)
    assert losses.shape == (3,)
    assert torch.equal(losses, prior_loss(prior, io["x"], -io["c"], draws))


def test_learns_a_linear_relation():
    """Embeddings sampled for new texts come much closer to the images' than the mean of all images does."""
    torch.manual_seed(0)
    relation = torch.randn(8, 8) / 8**0.5

    def pairs(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        texts = torch.nn.functional.normalize(torch.randn(number, 8)) * 8**0.5  # like CLIP's, of one length: never zeros
        return texts, texts @ relation + 0.1 * torch.randn(number, 8)

    steps, size = 500, 128
    model = Prior(PriorConfig(clip_r=8, c_hidden=64, c_r=16, num_blocks=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        texts, images = pairs(size)
        draws = draw_prior_noise(8, 0, range(step * size, (step + 1) * size))
        prior_loss(model, images, texts, draws).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    texts, images = pairs(256)
    sampled = sample_prior(model.eval(), texts, seeds=range(256), num_steps=20, cfg=1.0)
    error, of_the_mean = (sampled - images).square().mean(), images.var(dim=0).mean()
    assert error < 0.2 * of_the_mean, f"{error:.3f} against {of_the_mean:.3f}"


def test_saved_and_loaded(prior, io, tmp_path):
    digest = save_prior(tmp_path / "model", prior)
    loaded, found = load_prior(str(tmp_path / "model"))
    assert (found, loaded.config) == (digest, prior.config)
    assert torch.equal(loaded(io["x"], io["r"], io["c"]), prior(io["x"], io["r"], io["c"]))
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "prior.safetensors"]
    weights = tmp_path / "model" / "prior.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="has digest"):
        load_prior(str(tmp_path / "model"))
    weights.write_bytes(data[:100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_prior(str(tmp_path / "model"))


def test_a_bundle_without_a_prior_is_refused(vqgan_bundle):
    with pytest.raises(ValueError, match="holds no prior"):
        load_prior(str(vqgan_bundle))


def test_a_bundle_with_a_prior_uses_it(tmp_path, model_bundle):
    torch.manual_seed(0)
    width = load_bundle(str(model_bundle)).config.unet.clip_embd
    model = Prior(PriorConfig(clip_r=width, c_hidden=16, c_r=8, num_blocks=1))
    save_prior(tmp_path / "prior", model)
    add_prior(str(model_bundle), str(tmp_path / "prior"), tmp_path / "bundle")
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert bundle.prior is not None and bundle.digest == load_bundle(str(model_bundle)).digest
    assert "clip_image" not in bundle.conditions("a", seed=1), "without CLIP there is nothing to start from"
    clip = torch.randn(1, width)
    bundle.prompts.kept["a"] = bundle.conditions("a") | {"clip": clip}
    made = bundle.conditions("a", seed=1)["clip_image"]
    assert torch.equal(made, sample_prior(bundle.prior, clip, seeds=[1]))
    given = torch.zeros(1, width)
    assert bundle.conditions("a", seed=1, clip_image=given)["clip_image"] is given
    save_prior(tmp_path / "narrow", Prior(PriorConfig(clip_r=8, c_hidden=16, c_r=8, num_blocks=1)))
    with pytest.raises(ValueError, match=r"prior\.clip_r=8 is not allowed"):
        add_prior(str(model_bundle), str(tmp_path / "narrow"), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
