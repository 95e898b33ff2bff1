"""LoRA: nothing changes at the start, only adapters train, and merged weights are a plain model that predicts the same."""

import dataclasses

import pytest
import torch
from conftest import small_config

from paella.lora import LoraConfig, add_lora, merged
from paella.unet import Paella

CONFIG = LoraConfig(rank=3, alpha=6.0)


def inputs():
    c = small_config().unet
    clip = torch.randn(2, c.clip_embd)
    return (
        torch.randint(32, (2, 8, 8)),
        torch.tensor([0.3, 1.0]),
        {"byt5": torch.randn(2, 5, c.byt5_embd), "clip": clip, "clip_image": clip},
    )


@pytest.mark.parametrize("options", [{}, {"self_attn": True, "leave_one_out": True, "position_grid": 8}])
def test_adapters_train_alone_and_merge_into_plain_weights(options):
    torch.manual_seed(0)
    config = dataclasses.replace(small_config().unet, **options)
    unet = Paella(config)
    torch.nn.init.normal_(unet.clf[1].weight, std=0.1)
    tokens, t, conditions = inputs()
    before, published = unet(tokens, t, **conditions).detach(), set(unet.state_dict())
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    add_lora(unet, CONFIG)
    torch.testing.assert_close(unet(tokens, t, **conditions), before)
    trained = {name: value for name, value in unet.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert sum(value.numel() for value in trained.values()) < 0.6 * sum(value.numel() for value in unet.parameters())

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(5):
        torch.nn.functional.cross_entropy(unet(tokens, t, **conditions), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights.items():
        assert torch.equal(unet.state_dict()[name], value), name
    after = unet(tokens, t, **conditions).detach()
    assert not torch.allclose(after, before, atol=1e-3)

    plain = Paella(config)
    state = merged(unet.state_dict(), CONFIG)
    assert set(state) == published
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(tokens, t, **conditions), after, atol=1e-4, rtol=1e-4)
    changed = {name for name, value in state.items() if not torch.equal(value, weights[name])}
    endings = {name.split(".", 1)[1] if "_mapper" in name.split(".")[0] else ".".join(name.split(".")[-2:]) for name in changed}
    assert endings == {"weight", "1.weight", "attn.in_proj_weight", "out_proj.weight"}


def test_bad_rank():
    with pytest.raises(ValueError, match=r"lora\.rank=-1"):
        LoraConfig(rank=-1)
