"""Partial reductions of a product's result, in its kernel (`passes/tile_reductions.py`).

A program makes one part of each. Over its rows, for each of its columns: every tile is folded into what there is so far, while it is in registers
(the result itself, a few lines of the first-level cache, holds it):

    top' = max(top, max of the tile)        sum' = sum * exp(top - top') + sum over the tile of exp(x - top')

Over its columns, for each of its rows: the program's block of the product, which is still in the caches, is walked row by row, with whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...ir import BufferType, Dim, Operation, TensorType, TileType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of
from ...ir.expr import substitute
from ...ir.ranges import simplify
from ..structured import PARTIAL, identity_of, plain_dims
from .bodies import evaluate_body
from .emit import COMBINE_OPS, Emitter, Pair, fill_masks

__all__ = ["Block", "Program", "fold"]

Places = Mapping[Operation, Sequence[Dim]]
"""Positions of the members that make the product's space."""


@dataclass(frozen=True)
class Program:
    """A register tile within what its program makes: the part, row and column positions with their ends, (first, this) row of a tile, which are
    equal at the first tile, and the place of the tile in the program's block."""

    part: Dim
    row: Pair
    column: Pair
    first: Pair
    tile: tuple[int, int]
    place: Dim


def fold(e: Emitter, partial: Sequence[Operation], where: Places, program: Program, member: Callable[[Operation, dict[str, Dim]], None],
         values: dict[Value, Value], buffers: Mapping[Value, Value]) -> None:
    """Folds the tile into every partial reduction of rows. `where`: positions of the members before them; `member(op, at)` puts the terms of `op`, at
    the position `at`, into `values`."""
    before: dict[Value, Value] = {}
    for op in partial:
        b, combine, made, bounds = e.builder, op["combine"][0], op.result, e.bounds()
        at = _position(op, where, program.part, program.row[0])
        offset, lanes = simplify(_offset(made, at), bounds), [program.column]
        shape, dtype = (1, program.tile[1]), element_type(made.type)
        with b.at(op.location):
            now = e.load(buffers[made], offset, [program.first, *e.needed(lanes)], other=identity_of(combine, dtype))
            before[made] = now = _as(e, now, shape)
            member(op, at)
            part = b.op("tile.reduce", values[made], type=TileType(shape, dtype), axis=0, kind=combine)
            top = next((v for v in op.operands if v in before and v is not made), None)
            if top is not None:
                lower = b.arith("select", b.arith("eq", before[top], float("inf")), 0, before[top])
                highest = b.arith("select", b.arith("isinf", values[top]), 0, values[top])
                now = b.arith("mul", now, b.arith("exp", b.arith("sub", lower, highest)))
            values[made] = b.arith(COMBINE_OPS[combine], now, part)
            e.store(buffers[made], values[made], offset, e.needed(lanes))


class Block:
    """The program's block of what its partial reductions of columns read: `rows` of `width` elements."""

    def __init__(self, e: Emitter, partial: Sequence[Operation], made: Sequence[Value], rows: int, width: int):
        self.partial, self.width = partial, width
        wanted = dict.fromkeys(v for op in partial for v in op.operands if v in made)
        self.kept = {v: e.builder.op("tile.alloca", type=BufferType((rows, width), element_type(v.type))) for v in wanted}

    def keep(self, e: Emitter, values: Mapping[Value, Value], place: Dim) -> None:
        """A tile of each value, at its place in the block."""
        for v, buffer in self.kept.items():
            e.store(buffer, values[v], simplify(place, e.bounds()))

    def reduce(self, e: Emitter, start: Dim, upper: Dim, first_column: Dim, part: Dim, step: int, where: Callable[[Emitter, Dim, Dim], Places],
               buffers: Mapping[Value, Value]) -> None:
        """Rows `start` to `upper`, each in steps of `step` elements. `where(emitter, row, column)`: positions of the members there."""
        def row(inner: Emitter, m: Dim, _: list[Value]) -> list[Value]:
            totals: dict[Value, Value] = {}
            for op in self.partial:
                with inner.builder.at(op.location):
                    totals[op.result] = self._total(inner, op, m, start, first_column, part, step, where, buffers, totals)
            return []
        e.loop(start, upper, 1, [], row)

    def _total(self, inner: Emitter, op: Operation, m: Dim, start: Dim, first_column: Dim, part: Dim, step: int,
               where: Callable[[Emitter, Dim, Dim], Places], buffers: Mapping[Value, Value], totals: Mapping[Value, Value]) -> Value:
        combine, made, dtype = op["combine"][0], op.result, element_type(op.result.type)
        wide = Emitter(inner.builder, (1, step), inner.symbols, inner.variables, inner.ranges, inner.coarse)

        def chunk(x: Emitter, q: Dim, carried: list[Value]) -> list[Value]:
            column, bounds = first_column + q + sym("t1"), x.bounds()
            at = _position(op, where(x, m, column), part, column)

            def operand(i: int) -> Value:
                v, read, fill = op.operands[i], op["maps"][i], fill_of(op, i)
                if v in totals:
                    return totals[v]
                if v in self.kept:
                    return x.load(self.kept[v], simplify((m - start) * self.width + q + sym("t1"), bounds))
                pairs, low = fill_masks(read, v.type.shape, at, bounds) if fill is not None else ([], [])  # type: ignore[attr-defined]
                return x.load(buffers[v], simplify(_offset(v, at, read), bounds), pairs, low, 0 if fill is None else fill)
            y, = evaluate_body(x, op, at, operand, buffers, [])
            return [x.builder.arith(COMBINE_OPS[combine], carried[0], _as(x, y, (1, step)))]

        neutral = wide.broadcast(wide.builder.constant(identity_of(combine, dtype), dtype), (1, step))
        lanes = wide.loop(0, self.width, step, [neutral], chunk)[0]
        total = inner.builder.op("tile.reduce", lanes, type=TileType((1, 1), dtype), axis=1, kind=combine)
        at = _position(op, where(inner, m, first_column), part, first_column)
        inner.store(buffers[made], total, simplify(_offset(made, at), inner.bounds()))
        return total


def _position(op: Operation, where: Places, part: Dim, along: Dim) -> dict[str, Dim]:
    """Of a partial reduction's dimensions: by what it reads of the product, the number of the part, and the place within the part (`along` is
    the position along what is reduced)."""
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
    at[f"d{count - 2 if kind == 'columns' else 0}"] = part
    at[f"d{count - 1}"] = along - part * size
    return at


def _offset(v: Value, at: Mapping[str, Dim], read: Sequence[Dim] | None = None) -> Dim:
    """Of the element of `v` that is read at a position; without a map, at the position's first dimensions."""
    assert isinstance(v.type, TensorType)
    offset: Dim = 0
    for j, stride in enumerate(v.type.layout):
        offset = offset + (at[f"d{j}"] if read is None else substitute(read[j], at)) * stride
    return offset


def _as(e: Emitter, value: Value, shape: tuple[int, int]) -> Value:
    return value if isinstance(value.type, TileType) and value.type.shape == shape else e.broadcast(value, shape)
