"""The Triton kernels against torch: by Triton's interpreter, which needs no GPU, and on a GPU where there is one."""

import importlib.util
import sys

import pytest
import torch

from paella import drawing
from paella.blocks import GlobalResponseNorm, TimestepBlock

pytest.importorskip("triton")
from paella import kernels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_on_a_gpu(monkeypatch):
    """What blocks and draws make of the kernels is what they make without them."""
    torch.manual_seed(0)
    norm, timestep = GlobalResponseNorm(640).cuda(), TimestepBlock(640, 64).cuda()
    torch.nn.init.normal_(norm.gamma)
    torch.nn.init.normal_(norm.beta)
    x, r_embed = torch.randn(3, 9, 8, 640, device="cuda"), torch.randn(3, 64, device="cuda")
    logits, uniform = torch.randn(4096, 8192, device="cuda") * 3, torch.rand(4096, device="cuda")

    def everything():
        return norm(x), timestep(x.permute(0, 3, 1, 2), r_embed), drawing.draw(logits, uniform, 0.7)

    by_kernels = everything()
    for module in ("paella.blocks", "paella.drawing"):
        monkeypatch.setattr(f"{module}.kernels", None)
    by_torch = everything()
    torch.testing.assert_close(by_kernels[:2], by_torch[:2], rtol=1e-4, atol=1e-4)
    assert (by_kernels[2] == by_torch[2]).float().mean() > 0.99


def of_triton():
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "triton" and "._C" not in name}


@pytest.fixture(scope="module")
def interpreted():
    """A copy of the kernels' module, over a copy of Triton which interprets them."""
    compiling = of_triton()
    for name in compiling:
        del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # which is read where a kernel is defined, and Triton defines some itself
        spec = importlib.util.spec_from_file_location("interpreted_kernels", kernels.__file__)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module
    for name in of_triton():
        del sys.modules[name]
    sys.modules.update(compiling)


@pytest.mark.parametrize("shape", [(2, 3, 5, 200), (1, 8, 8, 128), (3, 1, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_all", [True, False])
def test_scale_shift(interpreted, shape, dtype, of_all):
    x = torch.randn(shape).to(dtype)
    scale = torch.randn(shape[0], 1, 1, 2 * shape[3]).to(dtype)[..., shape[3] :]
    shift = torch.randn(1 if of_all else shape[0], 1, 1, shape[3]).to(dtype)
    torch.testing.assert_close(interpreted.scale_shift(x, scale, shift), torch.addcmul(shift, x, scale))


@pytest.mark.parametrize("num_labels", [1000, 1024])
def test_draw_equals_the_plain_inversion(interpreted, num_labels):
    logits, uniform = torch.randn(50, num_labels) * 3, torch.rand(50)
    cumulative = (logits.double() / 0.7).softmax(1).cumsum(1)
    plain = torch.searchsorted(cumulative, uniform[:, None].double(), right=True)[:, 0]
    assert (interpreted.draw(logits, uniform, 0.7) == plain).float().mean() > 0.95
    assert torch.equal(interpreted.draw(logits, uniform, 0.7)[7:9], interpreted.draw(logits[7:9], uniform[7:9], 0.7))


def test_draw_never_leaves_the_codebook_nor_meets_an_impossible_code(interpreted):
    logits = torch.randn(16, 300)
    logits[:, ::2] = float("-inf")
    for uniform in (0.0, 0.5, 1 - 2**-24):
        codes = interpreted.draw(logits, torch.full((16,), uniform), 1.0)
        assert (codes % 2 == 1).all() and codes.max() < 300
