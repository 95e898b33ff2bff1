"""A demo's line: counted arithmetic against products summed by hand, and the row that docs/pulse.md has room for."""

import dataclasses
import json

import pytest
from conftest import ROOT

from paella.config import PRESETS
from paella.flops import TEXT_TOKENS, training_flops
from paella.training import NoiseConfig
from pipelines import demo_flops, pulse, train, train_clip, train_vqgan

PLAIN = NoiseConfig(own_draws=0.0)
UNET = dataclasses.replace(train.presets()["tiny"], data="tokens", vqgan="vqgan", output="out", steps=10, noise=PLAIN)
CLIP = dataclasses.replace(train_clip.presets()["tiny"], data="images", output="out", steps=10)
VQGAN = dataclasses.replace(train_vqgan.presets()["tiny"], data="images", output="out", steps=200)
CAPTIONS = ["x" * (TEXT_TOKENS - 2), "x" * TEXT_TOKENS]  # with their ends TEXT_TOKENS long in the mean


def transformer(tokens: int, width: int, d_ff: float, keys: int | None = None) -> float:
    """Products of one layer: four matrices of attention, the feed-forward layer's, scores and values."""
    return 2 * tokens * (4 * width**2 + width * d_ff) + 4 * tokens * (keys or tokens) * width


def test_unet_and_text_encoder_are_counted_with_the_captions_they_see():
    text = PRESETS["tiny"].text.new_byt5
    encoder = text.num_layers * transformer(TEXT_TOKENS, text.d_model, 3 * text.d_ff)
    expected = (training_flops(UNET.model) + 3 * encoder) * 10 * 64
    assert demo_flops.unet_flops(UNET, CAPTIONS) == pytest.approx(expected, rel=1e-3)
    shorter = demo_flops.unet_flops(UNET, [caption[:20] for caption in CAPTIONS])
    assert 0.7 * expected < shorter < 0.95 * expected


def test_clip_embeddings_and_own_draws_count():
    plain = demo_flops.unet_flops(UNET, CAPTIONS)
    with_clip = dataclasses.replace(UNET.model, text=dataclasses.replace(UNET.model.text, clip="clip"))
    assert plain < demo_flops.unet_flops(dataclasses.replace(UNET, model=with_clip), CAPTIONS) < 1.1 * plain
    drawn = dataclasses.replace(UNET, noise=NoiseConfig(own_draws=0.5))
    assert demo_flops.unet_flops(drawn, CAPTIONS) == pytest.approx(plain * 3.5 / 3)


def test_clip_is_counted_with_its_attention():
    clip = CLIP.model
    patches = (CLIP.image_size // clip.patch_size) ** 2
    image = clip.layers * transformer(patches + 1, clip.width, 8 * clip.width) + 2 * patches * 3 * clip.patch_size**2 * clip.width
    text = clip.text_layers * transformer(clip.context_length, clip.text_width, 8 * clip.text_width)
    assert demo_flops.clip_flops(CLIP) == pytest.approx(3 * (image + text) * 10 * 128, rel=2e-3)


def test_vqgan_is_counted():
    """Its MLPs and 4×4 convolutions by hand; depthwise convolutions and the way in and out are small."""
    c = VQGAN.model
    low, high = c.c_hidden, c.c_hidden // 2
    mlps = 2 * (16**2 * (1 + c.bottleneck_blocks) * 8 * low**2 + 32**2 * 2 * 8 * high**2)
    convolutions = 2 * 2 * 16**2 * 16 * low * high
    codes = 2 * 16**2 * c.c_latent * c.codebook_size
    assert demo_flops.vqgan_flops(VQGAN) == pytest.approx(3 * (mlps + convolutions + codes) * 200 * 32, rel=0.1)


def test_a_line_has_a_cell_for_each_column_of_the_table():
    accuracy = {"colour": 0.5, "shape": 0.25, "size": 0.75, "position": 0.5, "background": 1.0, "all": 0.126}
    values = pulse.pulse({"vqgan": 14.86e12, "train": 100.2e12}, 921.4, accuracy)
    assert (values["tflop"], values["seconds"], values["tflop_by_stage"]) == (115.1, 921, {"vqgan": 14.9, "train": 100.2})
    assert values["row"].endswith("| 1.00 | 0.75 | 0.50 | 0.50 | 0.25 | 0.13 |")
    assert values["commit"] in values["row"] and "cores of" in values["machine"]
    assert json.loads(json.dumps(values)) == values
    page = (ROOT / "docs" / "pulse.md").read_text()
    table = page[page.index("| date") :].split("\n\n")[0].splitlines()
    assert len(table) >= 3 and {line.count("|") for line in [*table, values["row"]]} == {table[0].count("|")}
    assert pulse.pulse({}, 1.0, {})["row"].endswith("| – | – | – | – | – | – |")
