"""Index values as expressions, and proofs about them.

Every index value of a kernel is an expression over a few symbols whose names cannot clash with size symbols:

  %p0, %p1 ...   the program's coordinates on the grid
  %v0, %v1 ...   loop variables, outer loops first
  %x0, %x1 ...   scalars that are only known at run time (loaded or computed)
  %g0, %g1 ...   tiles of such values (gathers)
  t0, t1 ...     the position within the tile

`Resolver` finds these expressions; offsets and masks are then rewritten by them once, before any code is made. `Facts` proves
masks from the ranges of the symbols, eliminating the innermost first: that is what lets most masks vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...ir.core import Operation, Value
from ...ir.expr import Dim, Expr, FloorDiv, Max, Min, Sym, as_int, floordiv, fold, free_symbols, maximum, minimum, mod, substitute, sym
from ...ir.ranges import Bounds, known_nonnegative, lower_bound, simplify
from ...ir.types import ScalarType, TileType

__all__ = ["Access", "Facts", "Loop", "Resolver", "position"]

Pair = tuple[Dim, Dim]
"""(a, b), meaning a < b."""

_INDEX_ARITH = {
    "arith.add": lambda a, b: a + b, "arith.sub": lambda a, b: a - b, "arith.mul": lambda a, b: a * b,
    "arith.max": maximum, "arith.min": minimum,
}
_INDEX_DIVISION = {"arith.floordiv": floordiv, "arith.mod": mod}


def position(axis: int) -> str:
    """The symbol of the position along a tile dimension."""
    return f"t{axis}"


@dataclass(frozen=True)
class Loop:
    """A `tile.for`: its variable's symbol and its range, as expressions."""

    symbol: str
    lower: Dim
    upper: Dim
    step: int
    depth: int

    @property
    def divisible(self) -> bool:
        """True if the step is known to divide the length of the range."""
        return _multiple(self.upper - self.lower, self.step)

    @property
    def trips(self) -> int | None:
        """How often it runs, when that is constant."""
        span = self.upper - self.lower
        return max(0, -(-span // self.step)) if isinstance(span, int) else None

    @property
    def last(self) -> Dim:
        """The largest value of the variable, when the loop runs at all."""
        span = self.upper - self.lower
        if isinstance(span, int):
            return self.lower + max(span - 1, 0) // self.step * self.step
        if self.divisible:
            return self.upper - self.step
        return self.upper - 1


def _multiple(e: Dim, k: int) -> bool:
    return e % k == 0 if isinstance(e, int) else e.const % k == 0 and all(c % k == 0 for _, c in e.terms)


@dataclass(frozen=True)
class Access:
    """The resolved addressing of a load or store (or a bare mask): offset in elements, and all masks as pairs.

    `clamps` are what decides the minima and maxima of the offset in the usual case: `min(m, M - 1)` is m where m < M.
    """

    offset: Dim
    pairs: tuple[Pair, ...]
    shape: tuple[int, ...]

    @cached_property
    def clamps(self) -> tuple[Pair, ...]:
        return tuple(dict.fromkeys(_clamps(self.offset)))

    @property
    def conditions(self) -> tuple[Pair, ...]:
        """Everything that is worth proving."""
        return self.pairs + self.clamps


def _clamps(e: Dim) -> Iterator[Pair]:
    if isinstance(e, int):
        return
    for m, _ in e.terms:
        for a in m:
            for arg in a.args:
                yield from _clamps(arg)
            if isinstance(a, (Min, Max)) and len(a.args) == 2:
                x, y = a.args
                if _varies(y) and not _varies(x):
                    x, y = y, x
                if _varies(x) and not _varies(y):  # x <= y or y <= x
                    yield (x, y + 1) if isinstance(a, Min) else (y, x + 1)


def _varies(e: Dim) -> bool:
    """Depends on the position in the tile or on a loop, not just on the program."""
    return any((s[0] == "t" and s[1:].isdigit()) or s[:2] == "%v" for s in free_symbols(e))


@dataclass
class Resolver:
    """Expressions of a kernel's index values. `values` maps opaque symbols (%x, %g) back to SSA values."""

    kernel: Operation
    exprs: dict[Value, Dim] = field(default_factory=dict)
    loops: dict[Operation, Loop] = field(default_factory=dict)
    accesses: dict[Operation, Access] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    opaque: dict[Value, Dim] = field(default_factory=dict)
    programs: dict[str, tuple[Dim, Dim]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for axis, size in enumerate(self.kernel["grid"]):
            self.programs[f"%p{axis}"] = (0, size - 1)
        self._block(self.kernel, 0)

    def _block(self, parent: Operation, depth: int) -> None:
        for op in parent.body:
            self._op(op, depth)

    def _op(self, op: Operation, depth: int) -> None:
        if op.name == "tile.program_id":
            self.exprs[op.result] = sym(f"%p{op['axis']}")
        elif op.name == "tile.for":
            n = op["indices"]
            env = self._operands(op.operands[:n])
            loop = Loop(f"%v{len(self.loops)}", substitute(op["lower"], env), substitute(op["upper"], env), op["step"], depth)
            self.loops[op] = loop
            self.exprs[op.body.args[0]] = sym(loop.symbol)
            self._block(op, depth + 1)
        elif op.name == "tile.index":
            shape = tuple(op["shape"])
            self.exprs[op.result] = self._at(op["expr"], op.operands, shape)
        elif op.name in ("tile.load", "tile.store"):
            first = {"tile.load": 1, "tile.store": 2}[op.name]
            t = op.result.type if op.name == "tile.load" else op.operands[first - 1].type
            shape = tuple(as_int(n) for n in t.shape) if isinstance(t, TileType) else ()
            env = {**self._operands(op.operands[first:]), **_fixed(shape)}
            pairs = [(substitute(a, env), substitute(b, env)) for a, b in op["mask"]]
            pairs += [(-1, substitute(e, env)) for e in op.attributes.get("mask_low", ())]
            self.accesses[op] = Access(substitute(op["offset"], env), tuple(pairs), shape)
        elif op.name == "tile.prefetch":
            self.accesses[op] = Access(substitute(op["offset"], self._operands(op.operands[1:])), (), ())
        elif op.name == "tile.mask":
            shape = tuple(op["shape"])
            env = {**self._operands(op.operands), **_fixed(shape)}
            self.accesses[op] = Access(0, tuple((substitute(a, env), substitute(b, env)) for a, b in op["mask"]), shape)
        elif op.name.startswith("arith."):
            self._arith(op)

    def _arith(self, op: Operation) -> None:
        """64-bit index arithmetic on scalars stays symbolic."""
        t = op.result.type
        if not isinstance(t, ScalarType) or t.dtype.name not in ("index", "i64"):
            return
        if op.name == "arith.constant":
            self.exprs[op.result] = int(op["value"])
            return
        known = [self.exprs[v] for v in op.operands if v in self.exprs]
        if len(known) < len(op.operands):
            return
        if op.name == "arith.cast":
            self.exprs[op.result] = known[0]
        elif op.name in _INDEX_ARITH:
            self.exprs[op.result] = _INDEX_ARITH[op.name](*known)
        elif op.name in _INDEX_DIVISION and isinstance(known[1], int) and known[1] > 0:
            self.exprs[op.result] = _INDEX_DIVISION[op.name](*known)

    def _at(self, e: Dim, operands: tuple[Value, ...], shape: tuple[int, ...]) -> Dim:
        return substitute(e, {**self._operands(operands), **_fixed(shape)})

    def _operands(self, operands: tuple[Value, ...]) -> dict[str, Dim]:
        return {f"i{k}": self.of(v) for k, v in enumerate(operands)}

    def of(self, value: Value) -> Dim:
        """The expression of an index operand; an opaque symbol where its value is not known."""
        found = self.exprs.get(value, self.opaque.get(value))
        if found is None:
            name = f"%{'g' if isinstance(value.type, TileType) else 'x'}{len(self.values)}"
            self.values[name] = value
            found = self.opaque[value] = sym(name)
        return found


def _fixed(shape: tuple[int, ...]) -> dict[str, Dim]:
    return {position(d): 0 for d, size in enumerate(shape) if size == 1}


@dataclass(frozen=True)
class Facts:
    """What holds at a point of the code: ranges of symbols in layers (innermost first when eliminating) and assumed masks."""

    sizes: Bounds
    programs: Mapping[str, tuple[Dim, Dim]]
    loops: tuple[Mapping[str, tuple[Dim, Dim]], ...] = ()
    assumed: frozenset[tuple[Pair, tuple[int, ...]]] = frozenset()
    signed: frozenset[str] = frozenset()

    def inside(self, symbol: str, lower: Dim, last: Dim) -> Facts:
        """Within a loop whose variable lies in [lower, last]."""
        signed = self.signed if self.nonnegative(lower) else self.signed | {symbol}
        return replace(self, loops=(*self.loops, {symbol: (lower, last)}), signed=signed)

    def assuming(self, masks: frozenset[tuple[Pair, tuple[int, ...]]]) -> Facts:
        """With these masks (pair and tile shape) known to hold, as long as no loop runs its last partial step."""
        return replace(self, assumed=self.assumed | masks)

    def in_tail(self, symbol: str) -> Facts:
        """Where the loop over `symbol` runs its last, partial step: assumptions about its full steps are void."""
        return replace(self,
                       assumed=frozenset(x for x in self.assumed
                                         if symbol not in free_symbols(x[0][0]) | free_symbols(x[0][1])))

    def proves(self, pair: Pair, shape: tuple[int, ...]) -> bool:
        """True if a < b wherever the tile and the loops reach."""
        a, b = pair
        if (pair, shape) in self.assumed:
            return True
        return self.nonnegative(b - a - 1, shape)

    def nonnegative(self, e: Dim, shape: tuple[int, ...] = ()) -> bool:
        return any(self._sizes_nonnegative(g) for g in self._eliminate(e, [_tile(shape), *reversed(self.loops), self.programs]))

    def simplify(self, e: Dim, shape: tuple[int, ...] = ()) -> Dim:
        """`e` with the minima and maxima that are decided here replaced, and divisions simplified."""
        if isinstance(e, int) or all(isinstance(a, Sym) for m, _ in e.terms for a in m):
            return e
        bounds: dict[str, tuple[Dim | None, Dim | None]] = dict(self.sizes)
        for layer in (self.programs, *self.loops, _tile(shape)):
            bounds |= layer
        bounds |= dict.fromkeys([s for s in free_symbols(e) if _opaque(s) or s in self.signed], NOTHING)

        def pick(larger: bool) -> Callable[[Dim, Dim], Dim]:
            def choose(a: Dim, b: Dim) -> Dim:
                if self.proves((a, b + 1), shape):
                    return b if larger else a
                if self.proves((b, a + 1), shape):
                    return a if larger else b
                return maximum(a, b) if larger else minimum(a, b)
            return choose

        ops = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b, "floordiv": floordiv, "mod": mod, "max": pick(True),
               "min": pick(False)}
        return simplify(fold(e, sym, lambda n: n, ops), bounds)

    def program_gap(self, pair: Pair, shape: tuple[int, ...]) -> Dim | None:
        """An expression over %p and sizes alone that is >= 0 only if the mask holds all over the tile, if there is one."""
        a, b = pair
        for gap in self._eliminate(b - a - 1, [_tile(shape), *reversed(self.loops)]):
            if not any(s[0] == "%" and s[1] != "p" for s in free_symbols(gap)):
                return gap
        return None

    def range_of(self, e: Dim, shape: tuple[int, ...] = ()) -> tuple[int | None, int | None]:
        """Constant bounds of `e`, as far as known."""
        low = high = None
        for sign in (1, -1):
            layers: list[Any] = [_tile(shape), *reversed(self.loops), self.programs, self.sizes]
            for g in self._eliminate(e * sign, layers):
                if isinstance(g, int):
                    low, high = (g, high) if sign == 1 else (low, -g)
                    break
        return low, high

    def _sizes_nonnegative(self, gap: Dim) -> bool:
        if not isinstance(gap, int) and any(s[0] == "%" for s in free_symbols(gap)):
            return False
        if known_nonnegative(gap):
            return True
        low = lower_bound(gap, self.sizes)
        return low is not None and known_nonnegative(low)

    def _eliminate(self, gap: Dim, layers: list[Mapping[str, tuple[Dim, Dim]]]) -> Iterator[Dim]:
        """Lower bounds of `gap` after replacing each layer's symbols by their extremes."""
        if not layers or isinstance(gap, int):
            yield from _relax(gap)
            return
        layer = layers[0]
        for relaxed in _relax(gap):
            low: Dim | None = relaxed
            if not isinstance(relaxed, int):
                names = free_symbols(relaxed)
                if names & layer.keys():
                    unknown = dict.fromkeys(filter(_opaque, names), NOTHING)
                    low = None if self._sign_matters(relaxed) else lower_bound(relaxed, {**unknown, **layer})
            if low is not None:
                yield from self._eliminate(low, layers[1:])


    def _sign_matters(self, e: Expr) -> bool:
        """A product with a loop variable that may be negative: bounds of products assume factors >= 0."""
        return bool(self.signed) and any(len(m) > 1 and self.signed & free_symbols(Expr(((m, 1),), 0)) for m, _ in e.terms)


NOTHING: Any = (None, None)
"""The range of a symbol about which nothing is known (a missing entry would mean a size, >= 0)."""


def _opaque(symbol: str) -> bool:
    return symbol[:2] in ("%x", "%g")


def _tile(shape: tuple[int, ...]) -> dict[str, tuple[Dim, Dim]]:
    return {position(d): (0, size - 1) for d, size in enumerate(shape)}


def _relax(gap: Dim) -> Iterator[Dim]:
    """Lower bounds of `gap`: -min(a, b) >= -a, max(a, b) >= a, and -c*(x // c) >= -x; `gap` itself last."""
    if not isinstance(gap, int):
        for m, c in gap.terms:
            if len(m) != 1:
                continue
            atom = m[0]
            term = Expr(((m, c),), 0)
            if (isinstance(atom, Min) and c < 0) or (isinstance(atom, Max) and c > 0):
                for arg in atom.args:
                    yield from _relax(gap - term + arg * c)
                return
            if isinstance(atom, FloorDiv) and isinstance(atom.args[1], int) and c % atom.args[1] == 0:
                d = atom.args[1]
                x = atom.args[0]
                yield from _relax(gap - term + (x if c < 0 else x - (d - 1)) * (c // d))
    yield gap


