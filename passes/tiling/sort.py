"""Rows in order (`tensor.sort`): a program sorts one row, or finds the first of it (`tile.sort`).

A row that lies in one piece in memory is sorted from there; others, and rows whose elements are computed, are first written to memory of the
program's own.
"""

from __future__ import annotations

from ...ir import BufferType, Dim, Operation, TensorType, TileType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of
from ...ir.expr import substitute
from ...ir.ranges import simplify, split_linear
from ...ir.types import DTYPES, index
from .emit import Emitter, Pair
from .ordered import body_values, dot_of

__all__ = ["OPS_PER_ELEMENT", "emit_sort"]

OPS_PER_ELEMENT = 60
"""About how many operations sorting takes per element: decides whether rows are shared among threads."""


def emit_sort(op: Operation, e: Emitter, buffers: dict[Value, Value], outs: list[Value | None]) -> list[Dim]:
    """Writes the kernel into `e`, a program per row; returns the grid. `outs` are the buffers of values and places, none for what nobody wants."""
    dims, last = op["dims"], f"d{len(op['dims']) - 1}"
    at: dict[str, Dim] = {}
    for j, size in enumerate(dims[:-1]):
        at[f"d{j}"] = e.fresh(e.builder.op("tile.program_id", type=index, axis=j), 0, size - 1)
    found = _in_one_piece(op, e, at)
    if found is not None:
        row, start = buffers[op.operands[found[0]]], found[1]
    else:
        row, start = _computed(op, e, buffers, at, last), 0
    operands, wanted = [row], [out for out in outs if out is not None]
    numbers: list[Dim] = [start, dims[-1], op["keep"]]
    for out, result in zip(outs, op.results, strict=True):
        if out is not None:
            assert isinstance(result.type, TensorType)
            here = [at[f"d{j}"] for j in range(len(dims) - 1)]
            numbers += [dot_of([*here, 0], result.type.layout, e), result.type.layout[-1]]
    operands += [*wanted, *(e.index_value(x, DTYPES["index"]) for x in numbers)]
    attrs = {"values": outs[0] is not None, "places": outs[1] is not None, **({} if op["largest"] else {"largest": False}),
             **({"pick": op["pick"]} if op["pick"] else {})}
    e.builder.create("tile.sort", operands, attrs)
    return list(dims[:-1])


def _in_one_piece(op: Operation, e: Emitter, at: dict[str, Dim]) -> tuple[int, Dim] | None:
    """(operand, offset of the row's first element), if rows are elements of an operand side by side."""
    v = op.body.terminator.operands[0]
    arg = next((i for i, a in enumerate(op.body.args) if a is v), None)
    if arg is None or op["maps"][arg] is None or fill_of(op, arg) is not None:
        return None
    source, last = op.operands[arg].type, f"d{len(op['dims']) - 1}"
    assert isinstance(source, TensorType)
    offset: Dim = 0
    for x, stride in zip(op["maps"][arg], source.layout, strict=True):
        offset = offset + x * stride
    split = split_linear(simplify(substitute(offset, at), {**e.bounds(), last: (0, op["dims"][-1] - 1)}), last)
    return (arg, split[1]) if split is not None and split[0] == 1 else None


def _computed(op: Operation, e: Emitter, buffers: dict[Value, Value], at: dict[str, Dim], last: str) -> Value:
    """The row's elements in memory of the program's own."""
    length, width = op["dims"][-1], e.shape[1]
    row = e.builder.op("tile.alloca", type=BufferType((length,), element_type(op.body.terminator.operands[0].type)))

    def body(inner: Emitter, i: Dim, _: list[Value]) -> list[Value]:
        place = i + sym("t1")
        active: list[Pair] = [(place, length)]
        value, = body_values(inner, op, buffers, {**at, last: place}, active)
        if not isinstance(value.type, TileType) or value.type.shape != (1, width):
            value = inner.broadcast(value, (1, width))
        inner.store(row, value, place, inner.needed(active))
        return []

    e.loop(0, length, width, [], body)
    return row
