"""Noise from a model's own draw: training then sees tokens that are likely each and contradict each other, as sampling does.

Source: SUNDAE, arXiv 2112.06749; for VQ tokens arXiv 2206.12351. B batch, K codes, H W token grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from paella.drawing import draw
from paella.objective import add_noise
from paella.parallel import evaluating


@dataclass(frozen=True)
class OwnDraws:
    """The random numbers of a batch some of whose images are noised from the model's own draw.

    chosen (B,) bool says which, on the CPU always, so that no GPU is waited for. The model draws from noised (B,H,W) at t (B,),
    which is above the image's level, with uniform (B,H,W). mask (B,H,W) is 1 where the image is random at its level.
    """

    chosen: Tensor
    t: Tensor
    noised: Tensor
    uniform: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice) -> OwnDraws:
        return OwnDraws(*(getattr(self, each.name)[rows] for each in dataclasses.fields(self)))

    def to(self, device: torch.device) -> OwnDraws:
        moved = (value.to(device, non_blocking=True) for value in (self.t, self.noised, self.uniform, self.mask))
        return OwnDraws(self.chosen, *moved)

    def renoised(self, model: nn.Module, tokens: Tensor, t: Tensor, *conditions: Any) -> Tensor:
        """The tokens (B,H,W) of the model's inputs, with the model's draw in place of the truth in the images chosen.

        Every worker must call it with some image chosen: a sharded model's pass is made by all together.
        """
        rows = self.chosen
        with evaluating(model, reshard=False):
            logits = model(self.noised[rows], self.t[rows], *(condition[rows] for condition in conditions))
        drawn = draw(logits.permute(0, 2, 3, 1), self.uniform[rows])
        renoised, _ = add_noise(drawn, t[rows], mask=self.mask[rows], random_tokens=tokens[rows])
        tokens = tokens.clone()
        tokens[rows] = renoised
        return tokens


def chosen(samples: Sequence[int], share: Fraction) -> Tensor:
    """Which samples a share of them is, by their numbers: of any that follow one another that share, rounded up or down."""
    return torch.tensor([(sample + 1) * share // 1 > sample * share // 1 for sample in samples])
