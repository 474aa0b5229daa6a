"""Tiles of streams on GPUs that make several middle spaces at once, as the backward of attention does.

Two tiles of products, an accumulator or two, and one operand of the rows per product have to fit registers and shared memory: tiles are small.
On an H100, for 4096 positions of 128 in bf16, 64 by 64 with 4 warps and 2 stages is the quickest of 12 (benchmarks/NOTES.md).
"""

from __future__ import annotations

from ...ir import Target
from .gpu_tiles import GpuTile

__all__ = ["tile_of_several"]

SHARED = {80: 160 << 10, 90: 220 << 10}
"""Bytes of shared memory that tiles may fill, by compute capability."""


def tile_of_several(target: Target, width: int, element: int, firsts: int, seconds: int) -> GpuTile:
    """Rows and steps for `firsts` and `seconds` products of operands `width` wide, `element` bytes each."""
    limit = SHARED[90 if target.capability >= 90 else 80]
    choices = [(64, 64, 2), (64, 32, 2), (64, 32, 1), (32, 32, 1), (32, 16, 1), (16, 16, 1)]
    if element > 2:
        choices = choices[1:]
    for rows, steps, stages in choices:
        if element * width * (rows * firsts + stages * steps * (firsts + seconds)) <= limit:
            break
    return GpuTile(rows, steps, 0, 4, stages)
