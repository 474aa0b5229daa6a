"""`tile.dot` as outer products: acc[i] += a[i][k] * b[k], row by row, with b and acc in vectors and a[i][k] splatted.

With `a` loaded as scalars (`KernelEmitter.layout` sees to that) the splat is the broadcast operand of the multiply-add, and a
12x32 accumulator stays in 24 AVX-512 registers.
"""

from __future__ import annotations

from llvmlite import ir

from ...ir.types import DTYPES, DType
from .arith import Features
from .convert import emit_cast
from .intrinsics import call_same
from .values import Tile, splat, with_widths

__all__ = ["emit_dot"]


def cast_tile(b: ir.IRBuilder, features: Features, t: Tile, dtype: DType) -> Tile:
    """The tile with another element type."""
    if t.dtype == dtype:
        return t
    cast = t.with_values([emit_cast(b, v, t.dtype.name, dtype.name) for v in t.values])
    cast.dtype = dtype
    return cast


def emit_dot(b: ir.IRBuilder, features: Features, x: Tile, y: Tile, acc: Tile) -> Tile:
    """acc + x @ y. Narrow floats are multiplied in f32; the result has acc's type and layout."""
    dtype = DTYPES["f32"] if acc.dtype.is_float and acc.dtype.bits < 32 else acc.dtype
    depth = x.shape[1]
    x = cast_tile(b, features, with_widths(b, x, (1,) * depth), dtype)
    y = cast_tile(b, features, with_widths(b, y, acc.widths), dtype)
    rows = cast_tile(b, features, acc, dtype).rows
    rows = [list(r) for r in rows]
    for k in range(depth):
        for i, row in enumerate(rows):
            splats: dict[int, ir.Value] = {}
            for j, width in enumerate(acc.widths):
                if width not in splats:
                    splats[width] = splat(b, x.rows[i][k], width)
                row[j] = _multiply_add(b, dtype, splats[width], y.rows[k][j], row[j])
    return cast_tile(b, features, Tile(acc.shape, dtype, acc.widths, rows), acc.dtype)


def _multiply_add(b: ir.IRBuilder, dtype: DType, x: ir.Value, y: ir.Value, acc: ir.Value) -> ir.Value:
    if dtype.is_float:
        return call_same(b, "fmuladd", x, y, acc)
    return b.add(b.mul(x, y), acc)
