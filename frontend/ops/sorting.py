"""Sorting: on CPUs kernels of our own for every element type that has an order; on GPUs, and where the number kept depends on data, the library's."""

from __future__ import annotations

from ...ir.core import Value
from ...ir.expr import Dim
from ...ir.types import TensorType
from ..context import I64, Context, typeof
from ..errors import Unsupported
from .table import Lower

LONGEST = (1 << 31) - 1
"""Elements of a row: kernels count them in 32 bits."""


def _sorted(c: Context, x: Value, axis: int, keep: Dim, largest: bool, pick: str = "") -> tuple[Value, Value]:
    t = typeof(x)
    size = t.shape[axis]
    if c.argument(0).is_cuda:
        raise Unsupported("sorting on a GPU: a library routine")
    if t.dtype.kind == "complex" or t.dtype.name.startswith("f8"):
        raise Unsupported(f"sorting {t.dtype}: a library routine")
    if isinstance(size, int) and size > LONGEST:
        raise Unsupported(f"sorting rows of more than {LONGEST} elements: a library routine")
    shape = tuple((1 if pick else keep) if i == axis else n for i, n in enumerate(t.shape))
    attrs = {"dim": axis, "keep": keep, **({} if largest else {"largest": False}), **({"pick": pick} if pick else {})}
    made = c.b.create("graph.sort", [x], attrs, [TensorType(shape, t.dtype), TensorType(shape, I64)])
    return made.results[0], made.results[1]


def sort(c: Context, x: Value, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    """Always stable; NaN is the largest."""
    t = typeof(x)
    if t.rank == 0:
        return x, c.full((), 0, I64)
    axis = c.axis(dim, t.rank)
    return _sorted(c, x, axis, t.shape[axis], descending)


def sort_stable(c: Context, x: Value, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    return sort(c, x, dim, descending)


def topk(c: Context, x: Value, k: Dim, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Value, Value]:
    """One is a maximum or a minimum; more are the first of the row in sorted order, whether or not an order was asked for.

    NaN is the largest: the smallest of floats is no minimum, which is NaN where there is one.
    """
    t = typeof(x)
    if t.rank == 0:
        raise Unsupported("topk of a scalar: a library routine")
    axis = c.axis(dim, t.rank)
    if k == 0:
        shape = tuple(0 if i == axis else n for i, n in enumerate(t.shape))
        return c.full(shape, 0, t.dtype), c.full(shape, 0, I64)
    if k != 1 or (t.dtype.is_float and not largest):
        return _sorted(c, x, axis, c.dim(k), largest)
    axes = c.axes(dim, t.rank)
    value, place = ("amax", "argmax") if largest else ("amin", "argmin")
    return c.reduce(value, x, axes, True), c.reduce(place, x, axes, True, I64)


def _picked(c: Context, x: Value, axis: int, k: int, keepdim: bool, pick: str) -> tuple[Value, Value]:
    """One element along `axis` and its place."""
    value, place = _sorted(c, x, axis, k, False, pick)
    shape = tuple(1 if i == axis else n for i, n in enumerate(typeof(x).shape) if keepdim or i != axis)
    return (value, place) if keepdim else (c.reshape(value, shape), c.reshape(place, shape))


def kthvalue(c: Context, x: Value, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    """The last of the first k; NaN is the largest."""
    t = typeof(x)
    if t.rank == 0:
        return x, c.full((), 0, I64)
    return _picked(c, x, c.axis(dim, t.rank), k, keepdim, "last")


def median(c: Context, x: Value, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    """The lower one of two; a row's first NaN if it has any."""
    t = typeof(x)
    if t.rank == 0:
        return x, c.full((), 0, I64)
    axis = c.axis(dim, t.rank)
    size = t.shape[axis]
    if not isinstance(size, int) or size == 0:
        raise Unsupported("median of a size unknown at compile time, or of nothing: a library routine")
    return _picked(c, x, axis, (size - 1) // 2 + 1, keepdim, "median" if t.dtype.is_float else "last")


def median_of_all(c: Context, x: Value) -> Value:
    t = typeof(x)
    return median(c, c.reshape(x, (c.numel(x, range(t.rank)),)), 0)[0]


ROWS: dict[str, Lower] = {
    "aten.sort.default": sort,
    "aten.sort.stable": sort_stable,
    "aten.topk.default": topk,
    "aten.kthvalue.default": kthvalue,
    "aten.median.dim": median,
    "aten.median.default": median_of_all,
}
