"""Sums of squares about the mean in the pass that computes the mean: each lane of a tile keeps its own, and they merge at the end.

On a CPU a lane has seen n elements x with sum s, and m2 is the sum of their squares about their mean (`rescale.about_mean` has the formulae).

On a GPU, where a division for each step of each lane costs more than memory does, a lane sums d = x - p and d^2 for its first element p, and
m2 = sum(d^2) - sum(d)^2 / n once at the end. As p is one of the elements, sum(d^2) <= (n + 1) m2 whatever they are: what cancels is at most n + 1
roundings of m2 itself, and n is the few elements of one lane (on shifted data: Chan, Golub, LeVeque 1983, algorithms for computing the sample
variance). Where the first element is not finite p is 0, so that the mean is infinite or NaN as the sum of the elements is. Lanes' first elements are
read once more, before the loops: to choose p within them took an eighth of the time of a group norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir import Dim, DType, TileType, Value, element_type
from ...ir.expr import as_int
from .emit import Emitter

__all__ = ["add_second_moment", "add_shifted", "initial_count", "initial_shifted", "spread_of_means", "spread_of_shifted",
           "sum_of_shifted"]


def initial_count(e: Emitter, dtype: DType, ragged: bool, shape: tuple[int, int]) -> Value:
    """n before the first element: a number, or a tile of `shape` (one that spreads over a tile) where lanes may see different numbers of elements
    (`ragged`)."""
    zero = e.builder.constant(0, dtype)
    return e.broadcast(zero, shape) if ragged else zero


def add_second_moment(e: Emitter, x: Value, before: Value, after: Value, acc: Sequence[Value], mask: Value | None) -> list[Value]:
    """(m2, n) with one more element x per lane, of which the sum went from `before` to `after`; lanes outside of `mask` do not count."""
    b, (m2, n) = e.builder, acc
    next_n = _counted(e, n, mask)
    old = b.arith("mul", before, b.arith("div", 1, b.arith("max", n, 1)))
    new = b.arith("mul", after, b.arith("div", 1, b.arith("max", next_n, 1)))
    step = b.arith("mul", b.arith("sub", x, old), b.arith("sub", x, new))
    if mask is not None:
        step = b.arith("select", mask, step, 0)
    return [b.arith("add", m2, step), next_n]


def spread_of_means(e: Emitter, m2: Value, s: Value, n: Value, total: Value, count: Dim) -> Value:
    """Per lane, what it adds to the whole sum of squares about the mean total / count: m2 + n * (s / n - mean)^2."""
    b = e.builder
    mean = b.arith("div", total, float(as_int(count)))
    apart = b.arith("sub", b.arith("div", s, b.arith("max", n, 1)), mean)
    return b.arith("add", m2, b.arith("mul", n, b.arith("mul", apart, apart)))


def initial_shifted(e: Emitter, first: Value, ragged: bool, tile: tuple[int, int], shape: tuple[int, int]) -> list[Value]:
    """(sum of d^2, sum of d, p, n) before the first element of each lane, which is `first`; see `initial_count`."""
    b, dtype = e.builder, element_type(first.type)
    zero = e.broadcast(b.constant(0, dtype), tile)
    shift = b.arith("select", b.arith("lt", b.arith("abs", first), float("inf")), first, 0)
    if not isinstance(shift.type, TileType) or shift.type.shape != tile:
        shift = e.broadcast(shift, tile)
    return [zero, zero, shift, initial_count(e, dtype, ragged, shape)]


def add_shifted(e: Emitter, x: Value, acc: Sequence[Value], mask: Value | None) -> list[Value]:
    """The same with one more element x per lane."""
    b, (squares, sums, first, n) = e.builder, acc
    d = b.arith("sub", x, first)
    if mask is not None:
        d = b.arith("select", mask, d, 0)
    return [b.arith("add", squares, b.arith("mul", d, d)), b.arith("add", sums, d), first, _counted(e, n, mask)]


def sum_of_shifted(e: Emitter, acc: Sequence[Value]) -> Value:
    """Per lane, the sum of its elements."""
    _, sums, first, n = acc
    return e.builder.arith("add", sums, e.builder.arith("mul", first, n))


def spread_of_shifted(e: Emitter, acc: Sequence[Value], total: Value, count: Dim) -> Value:
    """As `spread_of_means`."""
    b, (squares, sums, first, n) = e.builder, acc
    offset = b.arith("div", sums, b.arith("max", n, 1))  # of the lane's mean from p
    own = b.arith("max", b.arith("sub", squares, b.arith("mul", sums, offset)), 0)
    apart = b.arith("add", b.arith("sub", first, b.arith("div", total, float(as_int(count)))), offset)
    return b.arith("add", own, b.arith("mul", n, b.arith("mul", apart, apart)))


def _counted(e: Emitter, n: Value, mask: Value | None) -> Value:
    """n where one more element of each lane within `mask` has been seen."""
    if mask is not None and isinstance(n.type, TileType):
        return e.builder.arith("add", n, e.builder.arith("select", mask, _filled(e, n, 1), 0))
    return e.builder.arith("add", n, 1)


def _filled(e: Emitter, like: Value, value: float) -> Value:
    assert isinstance(like.type, TileType)
    return e.broadcast(e.builder.constant(value, element_type(like.type)), like.type.shape)  # type: ignore[arg-type]
