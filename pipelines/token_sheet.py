"""Contact sheets of a token dataset: pictures decoded from stored tokens, beside their originals where those are at hand."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from paella.images import ImageError, contact_sheet, to_tensor, to_uint8
from paella.metrics import psnr
from paella.vqgan import VQModel
from pipelines.output_store import Output
from pipelines.source_contract import Sample, Unit
from pipelines.sources import read_unit
from pipelines.token_format import shard_name
from pipelines.tokenize_config import TokenizeConfig

NUM_IMAGES = 12
FEW = 4


@torch.inference_mode()
def beside_originals(
    config: TokenizeConfig, model: VQModel, output: Output, units: Sequence[Unit]
) -> tuple[Image.Image, float] | None:
    """Originals, each beside what its stored tokens decode to, and their mean PSNR in dB; None where no row has both."""
    pairs: list[np.ndarray] = []
    captions: list[str] = []
    values: list[float] = []
    for row, original in _with_originals(config, output, units):
        decoded = decode(model, [row["tokens"]], original.shape[0] // model.config.downsampling)
        values.append(psnr(decoded, to_tensor(original[None])).item())
        pairs.append(np.concatenate([original, to_uint8(decoded)[0]], axis=1))
        captions.append(f"{values[-1]:.1f} dB: {row['caption']}")
    if not pairs:
        return None
    return contact_sheet(pairs, captions, columns=4, scale=1), sum(values) / len(values)


@torch.inference_mode()
def decode(model: VQModel, tokens: Sequence[Sequence[int]], grid_height: int) -> Tensor:
    """Pictures (B,3,H,W) in [0,1] of flat lists of tokens."""
    grids = torch.tensor(tokens).reshape(len(tokens), grid_height, -1)
    return model.decode_indices(grids.to(next(model.parameters()).device)).cpu().clamp(0, 1)


def _with_originals(config: TokenizeConfig, output: Output, units: Sequence[Unit]) -> Iterator[tuple[dict, np.ndarray]]:
    """Rows of units evenly chosen over the dataset, one of each, with their crops."""
    chosen = [units[i * len(units) // NUM_IMAGES] for i in range(NUM_IMAGES)] if len(units) > NUM_IMAGES else units
    for unit in chosen:
        rows = {row["id"]: row for row in first_rows(output, unit.name, NUM_IMAGES)}
        samples = _samples(unit, config) if rows else iter(())
        sample = next((sample for sample in samples if sample.id in rows), None)
        if sample is None:
            continue
        try:
            yield rows[sample.id], config.cropping.decode(sample.image, sample.id).pixels
        except ImageError:  # what is behind a URL may have changed
            continue


def _samples(unit: Unit, config: TokenizeConfig) -> Iterator[Sample]:
    """A few at a time: behind URLs, each is fetched again."""
    for start in range(0, unit.num_samples, FEW):
        rows = range(start, min(start + FEW, unit.num_samples))
        yield from (row for row in read_unit(unit, rows, config.filters.turned_down) if isinstance(row, Sample))


def first_rows(output: Output, unit: str, num: int) -> list[dict]:
    """The first rows of a shard: id, tokens and caption."""
    data = output.read(shard_name(unit))
    assert data is not None, f"{output} has lost {shard_name(unit)}"
    table: pa.Table = pq.read_table(io.BytesIO(data), columns=["id", "tokens", "caption"])
    return table.slice(0, num).to_pylist()
