"""The register tile of a depthwise convolution (`window.py`): how many positions of a row by how many channels.

    rows, columns = window_tile(target, shape, bits=32)
    window_candidates(target, shape)           # the best by the model first
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir import Target

__all__ = ["Shape", "window_candidates", "window_tile"]

MULTIPLY_ADDS, LOADS, LATENCY = 2, 2, 4
"""Vector instructions of a kind that start per cycle, and cycles until the next multiply-add of the same sum starts."""
TILE = 12
"""Cycles that a tile costs beside its taps: addresses, the end of its loops."""
MOST = 15, 4
"""Positions and vectors of channels that are considered."""


@dataclass(frozen=True)
class Shape:
    """Positions of a row whose taps are all inside (0: unknown) and channels of each; taps across rows, and taps along the row with their steps."""

    positions: int
    channels: int
    across: int
    along: int
    stride: int
    dilation: int


def window_tile(target: Target, shape: Shape, bits: int = 32) -> tuple[int, int]:
    """(positions, channels) of a tile."""
    return window_candidates(target, shape, bits)[0]


def window_candidates(target: Target, shape: Shape, bits: int = 32) -> list[tuple[int, int]]:
    """Tiles whose sums and inputs fit the registers with one to spare, by modelled cycles; of equals the one with more positions first."""
    lanes = max(1, target.lanes(bits))
    if shape.channels < lanes:  # one narrow vector
        lanes = shape.channels
    found = []
    for vectors in range(1, min(MOST[1], max(1, shape.channels // lanes)) + 1):
        for rows in range(1, min(MOST[0], shape.positions or MOST[0]) + 1):
            if _registers(shape, rows, vectors) < target.vector_registers or rows == vectors == 1:
                found.append((_cycles(shape, rows, vectors, lanes), -rows, vectors))
    return [(-rows, vectors * lanes) for _, rows, vectors in sorted(found)]


def _columns(shape: Shape, rows: int) -> int:
    """Different positions of the image's row that a tile reads."""
    return len({r * shape.stride + k * shape.dilation for r in range(rows) for k in range(shape.along)})


def _registers(shape: Shape, rows: int, vectors: int) -> int:
    """Sums, a tap, and what is read of the image and wanted again at a time, or is multiplied just now."""
    reads = [r * shape.stride + k * shape.dilation for k in range(shape.along) for r in range(rows)]
    first, last = {x: i for i, x in reversed(list(enumerate(reads)))}, {x: i for i, x in enumerate(reads)}
    live, most = 0, 1
    for i, x in enumerate(reads):
        live += first[x] == i < last[x]
        most = max(most, live + (first[x] == last[x]))
        live -= first[x] < i == last[x]
    return vectors * (rows + 1 + most)


def _cycles(shape: Shape, rows: int, vectors: int, lanes: int) -> float:
    """Of a row of the result."""
    def tile(n: int) -> float:
        if n == 0:
            return 0
        products = n * vectors * shape.along
        loads = vectors * (shape.along + _columns(shape, n))
        step = max(products / MULTIPLY_ADDS, loads / LOADS, LATENCY * shape.along)
        return shape.across * step + n * vectors + TILE
    across = -(-shape.channels // (vectors * lanes))
    if not shape.positions:
        return across * tile(rows) / rows
    return across * (shape.positions // rows * tile(rows) + tile(shape.positions % rows))
