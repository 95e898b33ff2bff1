"""What a text encoder learns from captions and tokens alone: which codes stand in which part of a picture.

It is what the U-Net has to know where a picture is all noise, at a tenth of the price: no image goes in. Cross-attention of one
query for each coarse cell has to find the words that speak of that cell, so that words are bound to places.

B captions, S words, D width of the encoder, C cells, K codes, H W token grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from paella.conditioning import TextEncoders


class TextToLayout(nn.Module):
    """A text encoder, and the head that it is trained with.

    Args:
        text: its encoder is of BERT's family.
        num_labels: codes.
        cells: per side of the picture.
        layers: of the head, as wide as the encoder's.
    """

    def __init__(self, text: TextEncoders, num_labels: int, *, cells: int, layers: int) -> None:
        super().__init__()
        self.text = text
        size = text.byt5.config
        width = size.hidden_size
        self.queries = nn.Parameter(torch.randn(cells**2, width))
        layer = nn.TransformerDecoderLayer(
            width, size.num_attention_heads, size.intermediate_size, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """`layout_loss` (B,) of tokens (B,H,W) by their captions, which have ids and mask (B,S)."""
        return layout_loss(self.logits(ids, mask), tokens)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B,C,K) of the codes in each cell, cells row by row, of captions with ids and mask (B,S)."""
        states = self.text.states(ids, mask)
        queries = self.queries.expand(len(states), -1, -1)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention takes half of a step on a CPU, for its backward pass
            return self.classifier(self.decoder(queries, states, memory_key_padding_mask=~mask))


def layout_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy (B,) of each picture's tokens (B,H,W) under the logits (B,C,K) of the cells that they stand in."""
    (height, width), (num_cells, num_labels) = tokens.shape[1:], logits.shape[1:]
    cells = cells_of(height, width, math.isqrt(num_cells)).to(tokens.device)
    log_p = logits.float().log_softmax(2).flatten(1)  # (B,C·K)
    return -log_p.gather(1, cells * num_labels + tokens.flatten(1)).mean(1)


def cells_of(height: int, width: int, cells: int) -> Tensor:
    """The cell (H·W,) that each token of a grid stands in, counted row by row.

    Where `cells` does not divide a side, cells differ by one token.
    """
    rows, columns = torch.arange(height) * cells // height, torch.arange(width) * cells // width
    return (rows[:, None] * cells + columns).flatten()
