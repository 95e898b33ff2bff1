"""The products behind the U-Net's and the VQGAN's layers: whichever library computes them, the same numbers, and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from paella.blocks import PointwiseConv2d, ResBlock, linear
from paella.config import PRESETS
from paella.unet import Paella


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_linear_for_inference_has_torch_s_numbers(one_thread):
    x, weight, bias = torch.randn(2, 33, 64), torch.randn(3 * 48, 64)[48:96], torch.randn(48)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_pointwise_convolution_is_one(one_thread, bias, memory_format):
    layer = PointwiseConv2d(64, 48, bias=bias)
    x = torch.randn(2, 64, 5, 7).to(memory_format=memory_format)
    expected = F.conv2d(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("width", [5, 6])
def test_the_convolution_over_a_skip_connection_is_one_of_groups_of_two(width):
    block, x, skip = ResBlock(width, width, 3, 0.0), torch.randn(2, width, 4, 7), torch.randn(2, width, 4, 7)
    torch.testing.assert_close(block._depthwise_of_both(x, skip), block.depthwise(torch.cat([x, skip], dim=1)))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_one_thread_leaves_no_product_of_a_pass_to_the_mkl(one_thread):
    """As torch does with 1×1 convolutions in float32: they take twice as long on AMD's processors."""
    config = PRESETS["tiny"].unet
    unet = Paella(config)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        prepared = unet.prepare(byt5=torch.randn(1, 5, config.byt5_embd))
        unet(torch.zeros(1, 16, 16, dtype=torch.long), torch.ones(1), prepared=prepared)
    called = {event.key for event in profiled.key_averages()}
    assert "mkldnn::_linear_pointwise" in called and "aten::_slow_conv2d_forward" not in called


def test_autocast_has_its_say(one_thread):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(4, 64), torch.randn(48, 64), None).dtype == torch.bfloat16
        assert PointwiseConv2d(64, 48)(torch.randn(1, 64, 2, 2)).dtype == torch.bfloat16
