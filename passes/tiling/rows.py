"""Rows of a product's left operand, put by its kernel into memory of its own before the tiles read them (CPUs).

    block = make_rows(...)                  # at the start of a program: all rows that its tiles will read
    block.read(emitter, m, k)               # row m (as numbered in the whole product), step k

The block is at most `rows` rows of all steps of K and stays in the second-level cache. `make_rows` computes it: a pass over memory, there and
back, is saved. `copy_turned` copies an operand that lies the other way around in memory, as that of a weight's gradient does: there the steps of
K of one tile lie in as many lines and pages, often a multiple of 4 KiB apart, which are the same few sets of the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...ir import BufferType, Dim, DType, Operation, TensorType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of, parallel_dims
from ...ir.expr import substitute
from ...ir.ranges import delinearize, simplify
from .bodies import evaluate_body
from .emit import Emitter, Pair, fill_masks

__all__ = ["RowBlock", "Rows", "TurnedBlock", "copy_turned", "make_rows"]


class Rows(Protocol):
    """A program's rows of the left operand."""

    def read(self, e: Emitter, row: Dim, k: Dim) -> Value:
        """Those of a tile that begins at `row`, at step k."""


@dataclass(frozen=True)
class RowBlock:
    """`buffer[m - start, k]`, of `length` steps."""

    buffer: Value
    start: Dim
    length: int

    def at(self, m: Dim, k: Dim) -> Dim:
        return (m - self.start) * self.length + k

    def read(self, e: Emitter, row: Dim, k: Dim) -> Value:
        return e.load(self.buffer, simplify(self.at(row + sym("t0"), k), e.bounds()))


@dataclass(frozen=True)
class TurnedBlock:
    """`buffer[(m - start) // rows, k, m % rows]`: a tile of `rows` rows reads one piece of memory, of `length` steps and some to spare."""

    buffer: Value
    start: Dim
    rows: int
    length: int

    def at(self, row: Dim, k: Dim) -> Dim:
        """Where a tile's first row lies."""
        return (row - self.start) * self.length + k * self.rows

    def read(self, e: Emitter, row: Dim, k: Dim) -> Value:
        return e.load(self.buffer, simplify(self.at(row, k) + sym("t0"), e.bounds()))


def make_rows(e: Emitter, maker: Operation, buffers: Mapping[Value, Value], m_sizes: Sequence[Dim], start: Dim, upper: Dim, rows: int,
              lanes: int) -> RowBlock:
    """Writes rows `start` to `upper` of what the pointwise op `maker` makes: its last dimension is K, those of more than one element before
    it are the product's rows, of sizes `m_sizes`."""
    dims = parallel_dims(maker)
    length = dims[-1]
    assert isinstance(length, int)
    block = RowBlock(e.builder.op("tile.alloca", type=BufferType((rows, length), element_type(maker.result.type))), start, length)
    of_rows = [d for d in range(len(dims) - 1) if dims[d] != 1]
    sizes = [s for s in m_sizes if s != 1]

    def row(inner: Emitter, m: Dim, _: list[Value]) -> list[Value]:
        index = {f"d{d}": value for d, value in zip(of_rows, delinearize(m, sizes) if sizes else [], strict=True)}

        def chunk(x: Emitter, k: Dim, _: list[Value]) -> list[Value]:
            column, bounds = k + sym("t1"), x.bounds()
            at: dict[str, Dim] = {f"d{d}": simplify(index.get(f"d{d}", 0), bounds) for d in range(len(dims) - 1)}
            at[f"d{len(dims) - 1}"] = column
            active = [(column, length)]

            def operand(i: int) -> Value:
                v, read, fill = maker.operands[i], maker["maps"][i], fill_of(maker, i)
                assert isinstance(v.type, TensorType)
                pairs, low = fill_masks(read, v.type.shape, at, bounds) if fill is not None else ([], [])
                offset: Dim = 0
                for p, stride in zip(read, v.type.layout, strict=True):
                    offset = offset + substitute(p, at) * stride
                return x.load(buffers[v], simplify(offset, bounds), [*pairs, *x.needed(active)], low, 0 if fill is None else fill)
            value, = evaluate_body(x, maker, at, operand, buffers, active)
            x.store(block.buffer, value, simplify(block.at(m, column), bounds), x.needed(active))
            return []
        wide = Emitter(inner.builder, (1, lanes), inner.symbols, inner.variables, inner.ranges, inner.coarse)
        wide.loop(0, length, lanes, [], chunk)
        return []
    e.loop(start, upper, 1, [], row)
    return block


def copy_turned(e: Emitter, read: Callable[[Emitter, Dim, Dim, list[Pair]], Value], dtype: DType, start: Dim, upper: Dim, rows: int, steps: int,
                tile_rows: int, lanes: int) -> TurnedBlock:
    """Rows `start` to `upper`, at most `rows`, of an operand of `steps` steps whose rows lie next to each other in memory: some at one step
    are `read(emitter, m, k, mask)`.

    Whole vectors are written, past the rows of a tile: there the next step's go, or what a tile has to spare."""
    length = steps + -(-lanes // tile_rows)
    block = TurnedBlock(e.builder.op("tile.alloca", type=BufferType((rows * length,), dtype)), start, tile_rows, length)
    wide = Emitter(e.builder, (1, lanes), e.symbols, e.variables, e.ranges, e.coarse)

    def step(outer: Emitter, k: Dim, _: list[Value]) -> list[Value]:
        def tile(x: Emitter, row: Dim, _: list[Value]) -> list[Value]:
            for first in range(0, tile_rows, lanes):
                m = row + first + sym("t1")
                x.store(block.buffer, read(x, m, k, x.needed([(m, upper)])), simplify(block.at(row, k) + first + sym("t1"), x.bounds()))
            return []
        outer.loop(start, upper, tile_rows, [], tile)
        return []
    wide.loop(0, steps, 1, [], step)
    return block
