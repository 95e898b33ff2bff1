"""8-bit linear layers: nearly the same numbers in a quarter of the memory."""

import pytest
import torch
from torch import nn

from paella.int8 import Int8Linear, quantize_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_to_the_layer(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(256, 64).to(dtype)
    with torch.no_grad():
        linear.weight[3] *= 100  # one loud row costs the others nothing
        linear.weight[4] = 0
    x = torch.randn(5, 256, dtype=dtype)
    with torch.inference_mode():
        ours, theirs = Int8Linear(linear)(x), linear(x)
    assert ours.dtype == dtype
    assert torch.cosine_similarity(ours.float(), theirs.float(), dim=0).min() > 0.999
    assert torch.equal(ours[:, 4], theirs[:, 4])


def test_weights_are_within_half_a_step():
    torch.manual_seed(0)
    linear = nn.Linear(32, 8, bias=False)
    layer = Int8Linear(linear)
    assert layer.weight.dtype == torch.int8 and layer.bias is None
    assert ((layer.weight * layer.scale - linear.weight).abs() <= layer.scale * 0.501).all()


def test_every_layer_inside_is_replaced():
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    quantize_linear(module)
    assert not any(isinstance(child, nn.Linear) for child in module.modules())
    assert module.to(torch.bfloat16)[0].weight.dtype == torch.int8, "a cast leaves integers alone"
