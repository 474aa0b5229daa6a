"""Tiles of streams on GPUs that make several middle spaces at once, as the backward of attention does.

Two tiles of products, an accumulator or two, and one operand of the rows per product have to fit registers and shared memory: tiles are small.
On an H100, for 4096 positions of 128 in bf16, 64 by 64 with 4 warps and 2 stages is the quickest of 12 (benchmarks/NOTES.md).
"""

from __future__ import annotations

from ...ir import Dim, Target
from .gpu_tiles import GpuTile, padded

__all__ = ["other_tiles", "spread_rows", "tile_of_several"]

FEW = ((16, 32, 4, 4), (16, 32, 2, 3), (16, 128, 4, 2), (16, 64, 2, 2), (16, 64, 8, 3))
MANY = ((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2))
"""Rows, steps, warps and stages of tiles that were the best of some stream on an H100 or H200."""

SHARED = {80: 160 << 10, 90: 220 << 10}
"""Bytes of shared memory that tiles may fill, by compute capability."""


LEAST_ROWS = 16


def spread_rows(target: Target, rows: int, count: int, batch: int) -> int:
    """Rows of a tile so that `batch` times `count` rows keep as many multiprocessors busy as they can, at most `rows`: with few programs the time is
    that of one (12 heads of 128 positions: 3.9 us with 128 rows, 2.4 with 16, on an H200)."""
    while rows > LEAST_ROWS and batch * -(-2 * count // rows) <= target.multiprocessors:
        rows //= 2
    return rows


def tile_of_several(target: Target, width: int, element: int, firsts: int, seconds: int) -> GpuTile:
    """Rows and steps for `firsts` and `seconds` products of operands `width` wide, `element` bytes each.

    Products of 32 bits are computed by threads, which hold their parts of both tiles and of the accumulators: twice as many warps do not spill
    (16 heads of 2048 positions, causal, an H200, forward and both streams of the backward: width 64 5.7 -> 5.1 ms, width 128 79 -> 12.8).
    """
    limit = SHARED[90 if target.capability >= 90 else 80]
    choices = [(64, 64, 2), (64, 32, 2), (64, 32, 1), (32, 32, 1), (32, 16, 1), (16, 16, 1)]
    if element > 2:
        choices = choices[1:]
    for rows, steps, stages in choices:
        if element * width * (rows * firsts + stages * steps * (firsts + seconds)) <= limit:
            break
    return GpuTile(rows, steps, 0, 8 if element > 2 else 4, stages)


def other_tiles(target: Target, chosen: GpuTile, width: int, element: int, rows: Dim, length: Dim) -> list[GpuTile]:
    """Tiles beside the chosen one for a stream of operands `width` wide, `element` bytes each, that fit its size and shared memory."""
    limit = SHARED[90 if target.capability >= 90 else 80]
    most = padded(rows) if isinstance(rows, int) else chosen.rows
    longest = padded(length) if isinstance(length, int) else chosen.columns
    return [GpuTile(r, c, 0, warps, stages) for r, c, warps, stages in (FEW if chosen.rows == 16 else MANY)
            if r <= max(16, most) and c <= longest and element * width * (r + 2 * stages * c) <= limit]
