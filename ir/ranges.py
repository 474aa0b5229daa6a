"""What is known of index expressions whose symbols have ranges: bounds, comparisons, and the simpler forms that they allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from .expr import (
    _DIM_OPS,
    Atom,
    Dim,
    Expr,
    FloorDiv,
    Max,
    Mod,
    Monomial,
    Sym,
    _atom,
    _make,
    _mul,
    _scale,
    _split_multiple,
    _sum,
    floordiv,
    fold,
    free_symbols,
    maximum,
    minimum,
    mod,
    product,
    sym,
)

__all__ = ["Bounds", "contiguous_linear", "delinearize", "known_less", "known_nonnegative", "lower_bound", "simplify", "split_linear", "upper_bound"]

Bounds = Mapping[str, tuple[Dim | None, Dim | None]]
"""Symbol name -> (smallest value, largest value or None when unbounded), both inclusive."""


def _atom_bounds(a: Atom, bounds: Bounds) -> tuple[Dim | None, Dim | None]:
    if isinstance(a, Sym):
        return bounds.get(a.key, (None, None))
    if isinstance(a, Mod):
        return 0, _sum(a.args[1], 1, -1)
    if isinstance(a, FloorDiv):
        lo, hi = lower_bound(a.args[0], bounds), upper_bound(a.args[0], bounds)
        return (None if lo is None else floordiv(lo, a.args[1])), (None if hi is None else floordiv(hi, a.args[1]))
    if isinstance(a, Max):
        lows = [x for x in (lower_bound(x, bounds) for x in a.args) if isinstance(x, int)]
        highs2 = [upper_bound(x, bounds) for x in a.args]
        high = max(highs2) if all(isinstance(x, int) for x in highs2) else None  # type: ignore[type-var]
        return (max(lows) if lows else None), high
    highs = [x for x in (upper_bound(x, bounds) for x in a.args) if isinstance(x, int)]
    lows2 = [lower_bound(x, bounds) for x in a.args]
    low = min(lows2) if all(isinstance(x, int) for x in lows2) else None  # type: ignore[type-var]
    return low, (min(highs) if highs else None)


def _bound(e: Dim, bounds: Bounds, upper: bool) -> Dim | None:
    if isinstance(e, int):
        return e
    total: Dim = e.const
    for m, c in e.terms:
        term: Dim = c
        want_upper = upper == (c > 0)
        for a in m:
            lo, hi = _atom_bounds(a, bounds)
            chosen = hi if want_upper else lo
            fixed = bounds.keys().isdisjoint(a.symbols)
            if chosen is None and fixed:
                chosen = _atom(a)  # made of sizes only: its own bound, compared symbolically
            if chosen is None:
                return None
            if len(m) > 1 and not (known_nonnegative(lo) if lo is not None else fixed and _atom_nonnegative(a)):
                return None  # the product of bounds is a bound of the product where no factor is negative
            term = _mul(term, chosen)
        total = _sum(total, term, 1)
    return total


def upper_bound(e: Dim, bounds: Bounds) -> Dim | None:
    """An inclusive upper bound of `e`, in terms of symbols that `bounds` does not name (sizes, >= 0); None if unknown."""
    return _bound(e, bounds, True)


def lower_bound(e: Dim, bounds: Bounds) -> Dim | None:
    """An inclusive lower bound of `e`; None if unknown."""
    return _bound(e, bounds, False)


def known_nonnegative(e: Dim) -> bool:
    """True if `e` >= 0 for all non-negative values of its symbols, as far as the signs of its terms tell."""
    if isinstance(e, int):
        return e >= 0
    return e.const >= 0 and all(c > 0 and all(_atom_nonnegative(a) for a in m) for m, c in e.terms)


def _atom_nonnegative(a: Atom) -> bool:
    if isinstance(a, (Sym, Mod)):
        return True
    if isinstance(a, Max):
        return any(known_nonnegative(x) for x in a.args)
    return all(known_nonnegative(x) for x in a.args)


def known_less(a: Dim, b: Dim, bounds: Bounds) -> bool:
    """True if a < b is proved for all symbol values in `bounds` (other symbols: any size >= 0)."""
    gap = lower_bound(_sum(_sum(b, a, -1), 1, -1), bounds)
    return gap is not None and known_nonnegative(gap)


def simplify(e: Dim, bounds: Bounds) -> Dim:
    """An equal expression with divisions and remainders removed where the ranges of the symbols allow it.

    Rules: x // b = 0 and x % b = x for 0 <= x < b; (x // b)*b + x % b = x; ((x // b) % c)*b + x % b = x % (b*c); (x % (b*c)) // b =
    (x // b) % c; splitting as in `floordiv`.
    """
    if isinstance(e, int) or all(isinstance(a, Sym) for m, _ in e.terms for a in m):
        return e
    return _simplified(e, tuple((s, bounds[s]) for s in sorted(free_symbols(e)) if s in bounds))


@lru_cache(maxsize=1 << 14)
def _simplified(e: Expr, ranges: tuple[tuple[str, tuple[Dim | None, Dim | None]], ...]) -> Dim:
    """`simplify`, with the ranges of the expression's own symbols: layers of one shape ask the same again and again."""
    bounds = dict(ranges)

    def divide(a: Dim, b: Dim) -> Dim:
        a = _rejoin(a)
        if isinstance(a, Expr):
            q, r = _split_multiple(a, b)
            if _within(r, b, bounds):
                return q
            whole = _lone_remainder(r, b)
            if whole is not None:
                x, m = whole
                return _sum(q, remainder(divide(x, b), m), 1)
            moved = _shift_remainder(q, r, b, bounds)
            if moved is not None:
                return moved[0]
        return floordiv(a, b)

    def remainder(a: Dim, b: Dim) -> Dim:
        a = _rejoin(a)
        if isinstance(a, Expr):
            q, r = _split_multiple(a, b)
            if _within(r, b, bounds):
                return r
            whole = _lone_remainder(r, b)
            if whole is not None:
                return remainder(whole[0], b)
            moved = _shift_remainder(q, r, b, bounds)
            if moved is not None:
                return moved[1]
        return mod(a, b)

    def pick(larger: bool) -> Callable[[Dim, Dim], Dim]:
        def choose(a: Dim, b: Dim) -> Dim:
            if known_less(a, _sum(b, 1, 1), bounds):
                return b if larger else a
            if known_less(b, _sum(a, 1, 1), bounds):
                return a if larger else b
            return maximum(a, b) if larger else minimum(a, b)
        return choose

    folded = fold(e, sym, lambda n: n, {**_DIM_OPS, "floordiv": divide, "mod": remainder, "max": pick(True), "min": pick(False)})
    return _rejoin(folded)


def _within(r: Dim, b: Dim, bounds: Bounds) -> bool:
    low = lower_bound(r, bounds)
    return low is not None and known_nonnegative(low) and known_less(r, b, bounds)


def _shift_remainder(q: Dim, r: Dim, b: Dim, bounds: Bounds) -> tuple[Dim, Dim] | None:
    """Common factor: (k*x + y) // (k*n) with 0 <= y < k is x // n, and % gives k*(x % n) + y."""
    if not isinstance(r, Expr) or not isinstance(b, int):
        return None
    for k in sorted({abs(c) for _, c in r.terms if abs(c) > 1 and b % abs(c) == 0}, reverse=True):
        high = {m: c // k for m, c in r.terms if c % k == 0}
        low = _make({m: c for m, c in r.terms if c % k}, r.const % k)
        x = _make(high, r.const // k)
        if isinstance(x, Expr) and _within(low, k, bounds):
            inner_q, inner_r = floordiv(x, b // k), mod(x, b // k)
            return _sum(q, simplify(inner_q, bounds), 1), _sum(_scale(simplify(inner_r, bounds), k), low, 1)
    return None


def _lone_remainder(r: Dim, b: Dim) -> tuple[Dim, int] | None:
    """(x, c) if r is x % (b*c)."""
    if not isinstance(r, Expr) or not isinstance(b, int) or b <= 0 or r.const or len(r.terms) != 1:
        return None
    (m, coefficient), = r.terms
    if coefficient != 1 or len(m) != 1 or not isinstance(m[0], Mod):
        return None
    x, n = m[0].args
    return (x, n // b) if isinstance(n, int) and n > b and n % b == 0 else None


def _rejoin(e: Dim) -> Dim:
    """Applies (x // b)*b*k + (x % b)*k = x*k and ((x // b) % c)*b*k + (x % b)*k = (x % (b*c))*k, for any cofactor k."""
    if isinstance(e, int):
        return e
    for m, c in e.terms:
        for a in m:
            if not isinstance(a, Mod):
                continue
            x, b = a.args
            others = list(m)
            others.remove(a)
            cofactor = _make({tuple(others): c}, 0) if others else c
            partner = _mul(_mul(floordiv(x, b), b), cofactor)
            whole = _sum(_mul(x, cofactor), 0, 1)
            candidate = _sum(_sum(_sum(e, partner, -1), Expr(((m, c),), 0), -1), whole, 1)
            size = 0 if isinstance(candidate, int) else _complexity(candidate)
            if size < _complexity(e):
                return _rejoin(candidate)
            joined = _join_remainders(e, m, c, a)
            if joined is not None:
                return _rejoin(joined)
    return e


def _join_remainders(e: Expr, m: Monomial, c: int, low: Mod) -> Dim | None:
    """`e` with ((x // b) % n)*b*k + (x % b)*k as (x % (b*n))*k, where the term `c` times `m` is (x % b)*k; None if there is no such pair."""
    x, b = low.args
    if not isinstance(b, int) or b <= 0:
        return None
    others = list(m)
    others.remove(low)
    above = floordiv(x, b)
    for m2, c2 in e.terms:
        for high in m2:
            if c2 != c * b or not isinstance(high, Mod) or high.args[0] != above or not isinstance(high.args[1], int) or high.args[1] <= 0:
                continue
            rest = list(m2)
            rest.remove(high)
            if rest == others:
                cofactor = _make({tuple(others): c}, 0) if others else c
                without = _sum(_sum(e, Expr(((m, c),), 0), -1), Expr(((m2, c2),), 0), -1)
                return _sum(without, _mul(mod(x, b * high.args[1]), cofactor), 1)
    return None


def _complexity(e: Expr) -> int:
    total = 0
    for m, _ in e.terms:
        total += 1
        for a in m:
            if not isinstance(a, Sym):
                total += 4 + sum(_complexity(x) for x in a.args if isinstance(x, Expr))
    return total


def split_linear(e: Dim, name: str) -> tuple[Dim, Dim] | None:
    """(coefficient, rest) with e == coefficient*name + rest and neither containing `name`; None if `e` is not linear in it."""
    if isinstance(e, int) or name not in free_symbols(e):
        return 0, e
    coefficient: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for m, c in e.terms:
        count = sum(1 for a in m if isinstance(a, Sym) and a.key == name)
        inside = any(not isinstance(a, Sym) and name in a.symbols for a in m)
        if inside or count > 1:
            return None
        if count:
            reduced = tuple(a for a in m if a.key != name)
            coefficient[reduced] = coefficient.get(reduced, 0) + c
        else:
            rest[m] = c
    const = coefficient.pop((), 0)
    return _make(coefficient, const), _make(rest, e.const)


def contiguous_linear(index: Iterable[Dim], shape: Iterable[Dim]) -> Dim:
    """The row-major position of `index` in `shape`."""
    total: Dim = 0
    for i, size in zip(index, shape, strict=True):
        total = _sum(_mul(total, size), i, 1)
    return total


def delinearize(position: Dim, shape: Iterable[Dim]) -> list[Dim]:
    """The index in `shape` of a row-major `position`; the inverse of `contiguous_linear`.

    A position past the end runs on along the first dimension that is longer than one, so that no remainder is taken there.
    """
    sizes = list(shape)
    first = next((k for k, size in enumerate(sizes) if size != 1), 0)
    index: list[Dim] = [0] * first
    for k in range(first, len(sizes)):
        below = product(sizes[k + 1:])
        i = floordiv(position, below)
        index.append(mod(i, sizes[k]) if k > first else i)
    return index
