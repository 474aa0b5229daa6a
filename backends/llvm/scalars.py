"""Scalar index code: expressions become 64-bit integer instructions, and addresses, each placed in the outermost scope that
knows its symbols.

A `Scope` is the function, one program of the grid, or one loop body. Its `hoist` block is already ended by a branch, so that
instructions can be added to it at any time while the body is being made; what is emitted there is cached by expression.
Sums are split by scope: `p*4096 + r*s0 + k` adds the parts outer to inner, so that a loop only adds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from llvmlite import ir

from ...ir.expr import Dim, Expr, FloorDiv, Max, Min, Mod, Sym, free_symbols
from .symbolic import Facts
from .values import I64

__all__ = ["ScalarEmitter", "Scope", "at_block"]


@dataclass
class Scope:
    """Where the symbols in `symbols` become known. `cache` maps expressions and addresses to values made in `hoist`."""

    symbols: dict[str, ir.Value]
    hoist: ir.Block
    cache: dict[object, ir.Value] = field(default_factory=dict)


@contextmanager
def at_block(b: ir.IRBuilder, block: ir.Block) -> Iterator[None]:
    """Builds at the end of `block`, before its terminator if it has one. May nest."""
    before = b.block
    _to_end(b, block)
    yield
    _to_end(b, before)


def _to_end(b: ir.IRBuilder, block: ir.Block) -> None:
    if block.is_terminated:
        b.position_before(block.terminator)
    else:
        b.position_at_end(block)


class ScalarEmitter:
    """Emits index expressions. `opaque(name)` gives the value of a symbol that no scope knows, at the current position."""

    def __init__(self, builder: ir.IRBuilder, opaque: Callable[[str], ir.Value]):
        self.b = builder
        self.opaque = opaque
        self.scopes: list[Scope] = []
        self.facts: Facts | None = None

    @contextmanager
    def scope(self, symbols: dict[str, ir.Value], name: str) -> Iterator[None]:
        """Opens a scope at the current position: a hoist block, then a new block where building goes on."""
        hoist = self.b.append_basic_block(f"{name}.hoist")
        body = self.b.append_basic_block(f"{name}.body")
        self.b.branch(hoist)
        self.b.position_at_end(hoist)
        self.b.branch(body)
        self.b.position_at_end(body)
        self.scopes.append(Scope(symbols, hoist))
        yield
        self.scopes.pop()

    def depth(self, e: Dim) -> int | None:
        """Index of the innermost scope that `e` depends on; None if it depends on a run-time value."""
        deepest = 0
        for s in free_symbols(e):
            for d in range(len(self.scopes) - 1, -1, -1):
                if s in self.scopes[d].symbols:
                    deepest = max(deepest, d)
                    break
            else:
                return None
        return deepest

    @contextmanager
    def _hoisted(self, depth: int | None) -> Iterator[dict[object, ir.Value]]:
        """Builds in the scope at `depth` (here when None); gives the cache that holds there."""
        if depth is None:
            yield {}
            return
        scope = self.scopes[depth]
        with at_block(self.b, scope.hoist):
            yield scope.cache

    def emit(self, e: Dim) -> ir.Value:
        """The i64 value of `e`."""
        if isinstance(e, int):
            return I64(e)
        depth = self.depth(e)
        with self._hoisted(depth) as cache:
            if e not in cache:
                cache[e] = self._sum(e)
            return cache[e]

    def _split(self, e: Expr) -> list[Dim]:
        """The parts of a sum by scope, outer scopes first; the constant apart and last."""
        groups: dict[int, Dim] = {}
        for m, c in e.terms:
            term = Expr(((m, c),), 0)
            depth = self.depth(term)
            key = len(self.scopes) if depth is None else depth
            groups[key] = groups.get(key, 0) + term
        return [groups[k] for k in sorted(groups)] + ([e.const] if e.const else [])

    def _sum(self, e: Expr) -> ir.Value:
        parts = self._split(e)
        if len(parts) > 1:
            total = self.emit(parts[0])
            for part in parts[1:]:
                total = self.b.add(total, self.emit(part), flags=("nsw",))
            return total
        total = None
        for m, c in e.terms:
            value = self._atom(m[0])
            for a in m[1:]:
                value = self.b.mul(value, self._atom(a), flags=("nsw",))
            if c != 1:
                value = self.b.mul(value, I64(c), flags=("nsw",))
            total = value if total is None else self.b.add(total, value, flags=("nsw",))
        return total

    def _atom(self, a: object) -> ir.Value:
        b = self.b
        if isinstance(a, Sym):
            for scope in reversed(self.scopes):
                if a.key in scope.symbols:
                    return scope.symbols[a.key]
            return self.opaque(a.key)
        if isinstance(a, (FloorDiv, Mod)):
            return self._divide(a)
        assert isinstance(a, (Max, Min))
        relation = ">" if isinstance(a, Max) else "<"
        value = self.emit(a.args[0])
        for arg in a.args[1:]:
            other = self.emit(arg)
            value = b.select(b.icmp_signed(relation, value, other), value, other)
        return value

    def _divide(self, a: FloorDiv | Mod) -> ir.Value:
        b = self.b
        x, y = self.emit(a.args[0]), self.emit(a.args[1])
        if not isinstance(a.args[1], int):  # hoisted code may run where the divisor is an empty size
            y = b.select(b.icmp_signed("<", y, I64(1)), I64(1), y)
        wants_quotient = isinstance(a, FloorDiv)
        if self.facts is not None and self.facts.nonnegative(a.args[0]):
            return b.udiv(x, y) if wants_quotient else b.urem(x, y)
        r = b.srem(x, y)
        negative = b.icmp_signed("<", r, I64(0))
        if not wants_quotient:
            return b.select(negative, b.add(r, y), r)
        q = b.sdiv(x, y)
        return b.select(negative, b.sub(q, I64(1)), q)

    def address(self, base: ir.Value, element: ir.Type, offset: Dim) -> ir.Value:
        """base + offset elements. Constant parts come last, so that they fold into the instruction's displacement."""
        if isinstance(offset, int):
            return base if offset == 0 else self.b.gep(base, [I64(offset)], source_etype=element)
        pointer = base
        so_far: Dim = 0
        for part in self._split(offset):
            so_far = so_far + part
            with self._hoisted(self.depth(so_far)) as cache:
                key = (id(base), str(element), so_far)
                if key not in cache:
                    cache[key] = self.b.gep(pointer, [self.emit(part)], source_etype=element)
                pointer = cache[key]
        return pointer
