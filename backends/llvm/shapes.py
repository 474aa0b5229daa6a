"""Tile ops that move or combine elements: reduce, reshape, transpose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce as fold_left
from itertools import product

from llvmlite import ir

from ...ir.types import DTYPES
from .arith import Features, emit, identity
from .dot import cast_tile
from .values import I32, Tile, concat, pack, recut, slice_chunk, width_of, with_widths

__all__ = ["emit_reduce", "emit_reshape", "emit_transpose"]

_COMBINE = {"sum": "add", "prod": "mul", "max": "max", "min": "min", "any": "or", "all": "and"}


def emit_reduce(b: ir.IRBuilder, features: Features, x: Tile, axis: int, kind: str, widths: tuple[int, ...]) -> Tile:
    """Combines along `axis`, which keeps size 1: pairwise over chunks, then over the lanes of the last one."""
    dtype = x.dtype
    wide = DTYPES["f32"] if dtype.is_float and dtype.bits < 32 else dtype
    x = cast_tile(b, features, x, wide)

    def combine(p: ir.Value, q: ir.Value) -> ir.Value:
        return emit(b, features, _COMBINE[kind], wide, p, q)

    def tree(values: Sequence[ir.Value]) -> ir.Value:
        values = list(values)
        while len(values) > 1:
            paired = [combine(p, q) for p, q in zip(values[::2], values[1::2])]
            values = paired + ([values[-1]] if len(values) % 2 else [])
        return values[0]

    def across(v: ir.Value) -> ir.Value:
        width = width_of(v)
        if width & (width - 1):
            rounded = 1 << width.bit_length()
            v = concat(b, [v, identity(kind, wide, rounded - width)])
            width = rounded
        while width > 1:
            width //= 2
            v = combine(slice_chunk(b, v, 0, width), slice_chunk(b, v, width, width))
        return v

    shape = tuple(1 if d == axis else n for d, n in enumerate(x.shape))
    if axis == len(x.shape) - 1:
        rows = []
        for row in x.rows:
            by_width: dict[int, list[ir.Value]] = {}
            for v in row:
                by_width.setdefault(width_of(v), []).append(v)
            rows.append([fold_left(combine, [across(tree(vs)) for vs in by_width.values()])])
        result = Tile(shape, wide, (1,), rows)
    else:
        rows = []
        for at in product(*(range(n) for n in shape[:-1])):
            members = [_row(x.shape, (*at[:axis], i, *at[axis + 1:])) for i in range(x.shape[axis])]
            rows.append([tree([x.rows[m][c] for m in members]) for c in range(len(x.widths))])
        result = Tile(shape, wide, x.widths, rows)
    return with_widths(b, cast_tile(b, features, result, dtype), widths)


def _row(shape: Sequence[int], at: Sequence[int]) -> int:
    row = 0
    for n, i in zip(shape[:-1], at):
        row = row * n + i
    return row


def emit_reshape(b: ir.IRBuilder, x: Tile, shape: tuple[int, ...], widths: tuple[int, ...]) -> Tile:
    """The same elements in row-major order."""
    count = len(x.rows) * x.shape[-1] // (shape[-1] if shape else 1)
    values = recut(b, x.values, x.widths * len(x.rows), widths * count)
    n = len(widths)
    return Tile(shape, x.dtype, widths, [values[i:i + n] for i in range(0, len(values), n)])


def emit_transpose(b: ir.IRBuilder, x: Tile, widths: tuple[int, ...]) -> Tile:
    """Rank 2, swapped. Square blocks of a power of two go through a butterfly of interleavings; the rest element by element."""
    n, m = x.shape
    block = _block(n, m, max(widths))
    if block > 1:
        x = with_widths(b, x, (block,) * (m // block))
        rows: list[list[ir.Value]] = [[] for _ in range(m)]
        for r in range(0, n, block):
            for c in range(m // block):
                for i, v in enumerate(_butterfly(b, [x.rows[r + j][c] for j in range(block)])):
                    rows[c * block + i].append(v)
        return with_widths(b, Tile((m, n), x.dtype, (block,) * (n // block), rows), widths)
    columns = list(zip(*(x.lanes(b, r) for r in range(n))))
    rows = []
    for column in columns:
        row, start = [], 0
        for w in widths:
            row.append(pack(b, column[start:start + w]))
            start += w
        rows.append(row)
    return Tile((m, n), x.dtype, widths, rows)


def _block(n: int, m: int, widest: int) -> int:
    size = 1
    while size * 2 <= widest and n % (size * 2) == 0 and m % (size * 2) == 0:
        size *= 2
    return size


def _butterfly(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """log2(n) rounds of interleaving row i with row i + n/2 transpose n rows of n lanes."""
    n = len(rows)
    order = ir.VectorType(I32, n)
    low = ir.Constant(order, [i // 2 + (n if i % 2 else 0) for i in range(n)])
    high = ir.Constant(order, [n // 2 + i // 2 + (n if i % 2 else 0) for i in range(n)])
    for _ in range(n.bit_length() - 1):
        half = n // 2
        rows = [b.shuffle_vector(rows[i], rows[i + half], which) for i in range(half) for which in (low, high)]
    return rows


