"""An initialisation for runs of thousands of steps, where the published one spends most of them on getting started.

The published initialisation (`Paella._init_weights`) suits a million steps. In a short run five things are missing for long,
and each is given here from the start: codes that know which of them look alike, a way out that is not zero and mirrors the way
in, a constant by which borders are seen, a text signal that can be heard, and byte states that know their neighbours. What was
measured of them is in `benchmarks/results/demo.md`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paella.blocks import AttnBlock
from paella.unet import Paella

if TYPE_CHECKING:
    from transformers import T5EncoderModel

LOGIT_STD = 4.0
"""Standard deviation of the first logits: large enough that a code can be all but certain without the weights growing far."""
KERNEL_WIDTH = 0.4
"""Distance at which codes stop being alike, as a share of the median distance of two codes."""
TEXT_GAIN = 4.0
"""On attention's values: an average over some seventy bytes is much quieter than any one of them."""
POSITION_STD = 0.3
"""Of the first position embeddings, beside a token embedding of variance 1: places are told apart from the start."""
HEAD_SLOPES = ((1.0, 0), (0.5, -1), (0.5, 1), (0.15, -1), (0.15, 1), (0.04, -1), (0.04, 1), (0.0, 0))
"""Loss of attention per byte of distance, and the side looked at (-1 before, 1 behind, 0 both); repeated over the heads."""
OTHER_SIDE = 8.0
"""Loss of attention on the side that a head does not look at."""


@torch.no_grad()
def initialise_unet(unet: Paella, codebook: Tensor) -> None:
    """Set the U-Net's way in, way out, attention values and positions in place; codebook is the VQGAN's, (K,D).

    Of a leave-one-out U-Net the way out starts from zero: to say a token again is what it must not learn.
    """
    codes, fold, unfold, classifier = unet.in_mapper[0], unet.embedding[1], unet.clf[1], unet.out_mapper[1]
    assert isinstance(codes, nn.Embedding) and isinstance(fold, nn.Conv2d)
    assert isinstance(unfold, nn.Conv2d) and isinstance(classifier, nn.Conv2d)
    classifier.weight.copy_(code_features(codebook, classifier.in_channels)[:, :, None, None])
    classifier.weight.mul_(LOGIT_STD * classifier.in_channels**-0.5)
    nn.init.orthogonal_(fold.weight)
    nn.init.orthogonal_(unfold.weight)
    if codes.embedding_dim == classifier.in_channels:
        # out is in's transpose: what is left of a token after the levels points at its own logit
        codes.weight.copy_(classifier.weight[:, :, 0, 0])
        unfold.weight.copy_(fold.weight.transpose(0, 1))
    if unet.config.leave_one_out:
        nn.init.zeros_(unfold.weight)
    if unet.positions is not None:
        nn.init.normal_(unet.positions, std=POSITION_STD)
    # a constant part of the input lets the zero padding of convolutions mark the borders. Tokens at t = 1 have no mean, so
    # that without it positions look alike until training has found such a constant
    assert fold.bias is not None
    nn.init.normal_(fold.bias, std=0.3)
    for module in unet.modules():
        if isinstance(module, AttnBlock):
            _, _, value = module.attention.attn.in_proj_weight.chunk(3)
            value.mul_(TEXT_GAIN)


def code_features(codebook: Tensor, width: int) -> Tensor:
    """Vectors (K,width) of mean square 1 whose products fall with the distance of their codes: (K,D) → (K,width).

    Random Fourier features of a Gaussian kernel (Rahimi and Recht 2007). What training learns of one code then holds for those
    that look like it, where unrelated vectors would have it learn every code's neighbours anew.
    """
    codes = codebook.detach().float()
    scale = KERNEL_WIDTH * torch.pdist(codes).median()
    frequencies = torch.randn(codes.shape[1], width, device=codes.device) / scale
    return 2**0.5 * torch.cos(codes @ frequencies + 2 * math.pi * torch.rand(width, device=codes.device))


@torch.no_grad()
def initialise_byt5(byt5: T5EncoderModel) -> None:
    """Give the heads of a new T5 encoder different reaches, as ALiBi does (arXiv 2108.12409), in its table of relative positions.

    A new T5 spreads attention evenly, so that a byte's state is little more than the caption's bag of letters.
    """
    first: Any = byt5.encoder.block[0]
    attention = first.layer[0].SelfAttention  # holds the table that all layers share
    reach = attention.relative_attention_max_distance
    relative = torch.arange(-reach + 1, reach)
    relative = relative[relative.abs().argsort(descending=True)]  # so that a bucket's nearest distance is written last
    buckets = attention._relative_position_bucket(
        relative, bidirectional=True, num_buckets=attention.relative_attention_num_buckets, max_distance=reach
    )
    table: Tensor = attention.relative_attention_bias.weight  # (buckets, heads)
    for bucket, offset in zip(buckets.tolist(), relative.tolist(), strict=True):
        for head in range(table.shape[1]):
            slope, side = HEAD_SLOPES[head % len(HEAD_SLOPES)]
            table[bucket, head] = -slope * abs(offset) - (OTHER_SIDE if offset * side < 0 else 0)
