"""CUDA graphs of the U-Net's small passes: a GPU has done one image's 1,400 kernels sooner than Python launches them.

    predictor = GraphedUnet(bundle.unet, grid=(64, 64))
    step(predictor, canvases)

A pass is recorded once for its shape and replayed by one call from then on. Each recording keeps its inputs and logits, so there
are few: of one grid, with rows and text padded to powers of two; twenty of the published model, of 15 GB, if prompts have all
lengths up to 512. All other passes go to the U-Net itself, large ones too, whose kernels take longer than their launch.
B rows, S conditioning tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paella.unet import Paella, Prepared

MAX_ROWS = 16
"""Rows of a pass that is replayed: eight images with guidance."""
MIN_LENGTH = 64
"""Conditioning tokens that a recorded pass has at least."""


class GraphedUnet:
    """A `sampler.Predictor` around a U-Net on a GPU, in eval mode. Passes must come from one thread at a time.

    What a replay returns is overwritten by the next one.
    """

    def __init__(self, unet: Paella, grid: tuple[int, int]) -> None:
        self.unet, self.config, self.grid = unet, unet.config, grid
        self.graphs: dict[tuple[int, int, int, int], _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.unet.parameters()

    def __call__(self, tokens: Tensor, t: Tensor, *, prepared: Prepared) -> Tensor:
        rows = len(tokens)
        if rows > MAX_ROWS or tokens.shape[1:] != self.grid or not prepared.keys_values:
            return self.unet(tokens, t, prepared=prepared)
        length = prepared.keys_values[0].shape[1]
        shape: tuple[int, int, int, int] = (_power_of_two(rows), max(MIN_LENGTH, _power_of_two(length)), *self.grid)
        if shape not in self.graphs:
            self.graphs[shape] = _Graph(self.unet, *shape, [kv.shape[2] for kv in prepared.keys_values], self.pool)
        return self.graphs[shape].replay(tokens, t, prepared)


def _power_of_two(number: int) -> int:
    """The smallest that is not smaller."""
    return 1 << (number - 1).bit_length()


class _Graph:
    """A recorded pass of (B,H,W) tokens with S conditioning tokens, and the tensors that it reads and writes."""

    @torch.inference_mode()
    def __init__(self, unet: nn.Module, rows: int, length: int, height: int, width: int, widths: list[int], pool: Any) -> None:
        weight = next(unet.parameters())
        device = weight.device
        self.tokens = torch.zeros(rows, height, width, dtype=torch.long, device=device)
        self.t = torch.ones(rows, device=device)
        self.mask = torch.ones(rows, length, dtype=torch.bool, device=device)
        keys_values = tuple(weight.new_zeros(rows, length, each) for each in widths)
        self.prepared = Prepared(keys_values, self.mask, device)
        self.given: Prepared | None = None
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries choose kernels and take their workspaces before anything is recorded
            for _ in range(2):
                unet(self.tokens, self.t, prepared=self.prepared)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):  # other threads go on with theirs
            self.logits = unet(self.tokens, self.t, prepared=self.prepared)

    def replay(self, tokens: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        rows, length = len(tokens), prepared.keys_values[0].shape[1]
        self.tokens[:rows], self.t[:rows] = tokens, t
        if prepared is not self.given:  # which it is in every step of the same images
            torch._foreach_copy_([kv[:rows, :length] for kv in self.prepared.keys_values], list(prepared.keys_values))
            self.mask[:rows, length:] = False
            self.mask[:rows, :length] = True if prepared.mask is None else prepared.mask
            self.given = prepared
        self.graph.replay()
        return self.logits[:rows]
