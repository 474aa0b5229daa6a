"""Sums of squares about the mean in the pass that computes the mean: each lane of a tile keeps its own, and they merge at the end.

On a CPU, in a pipeline of rows (`row_pipeline.py`), all lanes sum d = x - p and d^2 for one p, the mean of the row's first step, and
m2 = sum(d^2) - sum(d)^2 / n. What cancels is the distance of p from the row's mean: sum(d^2) <= (n / k + 1) m2 for k elements of a step, whatever
they are (those k alone are that far off the row's mean on average), and hardly more than m2 for a row that begins as it goes on.

On a GPU, where a division for each step of each lane costs more than memory does, a lane sums d = x - p and d^2 for its first element p, and
m2 = sum(d^2) - sum(d)^2 / n once at the end. As p is one of the elements, sum(d^2) <= (n + 1) m2 whatever they are: what cancels is at most n + 1
roundings of m2 itself, and n is the few elements of one lane (on shifted data: Chan, Golub, LeVeque 1983, algorithms for computing the sample
variance). Where p is infinite the mean becomes NaN, and eager's is infinite (docs/numerics.md): to look at p in every step keeps LLVM from
unrolling the loop, and takes an eighth of the time of a group norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir import Dim, DType, TileType, Value, element_type
from ...ir.expr import as_int
from .emit import Emitter

__all__ = ["about_start", "add_shifted", "initial_shifted", "mean_about", "spread_about", "spread_of_shifted", "sum_of_shifted", "total_about"]


def _initial_count(e: Emitter, dtype: DType, ragged: bool, shape: tuple[int, int]) -> Value:
    """n before the first element: a number, or a tile of `shape` (one that spreads over a tile) where lanes may see different numbers of elements
    (`ragged`)."""
    zero = e.builder.constant(0, dtype)
    return e.broadcast(zero, shape) if ragged else zero


def about_start(e: Emitter, step: Value) -> Value:
    """p of a row whose first step is `step`, of one row of k elements: their mean."""
    t = step.type
    assert isinstance(t, TileType)
    total = e.builder.op("tile.reduce", step, type=TileType((1, 1), t.dtype), axis=1, kind="sum")
    return e.builder.arith("mul", total, 1 / as_int(t.shape[1]))


def total_about(e: Emitter, sums: Value, p: Value, count: Dim) -> Value:
    """The sum of `count` elements x of which x - p sum to `sums`."""
    return e.builder.arith("add", sums, e.builder.arith("mul", p, float(as_int(count))))


def mean_about(e: Emitter, sums: Value, p: Value, count: Dim) -> Value:
    """Their mean: without the rounding of their sum, so that equal elements are at no distance from it."""
    return e.builder.arith("add", p, e.builder.arith("mul", sums, 1 / as_int(count)))


def spread_about(e: Emitter, squares: Value, sums: Value, count: Dim) -> Value:
    """The sum of squares about the mean of `count` elements whose distances from one number sum to `sums`, and their squares to `squares`."""
    b = e.builder
    return b.arith("max", b.arith("sub", squares, b.arith("mul", sums, b.arith("mul", sums, 1 / as_int(count)))), 0)


def initial_shifted(e: Emitter, dtype: DType, ragged: bool, tile: tuple[int, int], shape: tuple[int, int]) -> list[Value]:
    """(sum of d^2, sum of d, p, n) before the first element; see `_initial_count`."""
    zero = e.broadcast(e.builder.constant(0, dtype), tile)
    return [zero, zero, zero, _initial_count(e, dtype, ragged, shape)]


def add_shifted(e: Emitter, x: Value, acc: Sequence[Value], mask: Value | None) -> list[Value]:
    """The same with one more element x per lane."""
    b, (squares, sums, first, n) = e.builder, acc
    first = b.arith("select", b.arith("eq", n, 0), x, first)
    d = b.arith("sub", x, first)
    if mask is not None:
        d = b.arith("select", mask, d, 0)
    return [b.arith("add", squares, b.arith("mul", d, d)), b.arith("add", sums, d), first, _counted(e, n, mask)]


def sum_of_shifted(e: Emitter, acc: Sequence[Value]) -> Value:
    """Per lane, the sum of its elements."""
    _, sums, first, n = acc
    return e.builder.arith("add", sums, e.builder.arith("mul", first, n))


def spread_of_shifted(e: Emitter, acc: Sequence[Value], total: Value, count: Dim) -> Value:
    """Per lane, what it adds to the whole sum of squares about the mean total / count."""
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
