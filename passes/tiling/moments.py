"""Sums of squares about the mean in the pass that computes the mean: each lane of a tile keeps its own, and they merge at the end.

A lane has seen n elements x with sum s; m2 is the sum of their squares about their mean. See `rescale.about_mean` for the formulae.
"""

from __future__ import annotations

from ...ir import Dim, DType, TileType, Value, element_type
from ...ir.expr import as_int
from .emit import Emitter

__all__ = ["add_second_moment", "initial_count", "spread_of_means"]


def initial_count(e: Emitter, dtype: DType, ragged: bool, shape: tuple[int, int]) -> Value:
    """n before the first element: a number, or a tile of `shape` (one that spreads over a tile) where lanes may see different numbers of elements
    (`ragged`)."""
    zero = e.builder.constant(0, dtype)
    return e.broadcast(zero, shape) if ragged else zero


def add_second_moment(e: Emitter, x: Value, before: Value, after: Value, acc: list[Value], mask: Value | None) -> list[Value]:
    """(m2, n) with one more element x per lane, of which the sum went from `before` to `after`; lanes outside of `mask` do not count."""
    b, (m2, n) = e.builder, acc
    if mask is not None and isinstance(n.type, TileType):
        next_n = b.arith("add", n, b.arith("select", mask, _filled(e, n, 1), 0))
    else:
        next_n = b.arith("add", n, 1)
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


def _filled(e: Emitter, like: Value, value: float) -> Value:
    assert isinstance(like.type, TileType)
    return e.broadcast(e.builder.constant(value, element_type(like.type)), like.type.shape)  # type: ignore[arg-type]
