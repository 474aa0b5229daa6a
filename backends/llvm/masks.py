"""Lane masks and lane indices: expressions in the position along the last tile dimension, as vectors.

`Lanes` is one chunk of one row: lanes [start, start + width) of dimension `axis`. Expressions given to it hold no other tile
positions, and `vectors` gives the chunk of every gathered index tile that varies along the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llvmlite import ir

from ...ir.expr import Dim, Expr, FloorDiv, Max, Min, Mod, Sym, floordiv, fold, free_symbols, substitute
from ...ir.ranges import split_linear
from .scalars import ScalarEmitter
from .values import I32, I64, chunk_type, sequence, splat

__all__ = ["LaneChunk"]

INT32 = 1 << 31


@dataclass
class LaneChunk:
    """Lanes [start, start + width) along the dimension whose position symbol is `position`."""

    scalars: ScalarEmitter
    position: str
    start: int
    width: int
    size: int
    vectors: Mapping[str, Callable[[], ir.Value]]

    @property
    def b(self) -> ir.IRBuilder:
        return self.scalars.b

    def varies(self, e: Dim) -> bool:
        """True if `e` differs from lane to lane."""
        return any(s == self.position or s in self.vectors for s in free_symbols(e))

    def linear(self, e: Dim) -> tuple[Dim, Dim] | None:
        """(coefficient, rest) of `e` in the position, with a rest that is the same in all lanes; None if it is not so."""
        found = split_linear(e, self.position)
        return None if found is None or self.varies(found[1]) or self.varies(found[0]) else found

    def at(self, e: Dim, lane: int) -> Dim:
        """`e` at one lane; only for expressions without gathered indices."""
        return substitute(e, {self.position: self.start + lane})

    # -- masks

    def mask(self, gaps: list[Dim]) -> tuple[ir.Value | None, ir.Value | None]:
        """(scalar i1, vector of i1): lanes where every gap is >= 0. None stands for true."""
        scalar: ir.Value | None = None
        vector: ir.Value | None = None
        for gap in gaps:
            if not self.varies(gap):
                scalar = self._both(scalar, self.b.icmp_signed(">=", self.scalars.emit(gap), I64(0)))
            elif self.width == 1 and not any(s in self.vectors for s in free_symbols(gap)):
                scalar = self._both(scalar, self.b.icmp_signed(">=", self.scalars.emit(self.at(gap, 0)), I64(0)))
            else:
                lanes = self._lane_mask(gap)
                if self.width == 1:
                    scalar = self._both(scalar, lanes)
                else:
                    vector = self._both(vector, lanes)
        return scalar, vector

    def _both(self, a: ir.Value | None, c: ir.Value) -> ir.Value:
        return c if a is None else self.b.and_(a, c)

    def _lane_mask(self, gap: Dim) -> ir.Value:
        b = self.b
        found = self.linear(gap)
        if found is not None and isinstance(found[0], int) and self.width > 1:
            c: int = found[0]
            rest = found[1]
            # c < 0: t <= rest // -c; c > 0: t >= ceil(-rest / c)
            n = self.scalars.emit(floordiv(rest, -c) + 1 if c < 0 else -floordiv(rest, c))
            n = b.select(b.icmp_signed("<", n, I64(0)), I64(0), n)
            n = b.select(b.icmp_signed(">", n, I64(self.size)), I64(self.size), n)
            return b.icmp_signed("<" if c < 0 else ">=", self.iota(I32, 1, self.start), splat(b, b.trunc(n, I32), self.width))
        scalar, lanes = self.index(gap)
        type_ = lanes.type.element if self.width > 1 else lanes.type
        if type_ == I32:
            lanes = b.sext(lanes, chunk_type(I64, self.width))
        total = b.add(lanes, splat(b, self.scalars.emit(scalar), self.width))
        return b.icmp_signed(">=", total, splat(b, I64(0), self.width))

    # -- indices

    def iota(self, type_: ir.Type, step: int = 1, first: int = 0) -> ir.Constant:
        """first, first + step, ... over the lanes of the chunk (counting from its own start)."""
        return sequence(type_, tuple(first + step * i for i in range(self.width)))

    def index(self, e: Dim) -> tuple[Dim, ir.Value]:
        """(part that all lanes share, vector of i32 or i64 to add to it)."""
        found = self.linear(e)
        if found is not None:
            c, rest = found
            if isinstance(c, int):
                type_ = I32 if abs(c) * self.size < INT32 else I64
                return rest, self.iota(type_, c, c * self.start)
            return rest, self.b.mul(self.iota(I64, 1, self.start), splat(self.b, self.scalars.emit(c), self.width))
        shared: Dim = 0
        lanes: Dim = 0
        if isinstance(e, Expr):
            shared = e.const
            for m, c in e.terms:
                term = Expr(((m, c),), 0)
                if self.varies(term):
                    lanes = lanes + term
                else:
                    shared = shared + term
        return shared, self._vector(lanes)

    def _vector(self, e: Dim) -> ir.Value:
        type_ = I32 if self._narrow(e) else I64
        b = self.b

        def leaf(name: str) -> ir.Value:
            if name == self.position:
                return self.iota(type_, 1, self.start)
            if name in self.vectors:
                value = self.vectors[name]()
                return b.trunc(value, chunk_type(type_, self.width)) if type_ == I32 else value
            value = self.scalars.emit(Expr((((Sym(name),), 1),), 0))
            return splat(b, b.trunc(value, I32) if type_ == I32 else value, self.width)

        def constant(n: int) -> ir.Value:
            return splat(b, ir.Constant(type_, n), self.width)

        def positive_division(quotient: bool) -> Callable[[ir.Value, ir.Value], ir.Value]:
            def go(x: ir.Value, y: ir.Value) -> ir.Value:
                y = b.select(b.icmp_signed("<", y, constant(1)), constant(1), y)
                if type_ == I32:  # _narrow proved that nothing is negative
                    return b.udiv(x, y) if quotient else b.urem(x, y)
                r = b.srem(x, y)
                negative = b.icmp_signed("<", r, constant(0))
                if quotient:
                    q = b.sdiv(x, y)
                    return b.select(negative, b.sub(q, constant(1)), q)
                return b.select(negative, b.add(r, y), r)
            return go

        def pick(relation: str) -> Callable[[ir.Value, ir.Value], ir.Value]:
            return lambda x, y: b.select(b.icmp_signed(relation, x, y), x, y)

        ops = {"add": b.add, "mul": b.mul, "floordiv": positive_division(True), "mod": positive_division(False),
               "max": pick(">"), "min": pick("<")}
        return fold(e, leaf, constant, ops)

    def _narrow(self, e: Dim) -> bool:
        """True if every intermediate value of `e` is known to lie in [0, 2^31)."""
        if isinstance(e, int):
            return 0 <= e < INT32
        facts = self.scalars.facts
        if facts is None:
            return False
        bounded = facts.inside(self.position, 0, self.size - 1)
        low, high = bounded.range_of(e)
        if low is None or high is None or low < 0 or high >= INT32 or any(c < 0 for _, c in e.terms) or e.const < 0:
            return False
        return all(self._narrow(x) for m, _ in e.terms for a in m if isinstance(a, (FloorDiv, Mod, Max, Min)) for x in a.args)
