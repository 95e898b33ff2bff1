"""Images that are noised from the model's own draw: which they are, and what they look like."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from paella.own_draws import chosen
from paella.training import NoiseConfig, draw_noise

LABELS = 50


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.3, 0.7, 1.0])
def test_any_samples_that_follow_one_another_have_their_share(share):
    exact = NoiseConfig(own_draws=share).own_share
    rows = chosen(range(10**9, 10**9 + 300), exact).int()
    assert sum(rows) == pytest.approx(300 * share, abs=1)
    for size in (3, 10, 64):
        counts = rows.unfold(0, size, 1).sum(1)
        assert counts.min() >= int(size * exact) and counts.max() <= -int(-size * exact // 1)
    assert torch.equal(rows[100:110], chosen(range(10**9 + 100, 10**9 + 110), exact).int())
    assert exact == Fraction(share).limit_denominator(1000)


class Certain(nn.Module):
    """A model that is sure of each token's successor; it keeps what it has been given."""

    def forward(self, *inputs):
        assert not self.training and not torch.is_grad_enabled()
        self.inputs = inputs
        return 1e4 * nn.functional.one_hot((inputs[0] + 1) % LABELS, LABELS).permute(0, 3, 1, 2).float()


def test_the_noise_of_a_level_lies_over_what_the_model_draws_at_a_higher_one():
    tokens = torch.randint(LABELS, (8, 16, 16))
    config = NoiseConfig(own_draws=0.5, own_draws_ahead=0.3)
    draws = draw_noise(tokens, LABELS, 0, range(8, 16), config)
    own, rows = draws.own, draws.own.chosen
    assert rows.tolist() == [False, True] * 4
    assert (
        (own.t >= draws.t).all()
        and (own.t <= (draws.t + 0.3).clamp(max=1)).all()
        and (own.t[draws.t < 1] > draws.t[draws.t < 1]).all()
    )
    assert (draws.weight[rows] == 1).all() and (draws.weight[~rows] < 1).any()
    model, text, clip = Certain(), torch.randn(8, 5, 4), torch.randn(8, 6)
    renoised = own.renoised(model, draws.noised, draws.t, text, draws.keep, clip)
    assert model.training, "as before"
    noised, t, *conditions = model.inputs
    assert torch.equal(t, own.t[rows]) and torch.equal(conditions[0], text[rows]) and torch.equal(conditions[2], clip[rows])
    assert torch.equal(conditions[1].caption, draws.keep.caption[rows])
    share = (noised != tokens[rows]).float().mean((1, 2))
    torch.testing.assert_close(share, t * (LABELS - 1) / LABELS, atol=0.12, rtol=0)
    assert torch.equal(renoised[~rows], draws.noised[~rows]), "the others are noised from the truth"
    random = own.mask[rows].bool()
    assert torch.equal(renoised[rows][random], draws.noised[rows][random]), "the same random tokens as without"
    assert torch.equal(renoised[rows][~random], ((noised + 1) % LABELS)[~random])
    replaced = noised != tokens[rows]  # by the same random tokens where both are random
    assert torch.equal(noised[replaced & random], draws.noised[rows][replaced & random])


def test_the_numbers_belong_to_the_sample():
    tokens, config = torch.randint(LABELS, (8, 4, 4)), NoiseConfig(own_draws=0.5)
    together = draw_noise(tokens, LABELS, 7, range(8), config).own
    apart = [draw_noise(tokens[part], LABELS, 7, range(8)[part], config).own for part in (slice(4), slice(4, 8))]
    for part, own in zip((slice(4), slice(4, 8)), apart, strict=True):
        for name, value in vars(together[part]).items():
            assert torch.equal(value, getattr(own, name)), name
