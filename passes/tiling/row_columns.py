"""Kernels that also sum up columns (`passes/row_columns.py`): a program takes some neighbouring rows, a few at a time.

    sums[rows of a tile, columns] = 0
    for the program's rows, those of a tile at a time:  the rows' statistics and results, as in any kernel of whole rows;  sums += of them
    parts[program, columns] = sums, added up over the rows of a tile

Where nothing is reduced along rows (elementwise kernels), a program takes some columns of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...ir import Builder, Dim, IRError, Operation, TileType, Value, element_type, sym
from ...ir.ranges import simplify
from ...ir.types import index
from .emit import Emitter, identity_of
from .frame import Frame
from .loops import Lowering, Scope
from .tile_choice import TileChoice

__all__ = ["emit_row_columns", "row_columns_tile"]

PIECE = (16, 128)
"""The tile of an elementwise kernel."""
TILE, EACH = 4096, 32
"""Elements of a tile, and of a thread: the sums stay in registers beside the rows. As measured (8192 x 1024 in 16 bits, three sums, H200, from
memory): four rows in four warps with the next ones under way 29.7 us, without 33 to 35; without any sums 24.2."""
AHEAD = 2


def row_columns_tile(frame: Frame, columns: int) -> TileChoice:
    """The tile of a kernel over rows of so many columns. If it has inner dimensions, they are a whole row."""
    if not frame.inner:
        return TileChoice(None, None, PIECE, PIECE[1], 4)
    width = 1 << (columns - 1).bit_length()
    rows = max(1, TILE // width)
    return TileChoice(None, None, (rows, width), width, max(4, rows * width // (32 * EACH)))


def emit_row_columns(frame: Frame, sums: Sequence[Operation], tile: TileChoice, e: Emitter, buffers: dict[Value, Value], part: int) -> list[Dim]:
    """Writes the body; returns the grid. `sums`: reductions over [parts, columns, ..., part] of which each result is [parts, columns]."""
    parts, columns = sums[0]["dims"][:2]
    if part % tile.shape[0]:
        raise IRError(f"programs of {part} rows do not part into tiles of {tile.shape[0]}")
    for op in sums:
        frame.position[op] = [sym("part"), sym("column"), *([0] * (len(op["dims"]) - 3)), sym("rest")]
    pieces = 1 if frame.inner else -(-columns // tile.shape[1])
    p = e.fresh(e.builder.op("tile.program_id", type=index, axis=0), 0, parts - 1)
    column: Dim = sym("t1")
    if pieces > 1:
        column = e.fresh(e.builder.op("tile.program_id", type=index, axis=1), 0, pieces - 1) * tile.shape[1] + sym("t1")
    keys = [(op, k) for op in sums for k in range(len(op.results))]
    inits = [_zeros(e, op, k, tile.shape) for op, k in keys]
    active = (column, columns)
    held = "columns" if not frame.inner else next(iter(frame.inner))

    def body(inner: Emitter, i: Dim, carried: list[Value]) -> list[Value]:
        rest = i + sym("t0")
        at = {"part": p, "rest": rest, "column": column}
        if frame.inner:
            choice = replace(tile, row=frame.outer[0], vector=held)
            low = Lowering(frame, choice, inner, buffers, True, 0)
            scope = low.rows(Scope(inner, {**at, frame.outer[0]: p * part + rest, held: column}, {}))
        else:
            low = Lowering(frame, tile, inner, buffers, True, 0)
            scope = Scope(inner, {**at, **_places(frame, p * part + rest, column, columns, inner)}, {held: active})
            low.stage(scope, frame.members)
        return [_added(low, scope, op, k, total) for (op, k), total in zip(keys, carried, strict=True)]

    made = e.loop(0, part, tile.shape[0], inits, body, ahead=AHEAD if frame.inner else 0)
    for (op, k), total in zip(keys, made, strict=True):
        if op.results[k] in buffers:
            e.store(buffers[op.results[k]], _over_rows(total, e.builder), p * columns + column, e.needed([active]))
    return [parts, pieces] if pieces > 1 else [parts]


def _places(frame: Frame, row: Dim, column: Dim, columns: int, e: Emitter) -> dict[str, Dim]:
    """Where the point (row, column) lies along each dimension of a frame that walks the same elements in order."""
    at: dict[str, Dim] = {}
    flat, inside, bounds = row * columns + column, 1, e.bounds()
    for f in reversed(list(frame.sizes)):
        size = frame.sizes[f]
        assert isinstance(size, int)
        if columns % (inside * size) == 0:  # along the columns alone
            at[f] = simplify(column // inside % size if inside * size < columns else column // inside, bounds)
        elif inside % columns == 0:
            at[f] = simplify(row // (inside // columns) % size, bounds)
        else:
            at[f] = simplify(flat // inside % size, bounds)
        inside *= size
    return at


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
