"""Partial reductions of a product's tiles, in its kernel (`passes/tile_reductions.py`).

A program makes one part of each: over its columns, for each of its rows, or over its rows, for each of its columns. What it has so far lies in the
result itself, a few lines of the first-level cache; each tile is reduced in registers and folded in:

    top' = max(top, max of the tile)        sum' = sum * exp(top - top') + sum over the tile of exp(x - top')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...ir import Dim, Operation, TensorType, TileType, Value, element_type
from ...ir.ranges import simplify
from ..structured import PARTIAL, identity_of, plain_dims
from .emit import COMBINE_OPS, Emitter, Pair

__all__ = ["Program", "fold"]


@dataclass(frozen=True)
class Program:
    """A register tile within what its program makes. By kind of reduction: the number of the part, the position of the tile's elements along what is
    reduced, and (first, now), which are equal at the first tile of the part. `row` and `column`: positions, and their ends."""

    part: Mapping[str, Dim]
    along: Mapping[str, Dim]
    first: Mapping[str, Pair]
    row: Pair
    column: Pair
    tile: tuple[int, int]


def fold(e: Emitter, partial: Sequence[Operation], where: Mapping[Operation, Sequence[Dim]], program: Program,
         member: Callable[[Operation, dict[str, Dim]], None], values: dict[Value, Value], buffers: Mapping[Value, Value]) -> None:
    """Folds the tile into every partial reduction. `where`: positions of the members before them; `member(op, at)` puts the terms of `op`, at the
    position `at`, into `values`."""
    before: dict[Value, Value] = {}
    for op in partial:
        b, kind, combine = e.builder, op[PARTIAL][0], op["combine"][0]
        at = _position(op, where, program)
        made, bounds = op.result, e.bounds()
        assert isinstance(made.type, TensorType)
        offset: Dim = 0
        for j, stride in enumerate(made.type.layout):
            offset = offset + at[f"d{j}"] * stride
        offset = simplify(offset, bounds)
        lanes, axis = (program.row, 1) if kind == "columns" else (program.column, 0)
        shape = (program.tile[0], 1) if kind == "columns" else (1, program.tile[1])
        dtype = element_type(made.type)
        with b.at(op.location):
            now = e.load(buffers[made], offset, [program.first[kind], *e.needed([lanes])], other=identity_of(combine, dtype))
            before[made] = now = now if isinstance(now.type, TileType) and now.type.shape == shape else e.broadcast(now, shape)
            member(op, at)
            part = b.op("tile.reduce", values[made], type=TileType(shape, dtype), axis=axis, kind=combine)
            top = next((v for v in op.operands if v in before and v is not made), None)
            if top is not None:
                lower = b.arith("select", b.arith("eq", before[top], float("inf")), 0, before[top])
                highest = b.arith("select", b.arith("isinf", values[top]), 0, values[top])
                now = b.arith("mul", now, b.arith("exp", b.arith("sub", lower, highest)))
            values[made] = b.arith(COMBINE_OPS[combine], now, part)
            e.store(buffers[made], values[made], offset, e.needed([lanes]))


def _position(op: Operation, where: Mapping[Operation, Sequence[Dim]], program: Program) -> dict[str, Dim]:
    """Of a partial reduction's dimensions: by what it reads of the product, the number of the part, and the place within the part."""
    kind, size = op[PARTIAL]
    count = len(op["dims"])
    at: dict[str, Dim] = {f"d{j}": 0 for j in range(count)}
    for v, m in zip(op.operands, op["maps"], strict=True):
        made = v.defining_op
        if made in where:
            for x, place in zip(m, where[made], strict=True):  # type: ignore[index]
                dims = plain_dims([x])
                if dims is not None:
                    at[f"d{dims[0]}"] = place
    at[f"d{count - 2 if kind == 'columns' else 0}"] = program.part[kind]
    at[f"d{count - 1}"] = program.along[kind] - program.part[kind] * size
    return at
