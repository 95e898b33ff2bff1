"""Leave-one-out prediction: with the exact prediction from the other tokens it gives the exact posterior, eager and compiled."""

import itertools

import pytest
import torch

from paella.objective import add_own_token

NUM_LABELS, LENGTH = 3, 4
PICTURES = torch.tensor(list(itertools.product(range(NUM_LABELS), repeat=LENGTH)))  # all 81 that there are


def likelihood(noised: torch.Tensor, t: float) -> torch.Tensor:
    """Of each clean token of each picture to be what stands in (L,) noised tokens: (81,L)."""
    return (1 - t) * (noised == PICTURES) + t / NUM_LABELS


def posterior(of_pictures: torch.Tensor) -> torch.Tensor:
    """Distribution (K,L) of each clean token from weights of pictures, which may be others at each position: (81,L)."""
    one_hot = torch.nn.functional.one_hot(PICTURES, NUM_LABELS)  # (81,L,K)
    share = (of_pictures[..., None] * one_hot).sum(0).T
    return share / share.sum(0)


@pytest.mark.parametrize("t", [0.01, 0.3, 0.8, 1.0])
def test_the_exact_prediction_from_the_others_becomes_the_posterior(t):
    """Against Bayes' rule over all pictures, under a prior that ties tokens to each other, for whatever noise makes of them."""
    prior = torch.rand(len(PICTURES), generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    for noised in PICTURES:
        each = likelihood(noised, t).double()
        of_others = torch.stack([each[:, [j for j in range(LENGTH) if j != i]].prod(1) for i in range(LENGTH)], dim=1)
        given_others = posterior(prior[:, None] * of_others)
        given_all = posterior((prior * each.prod(1))[:, None].expand(-1, LENGTH))
        logits = add_own_token(given_others.log()[None], noised[None], torch.tensor([t]))
        torch.testing.assert_close(logits.softmax(1)[0], given_all, atol=1e-6, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(), (4, 6)])
def test_only_the_own_code_gains_and_gradients_pass_as_they_are(shape, compiled):
    generator = torch.Generator().manual_seed(1)
    features, weight = torch.randn(5, *shape, 7, generator=generator), torch.randn(9, 7, generator=generator).requires_grad_()
    tokens, t = torch.randint(9, (5, *shape), generator=generator), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    add = torch.compile(add_own_token, backend="eager") if compiled else add_own_token
    plain = (features @ weight.T).movedim(-1, 1)
    made = add(plain.clone(), tokens, t)
    gain = torch.log1p(9 * (1 - t) / t)
    gain[0] = torch.log1p(torch.tensor(9 * 0.999 / 0.001))  # finite where nothing is noised
    expected = plain + torch.nn.functional.one_hot(tokens, 9).movedim(-1, 1) * gain.view(-1, 1, *[1] * len(shape))
    torch.testing.assert_close(made, expected)
    losses = [logits.log_softmax(1).square().sum() for logits in (made, expected)]
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True) for loss in losses]
    torch.testing.assert_close(*gradients)


def test_logits_are_changed_in_place_in_their_own_precision():
    logits = torch.zeros(2, 5, 3, dtype=torch.bfloat16)
    made = add_own_token(logits, torch.zeros(2, 3, dtype=torch.int32), torch.tensor([0.5, 1.0]))
    assert made is logits and made.dtype == torch.bfloat16
    torch.testing.assert_close(logits[:, 0, 0].float(), torch.tensor([6.0, 1.0]).log(), atol=0, rtol=2**-8)
    assert not logits[:, 1:].any()
