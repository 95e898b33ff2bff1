"""Drawing codes and filtering unlikely ones."""

import pytest
import torch

from paella.drawing import draw, keep_likely


def test_draw_equals_the_plain_inversion():
    torch.manual_seed(0)
    logits, uniform = torch.randn(50, 1000) * 3, torch.rand(50)
    cumulative = (logits.double() / 0.7).softmax(1).cumsum(1)
    plain = torch.searchsorted(cumulative, uniform[:, None].double(), right=True)[:, 0]
    assert (draw(logits, uniform, 0.7) == plain).float().mean() > 0.99


def test_draw_never_leaves_the_codebook_nor_meets_an_impossible_code():
    logits = torch.randn(64, 300)
    logits[:, ::2] = float("-inf")
    for uniform in (0.0, 0.5, 1 - 2**-24):
        codes = draw(logits, torch.full((64,), uniform))
        assert (codes % 2 == 1).all() and codes.max() < 300


def test_draw_of_half_precision_and_of_many_rows():
    logits = torch.full((3, 40, 8192), -20.0)
    logits[..., 77] = 20
    assert (draw(logits.bfloat16(), torch.rand(3, 40)) == 77).all()


def test_top_k():
    kept = keep_likely(torch.tensor([0.0, 3.0, 1.0, 2.0]), top_k=2)
    assert kept.isfinite().tolist() == [False, True, False, True]


@pytest.mark.parametrize("top_p, kept", [(0.5, 1), (0.61, 2), (0.95, 3), (1.0, 4), (1e-6, 1)])
def test_top_p(top_p, kept):
    logits = torch.tensor([0.6, 0.3, 0.08, 0.02]).log()
    assert keep_likely(logits[None], top_p=top_p).isfinite().sum() == kept


def test_typical_leaves_out_the_too_likely():
    # entropy 1.5 nats: the code of surprise 0.5 is less typical than the many of surprise 3
    probabilities = torch.cat([torch.tensor([0.6]), torch.full((20,), 0.02)])
    entropy = -(probabilities * probabilities.log()).sum()
    distance = (-probabilities.log() - entropy).abs()
    kept = keep_likely(probabilities.log()[None], typical_p=0.3)[0].isfinite()
    assert kept[distance.argmin()] and kept.sum() < 21
    assert kept[0] == (distance[0] < distance[1])
