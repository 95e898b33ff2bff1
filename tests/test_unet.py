"""The U-Net's options: positions on grids of any size, and predictions from the other tokens."""

import dataclasses

import pytest
import torch
from conftest import small_config

from paella.objective import add_own_token
from paella.unet import Paella

OPTIONS = {"leave_one_out": True, "position_grid": 8}
OFF = {"leave_one_out": False, "position_grid": 0}


def new_unet(**options) -> Paella:
    """A small U-Net as it starts."""
    torch.manual_seed(0)
    return Paella(dataclasses.replace(small_config().unet, **OFF | options)).eval()


def unet_of(**options) -> Paella:
    """A small U-Net in which everything can be heard."""
    unet = new_unet(**options)
    for value in unet.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return unet


def inputs(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    return torch.randint(32, (2, height, width)), torch.tensor([0.3, 0.9]), {"byt5": torch.randn(2, 5, 128)}


def test_without_the_options_names_and_weights_are_as_before():
    plain, made = new_unet().state_dict(), new_unet(leave_one_out=True).state_dict()
    assert "positions" not in plain and set(made) == set(plain)
    assert all(torch.equal(made[name], value) for name, value in plain.items())
    assert set(unet_of(**OPTIONS).state_dict()) - set(plain) == {"positions"}


@torch.inference_mode()
def test_leave_one_out_logits_are_the_head_s_and_the_own_token_s():
    plain, made = unet_of(), unet_of(leave_one_out=True)
    made.load_state_dict(plain.state_dict())
    tokens, t, conditions = inputs(8, 8)
    expected = add_own_token(plain(tokens, t, **conditions), tokens, t)
    assert torch.equal(made(tokens, t, **conditions), expected)
    assert torch.equal(made(tokens, t, prepared=made.prepare(**conditions)), expected)


def added(unet: Paella, height: int, width: int) -> torch.Tensor:
    """What stands between the tokens' embedding and the first level: (2,C,h,w)."""
    seen = []
    hooks = [
        unet.embedding.register_forward_hook(lambda _, inputs, output: seen.append(output)),
        unet.down_blocks[0][0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
    ]
    tokens, t, conditions = inputs(height, width)
    assert unet(tokens, t, **conditions).shape == (2, 32, height, width)
    for hook in hooks:
        hook.remove()
    return seen[1] - seen[0]


@pytest.mark.parametrize("patch_size", [1, 2])
@torch.inference_mode()
def test_each_position_of_the_training_grid_has_its_embedding(patch_size):
    unet = unet_of(position_grid=8 // patch_size, patch_size=patch_size)
    assert unet.positions.shape == (16, 8 // patch_size, 8 // patch_size)
    torch.testing.assert_close(added(unet, 8, 8), unet.positions.expand(2, -1, -1, -1))


@pytest.mark.parametrize("grid", [(16, 16), (4, 4), (8, 16), (6, 4)])
@torch.inference_mode()
def test_positions_are_stretched_to_other_grids(grid):
    """A ramp from left to right stays one: a place is its share of the width, whatever the size."""
    unet = unet_of(position_grid=8)
    unet.positions.copy_(((torch.arange(8) + 0.5) / 8).expand(16, 8, 8))
    share = (torch.arange(grid[1]) + 0.5) / grid[1]
    expected = share.clamp(1 / 16, 15 / 16)  # beyond the outermost places it is theirs
    torch.testing.assert_close(added(unet, *grid), expected.expand(2, 16, *grid), atol=1e-5, rtol=0)


def test_positions_learn_on_any_grid():
    for grid in ((8, 8), (16, 8)):
        unet = unet_of(position_grid=8)
        tokens, t, conditions = inputs(*grid)
        torch.nn.functional.cross_entropy(unet(tokens, t, **conditions), tokens).backward()
        assert (unet.positions.grad.abs().amax(0) > 0).all()
