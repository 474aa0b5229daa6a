"""Tile sizes on GPUs: an analytic choice for contractions and streams.

What a tile of a product costs is modelled in `gpu_tile_cost.py`. Products of few rows are bound by memory, and take tiles by rules of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product as pairs
from typing import Any

from ...ir import Dim, Operation, Target, element_type
from ...ir.expr import as_int, ceildiv
from ..exact import matrix_unit_type
from .gpu_tile_cost import product_seconds

__all__ = ["ASKED_BYTES", "ASKED_ROWS", "COLUMNS", "GpuTile", "early_columns",
           "gemm_tile_gpu", "gemm_tiles_gpu", "packed_bytes", "padded", "product_bytes"]


@dataclass(frozen=True)
class GpuTile:
    """rows x columns of the result per program, `step` of the summed dimension at a time; warps per program; loads in flight. `turned`: of a product,
    the result is computed as its transpose, and rows and columns are that one's (matrix units take 64 rows, but any multiple of 8 columns)."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    turned: bool = False

    @property
    def result(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        return (self.columns, self.rows) if self.turned else (self.rows, self.columns)

    def programs(self, batch: int, m: int, n: int) -> int:
        """How many compute `batch` products of m rows and n columns."""
        rows, columns = self.result
        return batch * -(-m // rows) * -(-n // columns)


COLUMNS = 64
"""Columns that a program sums at once: runs of 128 bytes of 16-bit floats. Narrow, so that there are many programs, whose loads wait side by side."""
FEW_ROWS, RUN = 16, 256
"""A product with so few rows is bound by memory: programs read RUN bytes of each of 32 columns at a time."""
HOPPER, WHOLE = 90, 64
"""The compute capability whose matrix units take 64 rows at a time (another number of columns, from 8 on, costs them nothing)."""
NARROW, LONG = 32, 8192
"""Rows of a weight that a program of few rows of the other operand has if that makes as many programs as there are multiprocessors: with WHOLE it
would take parts, which a second kernel adds. And the K from which on that pays."""
SHARED = 220 << 10
"""Bytes of shared memory for loads that programs on one multiprocessor share there."""
ASKED_ROWS, ASKED_BYTES = (32, 256), 12 << 20
"""Products whose weights are asked for before the kernel in front has ended, by rows of the other operand and bytes of the weight: with fewer rows or
larger weights the memory is busy anyway, and asking makes it slower (16 rows and 90 MB on an H200: 26 -> 41 us); with more rows, arithmetic is."""
EARLY = 224 << 10
"""Bytes of shared memory for all of K of both operands, and a float32 result (`backends/triton/early_weights.py`)."""
FITTED, SHORT_SUMS = 6, 1024
"""Tiles of 128 x 128 for each multiprocessor, up to which the model was fitted. With more, or where the left operand fills half of the L2 cache, and
sums of at least SHORT_SUMS, rounds count for little, and what counts is the rate of a tile (4096^3 on an H200: 128 x 256 187.7 us, which the model
takes for as fast as 128 x 128, 198.0). Shorter sums are bound by memory, which the model knows (50176 x 512 x 256: 36.4 us by it, 40.3 by rates)."""
RATE = {16: 0.13, 32: 0.25, 64: 0.5, 128: 0.85, 256: 1.0}
"""Relative rate of matrix units there, by the side of a square tile (others: the geometric mean of the sides' rates)."""
UNKNOWN = 2048
"""What a size that is not known at compile time counts as."""


def _thin_columns(target: Target, batch: int, n: int) -> int:
    """Columns of a tile so that every multiprocessor has as much to read as the others."""
    processors = max(1, target.multiprocessors)

    def share(columns: int) -> int:
        """Columns that the busiest multiprocessor reads."""
        return as_int(ceildiv(batch * as_int(ceildiv(n, columns)), processors)) * columns

    least = min(share(c) for c in (16, 32, 64))
    return max(c for c in (16, 32, 64) if share(c) <= 1.05 * least)


def _turned_tiles(target: Target, batch: int, n: int, k: Dim, products: int) -> list[GpuTile]:
    """Of a product of few rows, on targets whose matrix units take `WHOLE` rows at a time: those of its transpose, so that the weight's are the rows.
    What is read is all that costs, and what counts is how much of it is under way: a program that has a multiprocessor to itself asks for more."""
    if target.capability != HOPPER:
        return []
    alone = batch * as_int(ceildiv(n, WHOLE)) <= max(1, target.multiprocessors)
    held = (WHOLE * products + FEW_ROWS) * 2
    found = []
    divides = isinstance(k, int) and k % (2 * WHOLE) == 0 and n % NARROW == 0
    if products == 1 and divides and as_int(k) >= LONG and _fills(target, batch * (n // NARROW)):
        found.append(GpuTile(NARROW, FEW_ROWS, 256 if k % 256 == 0 else 128, 4, 4, True))
    for step, stages in ((128, 6), (128, 4), (64, 8)) if alone else ((128, 4), (128, 5), (64, 6)):
        step = _fit(k, step)
        found.append(GpuTile(WHOLE, FEW_ROWS, step, 4, max(2, min(stages, SHARED // (held * step) // (1 if alone else 2))), True))
    return found


def _fills(target: Target, programs: int) -> bool:
    """So many programs, each with a multiprocessor to itself, keep nearly all of them busy."""
    return 0.9 * target.multiprocessors <= programs <= target.multiprocessors


def early_columns(target: Target, batch: Dim, m: Dim, n: Dim, k: Dim) -> int:
    """Of a product of some rows by a weight that is there before the kernel in front has ended: rows of the other operand, beside `WHOLE` of the
    weight's, for a program that holds all of K of both in shared memory. As many programs as there are multiprocessors, as each has one to itself,
    and a fifth of that at least; 0 where nothing fits."""
    if target.capability != HOPPER or not all(isinstance(x, int) for x in (batch, m, n, k)):
        return 0
    batch, m, n, k = map(as_int, (batch, m, n, k))
    if not ASKED_ROWS[0] <= m <= ASKED_ROWS[1] or n % WHOLE or k % WHOLE or 2 * batch * n * k > ASKED_BYTES:
        return 0
    fitting = (c for c in (32, 64) if m % c == 0 and 2 * (WHOLE + c) * k + 4 * WHOLE * c <= EARLY)
    return next((c for c in fitting if target.multiprocessors <= 5 * batch * (n // WHOLE) * (m // c) <= 5 * target.multiprocessors), 0)


def padded(n: Dim, least: int = 16) -> int:
    """The power of two that holds n, at least `least`."""
    return max(least, 1 << max(0, as_int(n) - 1).bit_length())


def product_bytes(op: Operation) -> int:
    """Bytes of a factor of a contraction as it is multiplied: 2 where matrix units do it in 16 bits."""
    unit = matrix_unit_type(op)
    return unit.bytes if unit is not None else max(element_type(v.type).bytes for v in op.operands)


def packed_bytes(op: Operation, makers: Sequence[Operation] = ()) -> int:
    """Bytes in memory of an element of the larger operand of a contraction; `makers` compute operands from what is in memory, or from nothing."""
    sources = [v for op_ in (op, *makers) for v in op_.operands if not any(v in m.results for m in makers)] or op.operands
    largest = max(sources, key=lambda v: as_int(v.type.numel) if isinstance(v.type.numel, int) else 0)  # type: ignore[attr-defined]
    return element_type(largest.type).bytes


def _fit(size: Dim, most: int) -> int:
    return min(most, padded(size)) if isinstance(size, int) else most


def gemm_tile_gpu(target: Target, batch: Dim, m: Dim, n: Dim, k: Dim, bytes_per_element: int, **about: Any) -> GpuTile:
    """The tile of a contraction that the model finds best; see `gemm_tiles_gpu`."""
    return gemm_tiles_gpu(target, batch, m, n, k, bytes_per_element, **about)[0]


def gemm_tiles_gpu(target: Target, batch: Dim, m: Dim, n: Dim, k: Dim, bytes_per_element: int, *, exact: bool = False,
                   heavy: bool = False, stored: int = 2, products: int = 1, row_major: bool = False, settled: bool = False) -> list[GpuTile]:
    """Tiles of a contraction, the best by the model first. `exact`: integers, as rank-1 updates, since matrix units do not have their types;
    `heavy`: the epilogue needs registers beside the accumulator; `stored`: bytes in memory of an element of the larger operand; `products`:
    contractions of one left operand, side by side; `row_major`: the larger operand is contiguous along N; `settled`: the right operand is there
    before the kernel in front has ended."""
    if exact:
        return [GpuTile(_fit(m, 32), _fit(n, 32), 1, 4, 1)]
    if bytes_per_element > 2:  # f32 and f64 run on the plain units: tiles are bounded by registers
        most = 64 if bytes_per_element > 4 else 128
        rows, columns = _fit(m, most if isinstance(m, int) and m >= 512 else 64), _fit(n, most)
        if isinstance(k, int) and k < 32:  # one masked step is written out whole: the compiler holds all of it in registers
            rows, columns = min(rows, 32), min(columns, 32)
        return [GpuTile(rows, columns, _fit(k, 32), 8 if rows * columns >= 128 * 128 else 4, 3)]
    sizes = [x if isinstance(x, int) else UNKNOWN for x in (batch, m, n)]
    if isinstance(m, int) and m <= FEW_ROWS:
        turned = _turned_tiles(target, sizes[0], sizes[2], k, products) if stored == 2 and isinstance(n, int) and n >= WHOLE else []
        if row_major:  # runs of at least 128 bytes along N
            shapes = ((128, 64), (128, 32), (256, 32), (128, 128), (64, 128))
            return [*turned, *(GpuTile(16, columns // stored, _fit(k, step), 4, 4) for columns, step in shapes)]
        best = _thin_columns(target, sizes[0], sizes[2])
        runs = dict.fromkeys([(best, RUN), (32, RUN), (64, RUN), (32, RUN // 2), (64, RUN // 2), (32, 2 * RUN)])
        return [*turned, *(GpuTile(16, columns, _fit(k, run // stored), 4, 4) for columns, run in runs)]
    shape = (sizes[0], sizes[1], sizes[2], k if isinstance(k, int) else UNKNOWN)
    whole = target.capability == HOPPER and stored == 2
    sums = 128 * (128 if heavy or products > 1 else 256)
    heights = (64, 128) if whole else (16, 32, 64, 128)
    known = [GpuTile(rows, columns, _fit(k, step), warps, stages)
             for rows, columns, step, warps, stages in pairs(heights, (32, 64, 128, 256), (64, 128), (4, 8), (3, 4))
             if rows <= padded(sizes[1], min(heights)) and columns <= padded(sizes[2], 32) and rows * columns <= sums
             and _suits(rows, columns, step, warps, stages, products)]
    if whole and sizes[1] <= WHOLE:
        known += [GpuTile(WHOLE, padded(sizes[1]), _fit(k, step), 4, stages, True) for step, stages in pairs((64, 128), (3, 4, 6))]
    if sizes[1] > ASKED_ROWS[1] and _is_beyond(target, shape):
        return sorted(known, key=lambda tile: _by_rate(target, shape, tile))
    costs = {tile: product_seconds(target, shape, tile, products=products) for tile in known}
    early = early_columns(target, batch, m, n, k) if settled and stored == 2 and products == 1 and not row_major else 0
    first = [GpuTile(WHOLE, early, WHOLE, 4, 4, True)] if early else []
    return list(dict.fromkeys([*first, *sorted(costs, key=costs.__getitem__)]))


def _is_beyond(target: Target, shape: tuple[int, int, int, Any]) -> bool:
    """Beyond what the model was fitted to."""
    batch, m, n, k = shape
    if k < SHORT_SUMS:
        return False
    return batch * -(-m // 128) * -(-n // 128) > FITTED * max(1, target.multiprocessors) or 2 * batch * m * k * 2 > target.l2


def _by_rate(target: Target, shape: tuple[int, int, int, Any], tile: GpuTile) -> tuple[float, bool, bool]:
    """The cost of the busiest multiprocessor's tiles by their rate; then long steps for small tiles, and as many loads in flight as fit."""
    rounds = -(-tile.programs(*shape[:3]) // max(1, target.multiprocessors))
    area, sides = tile.rows * tile.columns, tile.rows + tile.columns
    return (rounds * area / (RATE[tile.rows] * RATE[tile.columns]) ** 0.5, (tile.step > 64) != (sides <= 128),
            (tile.stages == 3) != (area >= 128 * 256))


def _suits(rows: int, columns: int, step: int, warps: int, stages: int, products: int) -> bool:
    """Registers hold the sums, and shared memory the loads, of what runs well: eight warps for large tiles, long steps for small ones."""
    large = rows * columns * products >= 128 * 256
    return (warps == 8) == (rows * columns >= 128 * 128) and not (large and stages == 4) and not (step == 128 and rows + columns > 160)
