"""Sums over rows on CPUs: several rows at a time, over many columns, with the sums in memory of the program's own.

A tile of columns that stays in registers reads each row a line or two at a time, from another page each: 10 GB/s where memory gives 20. Here a
program reads ROWS rows side by side in long runs, as many streams as the processor follows, and adds what a column has in them to its sum in the
first cache:

    for each SPAN of rows:  sums = 0;  for each ROWS of those:  for each tile of columns:  sums += of the rows
                            totals += sums
No chain of additions is longer than log2(ROWS) + SPAN / ROWS, and one addition per SPAN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...ir import BufferType, Dim, Operation, Value, element_type, sym
from ...ir.expr import free_symbols, minimum, product
from ..structured import is_contraction
from .emit import COMBINE_OPS, Emitter, identity_of

if TYPE_CHECKING:
    from .loops import Lowering, Scope

__all__ = ["COLUMNS", "WINDOW", "emit_columns", "sums_columns"]

COLUMNS = 4096
"""Most columns of a program: 16 KB of sums."""
WINDOW = 128
"""Most elements of a window that is summed directly, its sums in registers."""
ROWS = 8
SPAN = 512


def sums_columns(low: Lowering) -> bool:
    """Plain reductions of one stage over rows that are longer than a tile, of which nothing is kept but the sums."""
    frame, tile = low.frame, low.tile
    if low.gpu or not frame.inner or tile.vector is None or tile.vector in frame.inner or tile.row is not None or frame.online or frame.moments:
        return False
    size = frame.sizes[tile.vector]
    if tile.gathered:
        return False  # rows that data names are no streams: their sums stay in registers
    if isinstance(size, int) and size <= tile.shape[1]:
        return False
    summed = product(frame.sizes[d] for d in frame.inner)
    if isinstance(summed, int) and summed <= WINDOW and any(is_contraction(op) for op in frame.members):
        return False  # the taps of a depthwise convolution: a tile of columns stays in registers for all of them
    for op in frame.members:
        if op["reductions"]:
            if frame.stage[op] > 0 or any(kind in ("argmax", "argmin") for kind in op["combine"]):
                return False
        elif frame.is_full(op) and (frame.stage[op] > 0 or any(r in low.stores for r in op.results)):
            return False
    return _rows(low) > 1


def _rows(low: Lowering) -> int:
    """How many rows are read side by side: fewer where several tensors are read, or where there are few."""
    walked = [free_symbols(x.offset) for x in low.frame.accesses if not x.is_store]
    reads = [names for names in walked if low.tile.vector in names and low.frame.inner & names]
    size = low.frame.sizes[low.inner_order()[-1]]
    rows = ROWS if len(reads) <= 1 else ROWS // 2
    while isinstance(size, int) and rows > size:
        rows //= 2
    return rows


def emit_columns(low: Lowering, top: Scope) -> None:
    """Writes the kernel's body: the program's columns, over all rows."""
    _Columns(low, top).emit()


class _Columns:
    def __init__(self, low: Lowering, top: Scope):
        self.low, self.top = low, top
        vector = low.tile.vector
        assert vector is not None
        self.vector, self.width = vector, low.tile.shape[1]
        size = low.frame.sizes[vector]
        self.start: Dim = top.at[vector] - sym("t1")
        self.upper: Dim = minimum(size, self.start + low.tile.chunk)
        if isinstance(size, int) and size <= low.tile.chunk:
            self.start, self.upper = 0, size
        elif isinstance(size, int) and size % low.tile.chunk == 0:
            self.upper = self.start + low.tile.chunk
        self.roots = [op for op in low.frame.members if op["reductions"]]
        self.keys = [(op, k) for op in self.roots for k in range(len(op.results))]
        self.rows = _rows(low)

    def emit(self) -> None:
        e = self.low.e
        loops = self.low.inner_order()
        size = self.low.frame.sizes[loops[-1]]
        whole = size // self.rows * self.rows
        long = not isinstance(whole, int) or whole >= 2 * SPAN
        totals = self._sums(e)
        parts = self._sums(e) if long else totals
        self._fill(e, totals)

        def visit(inner: Emitter, at: dict[str, Dim], names: Sequence[str]) -> None:
            if len(names) == 1:
                self._run(inner, at, names[0], size, whole, parts, totals)
                return

            def body(deeper: Emitter, i: Dim, _: list[Value]) -> list[Value]:
                visit(deeper, {**at, names[0]: i}, names[1:])
                return []

            inner.loop(0, self.low.frame.sizes[names[0]], 1, [], body)

        visit(e, {}, loops)
        self._finish(e, totals)

    def _run(self, e: Emitter, at: dict[str, Dim], f: str, size: Dim, whole: Dim, parts: list[Value], totals: list[Value]) -> None:
        """The innermost loop over rows."""
        def some(rows: int, into: list[Value]) -> Callable[[Emitter, Dim, list[Value]], list[Value]]:
            def body(inner: Emitter, i: Dim, _: list[Value]) -> list[Value]:
                self._add(inner, {**at, f: i}, f, rows, into)
                return []
            return body

        if parts is totals:
            e.loop(0, whole, self.rows, [], some(self.rows, totals))
        else:
            def span(inner: Emitter, i: Dim, _: list[Value]) -> list[Value]:
                self._fill(inner, parts)
                end = i + SPAN if isinstance(whole, int) and whole % SPAN == 0 else minimum(whole, i + SPAN)
                inner.loop(i, end, self.rows, [], some(self.rows, parts))
                self._merge(inner, parts, totals)
                return []

            e.loop(0, whole, SPAN, [], span)
        if whole != size:
            e.loop(whole, size, 1, [], some(1, totals))

    # -- passes over the columns

    def _each(self, e: Emitter, body: Callable[[Scope, Dim], None], at: dict[str, Dim] | None = None) -> None:
        """`body(scope, place)` for each tile of columns; `place` is where it lies among the program's."""
        def tile(inner: Emitter, i: Dim, _: list[Value]) -> list[Value]:
            column = i + sym("t1")
            body(self.low.scope(inner, {**self.top.at, **(at or {}), self.vector: column},
                                {**self.top.active, self.vector: (column, self.upper)}), column - self.start)
            return []

        e.loop(self.start, self.upper, self.width, [], tile)

    def _sums(self, e: Emitter) -> list[Value]:
        room = -(-self.low.tile.chunk // self.width) * self.width
        return [e.builder.op("tile.alloca", type=BufferType((room,), self._dtype(op, k))) for op, k in self.keys]

    def _dtype(self, op: Operation, k: int) -> Any:
        return element_type(op.body.terminator.operands[k].type)

    def _neutral(self, e: Emitter, op: Operation, k: int) -> Value:
        """Of the combination; -0 for sums, for adding it to a number is no operation."""
        dtype, kind = self._dtype(op, k), op["combine"][k]
        value = -0.0 if kind == "sum" and dtype.is_float else identity_of(kind, dtype)
        return e.broadcast(e.builder.constant(value, dtype), self.low.tile.shape)

    def _fill(self, e: Emitter, sums: list[Value]) -> None:
        def body(scope: Scope, place: Dim) -> None:
            for buffer, (op, k) in zip(sums, self.keys, strict=True):
                dtype = self._dtype(op, k)
                neutral = scope.e.builder.constant(identity_of(op["combine"][k], dtype), dtype)
                scope.e.store(buffer, scope.e.broadcast(neutral, self.low.tile.shape), place)

        self._each(e, body)

    def _merge(self, e: Emitter, parts: list[Value], totals: list[Value]) -> None:
        def body(scope: Scope, place: Dim) -> None:
            for part, total, (op, k) in zip(parts, totals, self.keys, strict=True):
                made = scope.e.builder.arith(COMBINE_OPS[op["combine"][k]], scope.e.load(total, place), scope.e.load(part, place))
                scope.e.store(total, made, place)

        self._each(e, body)

    def _add(self, e: Emitter, at: dict[str, Dim], f: str, rows: int, sums: list[Value]) -> None:
        """Adds what the columns have in so many rows."""
        def body(scope: Scope, place: Dim) -> None:
            nothing = [self._neutral(scope.e, op, k) for op, k in self.keys]
            points = [self.low.scope(scope.e, {**scope.at, f: at[f] + n}, scope.active) for n in range(rows)]
            read = [self.low.stage(point, self.roots, self.keys, nothing) for point in points]
            for buffer, found, (op, k) in zip(sums, zip(*read, strict=True), self.keys, strict=True):
                combine, values = COMBINE_OPS[op["combine"][k]], list(found)
                while len(values) > 1:  # a power of two
                    values = [scope.e.builder.arith(combine, a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
                scope.e.store(buffer, scope.e.builder.arith(combine, scope.e.load(buffer, place), values[0]), place)

        self._each(e, body, at)

    def _finish(self, e: Emitter, totals: list[Value]) -> None:
        """What leaves the kernel: the sums, and what is made of them column by column."""
        low = self.low

        def body(scope: Scope, place: Dim) -> None:
            for buffer, (op, k) in zip(totals, self.keys, strict=True):
                low.outer_values[op.results[k]] = scope.e.load(buffer, place)
            for op in low.frame.members:
                for r in op.results:
                    if r in low.stores and (op["reductions"] or not low.frame.is_full(op)):
                        low.store(scope, low.buffers[r], low.stores[r], low.value(scope, r))

        self._each(e, body)
