"""Kernels of whole rows that also sum up columns (`passes/row_columns.py`): a program takes some neighbouring rows, a few at a time.

    sums[rows of a tile, columns] = 0
    for the program's rows, those of a tile at a time:  the rows' statistics and results, as in any kernel of whole rows;  sums += of them
    parts[program, columns] = sums, added up over the rows of a tile
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir import Builder, Dim, IRError, Operation, TileType, Value, element_type, sym
from ...ir.types import index
from .emit import Emitter, identity_of
from .frame import Frame
from .loop_tiles import TileChoice
from .loops import Lowering, Scope

__all__ = ["emit_row_columns", "row_columns_tile"]

TILE, EACH = 4096, 32
"""Elements of a tile, and of a thread: the sums stay in registers beside the rows. As measured (8192 x 1024 in 16 bits, three sums, H200, from
memory): four rows in four warps with the next ones under way 29.7 us, without 33 to 35; without any sums 24.2."""
AHEAD = 2


def row_columns_tile(frame: Frame) -> TileChoice:
    """The tile of a kernel over a frame of one outer dimension (rows) and one inner one (columns), both of known size."""
    (row,), (column,) = frame.outer, tuple(frame.inner)
    columns = frame.sizes[column]
    assert isinstance(columns, int)
    width = 1 << (columns - 1).bit_length()
    rows = max(1, TILE // width)
    return TileChoice(column, row, (rows, width), width, max(4, rows * width // (32 * EACH)))


def emit_row_columns(frame: Frame, sums: Sequence[Operation], tile: TileChoice, e: Emitter, buffers: dict[Value, Value], part: int) -> list[Dim]:
    """Writes the body; returns the grid. `sums`: reductions over [parts, columns, ..., part] of which each result is [parts, columns]."""
    row, column = tile.row, tile.vector
    assert row is not None and column is not None
    rows, columns = frame.sizes[row], frame.sizes[column]
    if not isinstance(rows, int) or rows % part or part % tile.shape[0]:
        raise IRError(f"{rows} rows do not part into programs of {part}, or these into tiles of {tile.shape[0]}")
    for op in sums:
        frame.position[op] = [sym("part"), sym(column), *([0] * (len(op["dims"]) - 3)), sym("rest")]
    p = e.fresh(e.builder.op("tile.program_id", type=index, axis=0), 0, rows // part - 1)
    keys = [(op, k) for op in sums for k in range(len(op.results))]
    inits = [_zeros(e, op, k, tile.shape) for op, k in keys]
    active = {column: (sym("t1"), columns)}

    def body(inner: Emitter, i: Dim, carried: list[Value]) -> list[Value]:
        rest = i + sym("t0")
        low = Lowering(frame, tile, inner, buffers, True, 0)
        scope = low.rows(Scope(inner, {row: p * part + rest, "part": p, "rest": rest}, {}))
        return [_added(low, scope, op, k, total) for (op, k), total in zip(keys, carried, strict=True)]

    made = e.loop(0, part, tile.shape[0], inits, body, ahead=AHEAD)
    for (op, k), total in zip(keys, made, strict=True):
        if op.results[k] in buffers:
            e.store(buffers[op.results[k]], _over_rows(total, e.builder), p * columns + sym("t1"), e.needed(list(active.values())))
    return [rows // part]


def _zeros(e: Emitter, op: Operation, k: int, shape: tuple[int, int]) -> Value:
    dtype = element_type(op.body.terminator.operands[k].type)
    return e.broadcast(e.builder.constant(identity_of("sum", dtype), dtype), shape)


def _added(low: Lowering, scope: Scope, op: Operation, k: int, total: Value) -> Value:
    """Columns beyond the last hold anything: nothing reads them."""
    value = low.summand(scope, op, k)
    made = scope.e.builder.arith("add", total, value)
    return made if made.type == total.type else scope.e.broadcast(made, low.tile.shape)


def _over_rows(total: Value, b: Builder) -> Value:
    t: Any = total.type
    if t.shape[0] == 1:
        return total
    return b.op("tile.reduce", total, type=TileType((1, t.shape[1]), t.dtype), axis=0, kind="sum")
