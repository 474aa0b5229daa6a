"""Rows of a product's left operand, computed by its kernel into memory of its own before the tiles read them (CPUs).

    block = make_rows(...)                  # at the start of a program: all rows that its tiles will read
    block.read(emitter, m, k)               # row m (as numbered in the whole product), step k

The block is at most `rows` rows of all steps of K and stays in the second-level cache: a pass over memory, there and back, is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...ir import BufferType, Dim, Operation, TensorType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of, parallel_dims
from ...ir.expr import substitute
from ...ir.ranges import delinearize, simplify
from .bodies import evaluate_body
from .emit import Emitter, fill_masks

__all__ = ["RowBlock", "make_rows"]


@dataclass(frozen=True)
class RowBlock:
    """`buffer[m - start, k]`, of `length` steps."""

    buffer: Value
    start: Dim
    length: int

    def at(self, m: Dim, k: Dim) -> Dim:
        return (m - self.start) * self.length + k

    def read(self, e: Emitter, m: Dim, k: Dim) -> Value:
        return e.load(self.buffer, simplify(self.at(m, k), e.bounds()))


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
