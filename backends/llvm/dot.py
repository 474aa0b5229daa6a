"""`tile.dot` as outer products: acc[i] += a[i][k] * b[k], row by row, with b and acc in vectors and a[i][k] splatted.

With `a` loaded as scalars (`KernelEmitter.layout` sees to that) the splat is the broadcast operand of the multiply-add, and a
12x32 accumulator stays in 24 AVX-512 registers.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from ...ir.core import Operation
from ...ir.types import DTYPES, DType, TileType
from .arith import Features
from .convert import emit_cast
from .intrinsics import call, call_same
from .values import I32, Tile, splat, with_widths

__all__ = ["GroupTile", "emit_dot", "multiplies_pairs", "round_to_bf16", "takes_groups"]


def cast_tile(b: ir.IRBuilder, features: Features, t: Tile, dtype: DType) -> Tile:
    """The tile with another element type."""
    if t.dtype == dtype:
        return t
    cast = t.with_values([emit_cast(b, v, t.dtype.name, dtype.name) for v in t.values])
    cast.dtype = dtype
    return cast


class GroupTile(Tile):
    """A tile of two or four rows as one row of integer chunks: a lane holds the elements of a column, the first in its lowest bits."""


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def takes_groups(features: Features, x: DType, y: DType, acc: DType, depth: int) -> bool:
    """Whether `depth` elements of x's and y's type are multiplied and summed onto `acc` by one instruction (or two)."""
    if (x.name, y.name, acc.name, depth) == ("bf16", "bf16", "f32", 2):
        return "avx512bf16" in features
    return acc.name == "i32" and _integer_products(features, x, y, depth) is not None


def multiplies_pairs(features: Features, op: Operation) -> bool:
    """A product of pairs of bf16."""
    if op.name != "tile.dot":
        return False
    x, y, acc = (v.type for v in op.operands)
    assert isinstance(x, TileType) and isinstance(y, TileType) and isinstance(acc, TileType)
    return x.dtype.name == "bf16" and takes_groups(features, x.dtype, y.dtype, acc.dtype, x.shape[1])  # type: ignore[arg-type]


def round_to_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """16 floats to bf16 patterns, to nearest even, by the instruction that takes subnormal numbers as zeros, as the products do."""
    rounded = call(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BFloat(), 16), [value])
    return b.bitcast(rounded, ir.VectorType(ir.IntType(16), 16))


Products = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]
"""(builder, acc, x, y), each a vector of 32-bit lanes -> acc plus each lane's products."""


def _integer_products(features: Features, x: DType, y: DType, depth: int) -> Products | None:
    """x, for the groups of 4, is u8 where the instruction wants it so: see `passes/factors.py`."""
    if (x.name, depth) == ("i16", 2) and y.bits == 8 and y.is_integer and "sse2" in features:
        return _words(y)
    if depth != 4 or y.name != "i8" or x.name not in ("u8", "i8"):
        return None
    if x.name == "i8" and "dotprod" in features:
        return _call(lambda width: f"llvm.aarch64.neon.sdot.v{width}i32.v{4 * width}i8")
    if x.name == "i8" and "avxvnniint8" in features:
        return _call(lambda width: f"llvm.x86.avx2.vpdpbssd.{32 * width}")
    if x.name == "u8" and ({"avx512vnni", "avx512vl"} <= features or "avxvnni" in features):
        return _call(lambda width: f"llvm.x86.avx512.vpdpbusd.{32 * width}")
    return None


def _words(y: DType) -> Products:
    """Pairs of 16 bits, y's widened from 8: `vpmaddwd`, whose sum of two products wraps around as 32 bits do."""
    def product(b: ir.IRBuilder, acc: ir.Value, x: ir.Value, pairs: ir.Value) -> ir.Value:
        width = acc.type.count
        words = ir.VectorType(ir.IntType(16), 2 * width)
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[width]
        return b.add(acc, call(b, f"llvm.x86.{name}", acc.type, [b.bitcast(x, words), pairs]))
    return product


def _call(name: Callable[[int], str]) -> Products:
    def product(b: ir.IRBuilder, acc: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        width = acc.type.count
        lanes = ir.VectorType(ir.IntType(8), 4 * width)
        return call(b, name(width), acc.type, [acc, b.bitcast(x, lanes), b.bitcast(y, lanes)])
    return product


def _group_dot(b: ir.IRBuilder, features: Features, x: Tile, y: GroupTile, acc: Tile) -> Tile:
    """acc + x @ y by products of several steps of K. Those of bf16 (`vdpbf16ps`) take subnormal numbers as zeros."""
    width, depth = acc.widths[0], x.shape[1]
    rows = [list(r) for r in acc.rows]
    columns = list(y.rows[0])
    if x.dtype.name == "bf16":
        pairs = ir.VectorType(_BFloat(), 2 * width)
        columns = [b.bitcast(v, pairs) for v in columns]
    elif x.dtype.name == "i16":
        narrow, wide = (ir.VectorType(ir.IntType(n), 2 * width) for n in (8, 16))
        columns = [(b.sext if y.dtype.kind == "int" else b.zext)(b.bitcast(v, narrow), wide) for v in columns]
    products = None if x.dtype.name == "bf16" else _integer_products(features, x.dtype, y.dtype, depth)
    for i, row in enumerate(rows):
        group = b.zext(x.rows[i][0], I32)
        for n, element in enumerate(x.rows[i][1:], 1):  # LLVM reads the neighbours at once
            group = b.or_(group, b.shl(b.zext(element, I32), I32(n * x.dtype.bits)))
        both = splat(b, group, width)
        for j, column in enumerate(columns):
            if products is None:
                row[j] = call(b, f"llvm.x86.avx512bf16.dpbf16ps.{32 * width}", row[j].type, [row[j], b.bitcast(both, column.type), column])
            else:
                row[j] = products(b, row[j], both, column)
    return Tile(acc.shape, acc.dtype, acc.widths, rows)


def emit_dot(b: ir.IRBuilder, features: Features, x: Tile, y: Tile, acc: Tile) -> Tile:
    """acc + x @ y. Narrow floats are multiplied in f32; the result has acc's type and layout."""
    dtype = DTYPES["f32"] if acc.dtype.is_float and acc.dtype.bits < 32 else acc.dtype
    depth = x.shape[1]
    if isinstance(y, GroupTile):
        return _group_dot(b, features, with_widths(b, x, (1,) * depth), y, acc)
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
