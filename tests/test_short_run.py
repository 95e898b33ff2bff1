"""The start for short runs: logits of a useful size, and text states that know their neighbours."""

import dataclasses

import pytest
import torch

from paella.conditioning import TextEncoders
from paella.config import PRESETS
from paella.short_run import LOGIT_STD, code_features, initialise_byt5, initialise_unet
from paella.unet import Paella

PLAIN = dataclasses.replace(PRESETS["tiny"].unet, leave_one_out=False)


def start_of(config):
    torch.manual_seed(0)
    unet = Paella(config).eval()
    initialise_unet(unet, torch.randn(config.num_labels, 8))
    return unet


def first_logits(config):
    unet, tokens = start_of(config), torch.randint(config.num_labels, (2, 16, 16))
    return unet(tokens, torch.zeros(2), byt5=torch.randn(2, 5, config.byt5_embd))


@pytest.mark.parametrize("changes", [{}, {"patch_size": 2}, {"c_in": 64, "c_out": 32}])
def test_first_logits_have_a_useful_size(changes):
    logits = first_logits(dataclasses.replace(PLAIN, **changes))
    assert 0.7 * LOGIT_STD < logits.std() < 1.4 * LOGIT_STD


def test_a_leave_one_out_unet_starts_by_saying_nothing_of_its_own():
    """Its first logits are zero but for the tokens' own; codes that look alike are told to it as to any other."""
    config = dataclasses.replace(PLAIN, leave_one_out=True)
    assert (first_logits(config) != 0).sum() == 2 * 16 * 16
    plain, made = start_of(PLAIN), start_of(config)
    differ = {name for name, value in made.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    assert differ == {"clf.1.weight"}


def test_positions_start_where_they_are_seen():
    config = dataclasses.replace(PRESETS["tiny"].unet, position_grid=16)
    assert Paella(config).positions.std().item() == pytest.approx(0.02, rel=0.05)
    assert start_of(config).positions.std().item() == pytest.approx(0.3, rel=0.05)


def test_codes_that_look_alike_start_alike():
    torch.manual_seed(0)
    codebook = torch.randn(100, 8)
    codebook[1] = codebook[0] + 0.05
    features = code_features(codebook, 128)
    likeness = features @ features.T / 128
    assert likeness.diagonal().mean() == pytest.approx(1, abs=0.05)
    assert likeness[0, 1] > 0.9
    assert likeness[0, 2:].abs().mean() < 0.4


def test_bytes_are_told_apart_by_what_stands_beside_them():
    torch.manual_seed(0)
    encoders = TextEncoders.create(PRESETS["tiny"].text)

    def distance():  # between the states of one byte with the same letters around it in another order
        near = encoders.forward(["abcdefgh" + "x" * 40, "hgfedcba" + "x" * 40])["byt5"]
        return (near[0, 8] - near[1, 8]).norm().item()

    with torch.no_grad():
        before = distance()
        initialise_byt5(encoders.byt5)
        assert distance() > 1.5 * before
