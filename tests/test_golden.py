"""Numbers, keys and shapes equal the published implementation's (fixtures: see tests/fixtures/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paella.config import PaellaConfig, VQConfig
from paella.objective import add_noise, loss_per_image, loss_weight
from paella.unet import Paella
from paella.vqgan import VQModel

FIXTURES = Path(__file__).parent / "fixtures"
CONFIGS = json.loads((FIXTURES / "configs.json").read_text())
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def unet() -> Paella:
    model = Paella(PaellaConfig.from_dict(CONFIGS["unet"])).eval()
    model.load_state_dict(torch.load(FIXTURES / "unet.pt", weights_only=True)["state_dict"])
    return model


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "unet_io.safetensors")


@pytest.mark.parametrize(
    "output, conditions",
    [
        ("logits_byt5", ["byt5"]),
        ("logits_byt5_clip", ["byt5", "clip"]),
        ("logits_byt5_clip_image", ["byt5", "clip", "clip_image"]),
    ],
)
@torch.inference_mode()
def test_unet_logits(unet, io, output, conditions):
    logits = unet(io["x"], io["r"], **{name: io[name] for name in conditions})
    torch.testing.assert_close(logits, io[output], **TOLERANCE)


@torch.inference_mode()
def test_unet_two_images(unet, io):
    images = torch.stack([io["clip_image"], io["clip_image_2"]], dim=1)
    logits = unet(io["x"], io["r"], byt5=io["byt5"], clip=io["clip"], clip_image=images)
    torch.testing.assert_close(logits, io["logits_two_images"], **TOLERANCE)


@torch.inference_mode()
def test_unet_reweighting(unet, io):
    conditions = {name: io[name] for name in ("byt5", "clip", "clip_image")}
    logits = unet(io["x"], io["r"], **conditions, attn_weights=io["attn_weights"])
    torch.testing.assert_close(logits, io["logits_reweighted"], **TOLERANCE)
    same = unet(io["x"], io["r"], **conditions, attn_weights=torch.ones(4))
    torch.testing.assert_close(same, io["logits_reweight_identity"], **TOLERANCE)
    prepared = unet.prepare(**conditions, attn_weights=io["attn_weights"])
    torch.testing.assert_close(unet(io["x"], io["r"], prepared=prepared), io["logits_reweighted"], **TOLERANCE)


@torch.inference_mode()
def test_embeddings(unet, io):
    torch.testing.assert_close(unet.embed_r(io["r"]), io["r_embedding"], **TOLERANCE)
    cond = unet.embed_conditions(io["byt5"], io["clip"], io["clip_image"])
    torch.testing.assert_close(cond, io["cond_byt5_clip_image"], **TOLERANCE)


@torch.inference_mode()
def test_masked_padding_changes_nothing(unet, io):
    padded = torch.cat([io["byt5"], torch.randn(2, 5, io["byt5"].shape[2])], dim=1)
    mask = torch.arange(12) < 7
    logits = unet(io["x"], io["r"], byt5=padded, clip=io["clip"], byt5_mask=mask.expand(2, -1))
    torch.testing.assert_close(logits, io["logits_byt5_clip"], **TOLERANCE)


def test_noise_weight_and_loss(io):
    noised, mask = add_noise(io["x"], io["r"], mask=io["noise_mask"], random_tokens=io["random_x"])
    assert torch.equal(noised, io["noised"])
    weight = loss_weight(io["r"], mask)
    torch.testing.assert_close(weight, io["loss_weight"], **TOLERANCE)
    loss = loss_per_image(io["logits_byt5_clip_image"], io["x"], weight).mean()
    torch.testing.assert_close(loss[None], io["loss"], **TOLERANCE)


@torch.inference_mode()
def test_vqgan():
    model = VQModel(VQConfig.from_dict(CONFIGS["vqgan"])).eval()
    state = torch.load(FIXTURES / "vqgan.pt", weights_only=True)["state_dict"]
    model.load_state_dict(state)
    io = load_file(FIXTURES / "vqgan_io.safetensors")
    latents = model.encode_latents(io["image"])
    scale = model.config.scale_factor
    torch.testing.assert_close(latents / scale, io["latent"], **TOLERANCE)
    indices = model.encode(io["image"])
    assert torch.equal(indices, io["indices"])
    torch.testing.assert_close(model.vquantizer(indices) / scale, io["quantized"], **TOLERANCE)
    torch.testing.assert_close(model.decode(io["quantized"]), io["decode_of_quantized"], **TOLERANCE)
    torch.testing.assert_close(model.decode_indices(indices), io["decode_indices"], **TOLERANCE)


@pytest.mark.parametrize("name, build", [("unet", lambda: Paella(PaellaConfig())), ("vqgan", lambda: VQModel(VQConfig()))])
def test_released_keys_and_shapes(name, build):
    released = json.loads((FIXTURES / "state_dicts.json").read_text())[name]
    with torch.device("meta"):
        ours = build().state_dict()
    assert {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in ours.items()} == released
