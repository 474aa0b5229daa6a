"""`tile.dot` as outer products: acc[i] += a[i][k] * b[k], row by row, with b and acc in vectors and a[i][k] splatted.

With `a` loaded as scalars (`KernelEmitter.layout` sees to that) the splat is the broadcast operand of the multiply-add, and a
12x32 accumulator stays in 24 AVX-512 registers.
"""

from __future__ import annotations

from llvmlite import ir

from ...ir.types import DTYPES, DType
from .arith import Features
from .convert import emit_cast
from .intrinsics import call, call_same
from .values import I32, Tile, splat, with_widths

__all__ = ["PairTile", "emit_dot"]


def cast_tile(b: ir.IRBuilder, features: Features, t: Tile, dtype: DType) -> Tile:
    """The tile with another element type."""
    if t.dtype == dtype:
        return t
    cast = t.with_values([emit_cast(b, v, t.dtype.name, dtype.name) for v in t.values])
    cast.dtype = dtype
    return cast


class PairTile(Tile):
    """A tile of two rows of bf16 as one row of i32 chunks: a lane holds the two elements of a column."""


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _pair_dot(b: ir.IRBuilder, x: Tile, y: PairTile, acc: Tile) -> Tile:
    """acc + x @ y by `vdpbf16ps`, which takes subnormal numbers as zeros."""
    width = acc.widths[0]
    pairs = ir.VectorType(_BFloat(), 2 * width)
    columns = [b.bitcast(v, pairs) for v in y.rows[0]]
    rows = [list(r) for r in acc.rows]
    for i, row in enumerate(rows):
        low, high = (b.zext(v, I32) for v in x.rows[i])
        both = b.bitcast(splat(b, b.or_(low, b.shl(high, I32(16))), width), pairs)  # LLVM reads the two neighbours at once
        for j, column in enumerate(columns):
            row[j] = call(b, f"llvm.x86.avx512bf16.dpbf16ps.{32 * width}", row[j].type, [row[j], both, column])
    return Tile(acc.shape, acc.dtype, acc.widths, rows)


def emit_dot(b: ir.IRBuilder, features: Features, x: Tile, y: Tile, acc: Tile) -> Tile:
    """acc + x @ y. Narrow floats are multiplied in f32; the result has acc's type and layout."""
    dtype = DTYPES["f32"] if acc.dtype.is_float and acc.dtype.bits < 32 else acc.dtype
    depth = x.shape[1]
    if isinstance(y, PairTile):
        return _pair_dot(b, with_widths(b, x, (1, 1)), y, acc)
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
