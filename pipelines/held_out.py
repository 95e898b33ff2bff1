"""Which rows of a token dataset are held out of training: the last ones of a few shards, the same in every run."""

from __future__ import annotations

from collections.abc import Sequence

MOST_SHARDS = 16
"""Held-out rows come from no more shards than this, spread evenly, so that reading them is quick and no corner stands for all."""
SMALLEST_SHARE = 20
"""No more than one row in so many is held out."""


def split_rows(shards: Sequence[tuple[str, int]], wanted: int) -> tuple[list[tuple[str, int]], list[tuple[int, int, int]]]:
    """What is left to train on, and what is held out.

    Args:
        shards: file and number of rows of each.
        wanted: rows to hold out.

    Returns:
        the shards with the numbers of rows that training may read from their start, and (shard, first, end) of the held-out rows.
    """
    left = min(wanted, sum(rows for _, rows in shards) // SMALLEST_SHARE)
    number = min(len(shards), MOST_SHARDS, max(1, left))
    chosen = [index * len(shards) // number for index in range(number)]
    kept, pieces = list(shards), []
    for place, index in enumerate(chosen):
        file, rows = shards[index]
        taken = min(-(-left // (number - place)), rows // 2)
        if taken:
            kept[index] = (file, rows - taken)
            pieces.append((index, rows - taken, rows))
            left -= taken
    return kept, pieces
