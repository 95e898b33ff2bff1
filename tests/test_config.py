"""Configs: presets, round trips, and one clear sentence for what is not allowed."""

import pytest

from paella.config import PRESETS, ModelConfig, NewByT5, PaellaConfig, PriorConfig, TextConfig, VQConfig


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    assert ModelConfig.from_dict(PRESETS[name].to_dict()) == PRESETS[name]


def test_unknown_field_is_named():
    with pytest.raises(ValueError, match="PaellaConfig has no field 'c_hiden'"):
        PaellaConfig.from_dict({"c_hiden": [1]})


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: PaellaConfig(nhead=(-1, 16)), "nhead"),
        (lambda: PaellaConfig(nhead=(-1, 16, 7)), "nhead"),
        (lambda: PaellaConfig(level_config=("CT", "CX", "CTA")), "level_config"),
        (lambda: PaellaConfig(dropout=1.0), "dropout"),
        (lambda: PaellaConfig(kernel_size=4), "kernel_size"),
        (lambda: PaellaConfig(num_labels=0), "num_labels"),
        (lambda: PaellaConfig(position_grid=-1), "position_grid"),
        (lambda: VQConfig(codebook_size=70_000), "codebook_size"),
        (lambda: VQConfig(c_hidden=3), "c_hidden"),
        (lambda: VQConfig(scale_factor=0.0), "scale_factor"),
        (lambda: PriorConfig(num_blocks=0), "num_blocks"),
        (lambda: PriorConfig(c_r=2), "c_r"),
        (lambda: TextConfig(max_length=0), "max_length"),
        (lambda: NewByT5(num_heads=5), "num_heads"),
        (lambda: ModelConfig(unet=PaellaConfig(), vqgan=VQConfig(codebook_size=16), text=TextConfig()), "num_labels"),
        (lambda: ModelConfig(unet=PaellaConfig(), vqgan=VQConfig(), text=TextConfig(), image_size=100), "image_size"),
    ],
)
def test_bad_values_name_the_field(make, field):
    with pytest.raises(ValueError, match=rf"{field}=.* is not allowed: "):
        make()


def test_grid():
    assert PRESETS["paella-1b"].grid(256, 512) == (128, 64)
    with pytest.raises(ValueError, match="multiples of 32"):
        PRESETS["paella-1b"].grid(100, 256)
