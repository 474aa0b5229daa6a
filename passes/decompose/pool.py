"""Windows: max and average pooling of [B, C, *], over the space (b, c, *out; *kernel)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product as combinations

from ...ir import Builder, Dim, Operation, Value, element_type
from ...ir.expr import as_int
from ...ir.types import DTYPES
from .common import (
    I64,
    Map,
    Rule,
    computing,
    d,
    fill_value,
    index,
    lowest,
    pointwise,
    promote,
    reduce,
    scalar_size,
    shape_of,
    simplified,
    tensor_type,
)

__all__ = ["RULES"]


@dataclass(frozen=True)
class _Axis:
    """One spatial dimension of a pooling window."""

    size: Dim
    kernel: int
    stride: int
    padding: int
    dilation: int


def _axes(op: Operation) -> list[_Axis]:
    spatial = shape_of(op.operands[0])[2:]
    dilation = op["dilation"] or (1,) * len(spatial)
    return [_Axis(*a) for a in zip(spatial, op["kernel"], op["stride"], op["padding"], dilation, strict=True)]


def _window(axes: Sequence[_Axis]) -> Map:
    first_kernel = 2 + len(axes)
    at = (d(2 + i) * a.stride - a.padding + d(first_kernel + i) * a.dilation for i, a in enumerate(axes))
    return (d(0), d(1), *at)


def _reads_outside(op: Operation) -> bool:
    return op["ceil_mode"] or any(p != 0 for p in op["padding"])


def _max_pool(b: Builder, op: Operation) -> list[Value | None]:
    """The maximum and its place in one pass. Of equal elements the first wins, as in torch; of NaNs too (in torch the last)."""
    x = op.operands[0]
    t, axes = tensor_type(x), _axes(op)
    out = shape_of(op.results[0])
    wide = computing(t.dtype)
    dims = (*out, *(a.kernel for a in axes))
    with_place = bool(op.results[1].uses)
    known = all(isinstance(a.size, int) for a in axes) and math.prod(as_int(a.size) for a in axes) < 1 << 31
    if with_place and known and t.dtype.is_float and math.prod(a.kernel for a in axes) <= WRITTEN_OUT and all(a.dilation == 1 for a in axes):
        return list(_written_out(b, op, axes))

    def body(i: Builder, v: Value) -> tuple[Value, ...]:
        v = promote(i, v)
        return (v, v) if with_place else (v,)

    combined = b.generic([x], [simplified(_window(axes), dims)], dims, body, reductions=len(axes),
                         combine=("max", "argmax") if with_place else ("max",),
                         fills=(lowest(t.dtype),) if _reads_outside(op) else ())
    values: list[Value | None] = [combined.results[0], None]
    if wide != t.dtype:
        values[0] = pointwise(b, out, [combined.results[0]], lambda i, v: v, t.dtype)
    if with_place:
        values[1] = pointwise(b, out, [combined.results[1]], lambda i, place: _flat_position(i, place, axes), I64)
    return values


WRITTEN_OUT = 16
"""Largest window whose maximum and place are a chain of comparisons in one pointwise op, with places in 32 bits."""


def _written_out(b: Builder, op: Operation, axes: Sequence[_Axis]) -> tuple[Value, Value]:
    """The maximum and its place as `_max_pool` has them, by comparing the elements of each window one after the other."""
    x, out = op.operands[0], shape_of(op.results[0])
    t = tensor_type(x)
    taps = list(combinations(*(range(a.kernel) for a in axes)))
    maps = [simplified((d(0), d(1), *(d(2 + n) * a.stride - a.padding + k for n, (a, k) in enumerate(zip(axes, ks, strict=True)))), out)
            for ks in taps]
    outside = _reads_outside(op)

    def body(i: Builder, *values: Value) -> tuple[Value, Value]:
        best: Value | None = None
        place: Value | None = None
        for ks, given in zip(taps, values, strict=True):
            v, at = promote(i, given), _place_of(i, axes, ks, outside and best is None)
            if best is None or place is None:
                best, place = v, at
                continue
            number = i.arith("bitnot", i.arith("isnan", best))
            more = i.arith("or", i.arith("gt", v, best), i.arith("and", i.arith("isnan", v), number))
            best, place = i.arith("select", more, v, best), i.arith("select", more, at, place)
        assert best is not None and place is not None
        return i.cast(best, t.dtype), i.cast(place, I64)

    made = b.generic([x] * len(maps), maps, out, body, fills=(lowest(t.dtype),) * len(maps) if outside else ())
    return made.results[0], made.results[1]


def _place_of(i: Builder, axes: Sequence[_Axis], ks: Sequence[int], clamped: bool) -> Value:
    """The row-major spatial index of a window's element, i32; `clamped`: of one in the padding, the first one inside."""
    flat: Value | None = None
    for n, (a, k) in enumerate(zip(axes, ks, strict=True)):
        at = i.arith("add", i.arith("mul", index(i, 2 + n), a.stride), k - a.padding)
        at = i.arith("max", at, 0) if clamped else at
        flat = at if flat is None else i.arith("add", i.arith("mul", flat, as_int(a.size)), at)
    assert flat is not None
    return i.cast(flat, DTYPES["i32"])


def _flat_position(i: Builder, place: Value, axes: Sequence[_Axis]) -> Value:
    """The row-major spatial index of the element at `place` of the window.

    Before the first element lies padding; it is chosen only when all of the window is the lowest value, and then the first
    element inside stands for it.
    """
    flat: Value | None = None
    for n, a in enumerate(axes):
        inner = math.prod(x.kernel for x in axes[n + 1:])
        step = place if inner == 1 else i.arith("floordiv", place, inner)
        if n > 0:
            step = i.arith("mod", step, a.kernel)
        at = index(i, 2 + n)
        if a.stride != 1:
            at = i.arith("mul", at, a.stride)
        at = i.arith("add", at, step if a.dilation == 1 else i.arith("mul", step, a.dilation))
        if a.padding:
            at = i.arith("sub", at, a.padding)
            # For at < 0 the first position inside is at mod dilation.
            at = i.arith("max", at, 0) if a.dilation == 1 else i.arith(
                "select", i.arith("lt", at, 0), i.arith("mod", at, a.dilation), at)
        flat = at if flat is None else i.arith("add", i.arith("mul", flat, scalar_size(i, a.size)), at)
    assert flat is not None
    return flat


def _avg_pool(b: Builder, op: Operation) -> list[Value]:
    x, axes = op.operands[0], _axes(op)
    t, out = tensor_type(x), shape_of(op.result)
    fills = (fill_value(0, t.dtype),) if _reads_outside(op) else ()
    total = reduce(b, out, [a.kernel for a in axes], [x], [_window(axes)], lambda _, v: v, "sum", fills=fills)

    def body(i: Builder, s: Value) -> Value:
        divisor = op["divisor"]
        clipped = op["ceil_mode"] or (any(a.padding for a in axes) and not op["count_include_pad"])
        if divisor is None and not clipped:
            divisor = math.prod(a.kernel for a in axes)
        if divisor is not None:
            return i.arith("div", s, divisor) if t.dtype.is_float else i.arith("truncdiv", s, divisor)
        return i.arith("div", s, i.cast(_covered(i, axes, op["count_include_pad"]), element_type(s.type)))

    return [pointwise(b, out, [total], body, t.dtype)]


def _covered(i: Builder, axes: Sequence[_Axis], with_padding: bool) -> Value:
    """How many positions of the window count: those inside the padded input, or inside the input."""
    count: Value | None = None
    for n, a in enumerate(axes):
        start = i.arith("mul", index(i, 2 + n), a.stride)
        start = i.arith("sub", start, a.padding) if a.padding else start
        end = i.arith("min", i.arith("add", start, a.kernel), scalar_size(i, a.size + a.padding))
        if not with_padding and a.padding:
            start, end = i.arith("max", start, 0), i.arith("min", end, scalar_size(i, a.size))
        extent = i.arith("sub", end, start)
        count = extent if count is None else i.arith("mul", count, extent)
    assert count is not None
    return count


RULES: dict[str, Rule] = {"graph.max_pool": _max_pool, "graph.avg_pool": _avg_pool}
