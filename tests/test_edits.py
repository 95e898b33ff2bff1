"""The modes beside text-to-image: what each must leave alone, and what it must follow."""

import dataclasses

import open_clip
import pytest
import torch

from paella import edits
from paella.bundle import Bundle
from paella.conditioning import TextEncoders
from paella.config import PRESETS
from paella.sampler import SamplingConfig, sample
from paella.unet import Paella
from paella.vqgan import VQModel

QUICK = SamplingConfig(num_inference_steps=3, cfg=(2.0,))


@pytest.fixture(scope="module")
def bundle(request) -> Bundle:
    """Of `tiny`, with the U-Net's options that a test may give."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], unet=dataclasses.replace(PRESETS["tiny"].unet, **getattr(request, "param", {})))
    unet, vqgan = Paella(config.unet).eval(), VQModel(config.vqgan).eval()
    vqgan.vquantizer.codebook.weight.data.normal_()
    with torch.no_grad():  # zero-initialised weights would hide the conditions
        for value in unet.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    text = TextEncoders.create(config.text).eval()
    clip = open_clip.CLIP(
        embed_dim=config.unet.clip_embd,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    text.clip, text.clip_tokenizer = clip, open_clip.get_tokenizer("ViT-B-32")
    return Bundle(config, unet, vqgan, text, "none")


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))


def run(bundle, canvas) -> torch.Tensor:
    return sample(bundle.unet, [canvas], codebook=bundle.vqgan.vquantizer)[0]


@pytest.mark.parametrize("renoise_from", ["start", "previous", "fresh"])
def test_inpainting_keeps_every_other_token(bundle, image, renoise_from):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:30, 20:41] = True
    config = dataclasses.replace(QUICK, renoise_from=renoise_from)
    canvas = edits.inpaint(bundle, image, mask, "a red circle", seed=1, config=config)
    kept = ~edits.token_mask(bundle, mask)
    before = bundle.encode(image)
    seen = []
    after = sample(bundle.unet, [canvas], on_step=lambda done: seen.append(done[0].tokens))[0]
    assert all(torch.equal(tokens[kept], before[kept]) for tokens in [*seen, after])
    assert not torch.equal(after[~kept], before[~kept])
    assert kept.sum() == 256 - 6 * 6  # rows 2 to 7, columns 5 to 10


def test_pasting_gives_back_the_original_pixels(bundle, image):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[8:40, 8:40] = True
    pasted = edits.paste(image, 1 - image, mask, feather=4)
    assert torch.equal(pasted[:, ~mask], image[:, ~mask])
    torch.testing.assert_close(pasted[:, 20:28, 20:28], 1 - image[:, 20:28, 20:28])  # well inside
    seam = ((pasted - image) / (1 - 2 * image))[0, 24, 8:16]
    assert (seam.diff() > -1e-4).all() and 0 < seam[0] < seam[-1]


def test_outpainting_keeps_the_image(bundle, image):
    canvas = edits.outpaint(bundle, image, (16, 0, 0, 8), "a red circle", seed=1, config=QUICK)
    tokens = run(bundle, canvas)
    assert tokens.shape == (18, 20)
    assert torch.equal(tokens[:16, 4:], bundle.encode(image))


def test_restyling_keeps_a_share(bundle, image):
    canvas = edits.restyle(bundle, image, "a", strength=0.25, seed=1, config=QUICK)
    same = (canvas.tokens == bundle.encode(image)).float().mean()
    assert 0.65 < same < 0.85 and canvas.config.at(0).t == 0.25


@pytest.mark.parametrize(
    "bundle", [{}, {"leave_one_out": True, "position_grid": 16}], indirect=True, ids=["published", "options"]
)
def test_an_inverted_image_comes_back_under_its_own_prompt(bundle, image):
    canvas = edits.edit(bundle, image, "a", "a", keep=1.0, seed=3, config=dataclasses.replace(QUICK, cfg=(1.0,)))
    assert torch.equal(run(bundle, canvas), bundle.encode(image))
    loose = edits.edit(bundle, image, "a", "blue", keep=0.0, seed=3, config=QUICK)
    assert not torch.equal(run(bundle, loose), bundle.encode(image))


def test_regions_follow_their_prompts(bundle):
    left = torch.zeros(64, 64)
    left[:, :32] = 1
    whole = edits.regions(bundle, ["a", "a"], [left, 1 - left], seed=5, config=QUICK)
    plain = edits.text_to_image(bundle, "a", seed=5, config=QUICK)
    assert (run(bundle, whole) == run(bundle, plain)).float().mean() > 0.99
    two = edits.regions(bundle, ["a", "blue"], [left, 1 - left], seed=5, config=QUICK)
    with torch.inference_mode():
        from paella.sampler import predictions

        alone = edits.text_to_image(bundle, "a", seed=5, config=dataclasses.replace(QUICK, cfg=(1.0,)))
        two.config = alone.config
        (_, mixed), (_, single) = predictions(bundle.unet, [two, alone])
    torch.testing.assert_close(mixed[:, :, :8], single[:, :, :8])
    assert not torch.allclose(mixed[:, :, 8:], single[:, :, 8:])


def test_interpolation_ends_at_its_ends(bundle):
    plain = dataclasses.replace(QUICK, cfg=(1.0,))
    for share, prompt in ((0.0, "a"), (1.0, "blue")):
        end = run(bundle, edits.text_to_image(bundle, prompt, seed=2, config=plain))
        assert torch.equal(run(bundle, edits.interpolate(bundle, "a", "blue", share, seed=2, config=plain)), end)


def test_variations_and_blends_follow_the_images(bundle, image):
    other = 1 - image
    first = run(bundle, edits.variation(bundle, image, seed=1, config=QUICK))
    assert not torch.equal(first, run(bundle, edits.variation(bundle, other, seed=1, config=QUICK)))
    unseen = run(bundle, edits.variation(bundle, image, weight=0.0, seed=1, config=QUICK))
    assert not torch.equal(first, unseen)
    both = edits.blend(bundle, [image, other], [1.0, 0.5], "a", seed=1, config=QUICK)
    states = bundle.conditions("a")["byt5"].shape[1]
    assert both.prompts[0].keys_values[0].shape[1] == states + 3 * bundle.config.unet.clip_seq_len  # text, two images
    between = edits.interpolate_images(bundle, image, other, 0.0, seed=1, config=QUICK)
    assert (run(bundle, between) == first).float().mean() > 0.95  # the arc rounds its end


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda b, i: edits.inpaint(b, i, torch.ones(32, 32), "a", seed=0), "mask has"),
        (lambda b, i: edits.inpaint(b, i, torch.zeros(64, 64), "a", seed=0), "mask is empty"),
        (lambda b, i: edits.outpaint(b, i, (3, 0, 0, 0), "a", seed=0), "multiples of 4"),
        (lambda b, i: edits.outpaint(b, i, (4, 0, 0, 0), "a", seed=0), "multiples of 8"),
        (lambda b, i: edits.outpaint(b, i, (0, 0, 0, 0), "a", seed=0), "margins"),
        (lambda b, i: edits.restyle(b, i, "a", strength=0.0, seed=0), "strength"),
        (lambda b, i: edits.edit(b, i, "a", "b", keep=2.0, seed=0), "keep"),
        (lambda b, i: edits.blend(b, [i], [], seed=0), "weights"),
        (lambda b, i: edits.regions(b, ["a"], [torch.zeros(64, 64)], seed=0), "without a prompt"),
        (lambda b, i: edits.regions(b, ["a", "b"], [torch.ones(64, 64)], seed=0), "masks"),
        (lambda b, i: edits.interpolate(b, "a", "b", 1.5, seed=0), "share"),
        (lambda b, i: edits.inpaint(b, i[:, :63], torch.ones(63, 64), "a", seed=0), "multiples of 4"),
    ],
)
def test_bad_input(bundle, image, call, message):
    with pytest.raises(ValueError, match=message):
        call(bundle, image)


def test_a_model_without_clip_says_so(bundle, image):
    blind = dataclasses.replace(bundle, text=TextEncoders.create(bundle.config.text).eval())
    with pytest.raises(ValueError, match="no CLIP"):
        edits.variation(blind, image, seed=0)
