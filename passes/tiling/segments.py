"""Segments of positions combined (`tensor.segments`): bags of rows of which data says how many, on CPUs.

A program is a segment: where it begins and ends is read once, and its columns are taken in tiles whose sums stay in registers over all positions.
Rows of a table are asked for some positions ahead, in this segment or the next (`prefetch.py`).
"""

from __future__ import annotations

from ...ir import Dim, Operation, TensorType, TileType, Value, sym
from ...ir.expr import minimum
from ...ir.types import DTYPES, index
from .emit import COMBINE_OPS, Emitter, identity_of
from .ordered import body_values, dot_of
from .prefetch import ask_for_named_rows

__all__ = ["emit_segments"]

I64 = DTYPES["i64"]
VECTORS = 8
"""Of sums that are kept in registers: half of those of AVX2."""
MESSAGE = "the starts of segments (offsets) must not fall, and lie between 0 and the number of positions"


def emit_segments(op: Operation, e: Emitter, buffers: dict[Value, Value], out: Value, cache: int) -> list[Dim]:
    """Writes the kernel into `e`, a program per segment; returns the grid. Tables of more than `cache` bytes are asked for ahead."""
    result, columns = op.result.type, op["dims"][0]
    assert isinstance(result, TensorType)
    e = Emitter(e.builder, (1, _width(e.shape[1], columns)), e.symbols, e.variables, e.ranges, e.coarse)
    segment = e.fresh(e.builder.op("tile.program_id", type=index, axis=0), 0, result.shape[0] - 1)
    begin, end = _bounds(op, e, buffers, segment)
    kind, dtype = ("sum" if op["combine"] == "mean" else op["combine"]), result.dtype
    tables = [inner for inner in op.body if inner.name == "tensor.extract"]
    counted = len(op.body.terminator.operands) == 2

    def tile(inner: Emitter, first: Dim, _: list[Value]) -> list[Value]:
        column, b = first + sym("t1"), inner.builder
        neutral = b.constant(identity_of(kind, dtype), dtype)
        sums = [inner.broadcast(neutral, inner.shape), *([b.constant(0, I64)] if counted else [])]

        def add(deeper: Emitter, at: Dim, carried: list[Value]) -> list[Value]:
            b = deeper.builder
            for extract in tables:
                ask_for_named_rows(deeper, op, extract, buffers, {"d0": column, "d1": at}, cache)
            value, *counts = body_values(deeper, op, buffers, {"d0": column, "d1": at}, [(column, columns)])
            if not isinstance(value.type, TileType) or value.type.shape != deeper.shape:
                value = deeper.broadcast(value, deeper.shape)
            if not counts:
                return [b.arith(COMBINE_OPS[kind], carried[0], value)]
            value = b.arith("select", counts[0], value, deeper.broadcast(b.constant(identity_of(kind, dtype), dtype), deeper.shape))
            return [b.arith(COMBINE_OPS[kind], carried[0], value), b.arith("add", carried[1], b.cast(counts[0], I64))]

        total, *count = inner.loop(begin, end, 1, sums, add)
        number = count[0] if count else inner.index_value(end - begin)
        if op["combine"] == "mean":
            total = b.arith("div", total, b.cast(b.arith("max", number, 1), dtype))
        elif kind == "max":
            total = b.arith("select", b.arith("gt", number, 0), total, inner.broadcast(b.constant(0, dtype), inner.shape))
        inner.store(out, total, dot_of([segment, column], result.layout, inner), inner.needed([(column, columns)]))
        return []

    e.loop(0, columns, e.shape[1], [], tile)
    return [result.shape[0]]


def _width(lanes: int, columns: Dim) -> int:
    """Columns of a tile: a power of two."""
    width = lanes * VECTORS
    while isinstance(columns, int) and width > 1 and width >= 2 * columns:
        width //= 2
    return width


def _bounds(op: Operation, e: Emitter, buffers: dict[Value, Value], segment: Dim) -> tuple[Dim, Dim]:
    """Where the segment begins and ends, within the positions whatever the starts are."""
    starts, positions, b = op.operands[0], op["dims"][1], e.builder
    assert isinstance(starts.type, TensorType) and isinstance(op.result.type, TensorType)
    count, (stride,) = starts.type.shape[0], starts.type.layout
    total = e.index_value(positions)
    begin = e.load(buffers[starts], segment * stride)
    end = e.load(buffers[starts], minimum(segment + 1, count - 1) * stride)
    if count == op.result.type.shape[0]:
        end = b.arith("select", b.arith("lt", e.index_value(segment + 1), e.index_value(count)), end, total)
    valid = b.arith("and", b.arith("and", b.arith("ge", begin, 0), b.arith("le", begin, end)), b.arith("le", end, total))
    begin = b.create("tile.require", [valid, begin], {"message": MESSAGE}, [begin.type]).result
    begin, end = (b.arith("select", valid, x, e.index_value(0)) for x in (begin, end))
    return e.fresh(begin, 0, positions), e.fresh(end, 0, positions)
