"""Gathers, scatters and advanced indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...ir.core import Value
from ...ir.expr import Dim
from ...ir.types import TensorType
from ..bags import MODES
from ..context import F32, I1, I64, Context, like, typeof
from ..dtypes import TO_TORCH
from ..errors import Unsupported
from ..extern import make_extern
from .table import Lower


def _indices(c: Context, x: Value, indices: Sequence[Value | None]) -> tuple[tuple[int, ...], list[Value]]:
    """The indexed dimensions and their i64 index tensors. A mask of truth values would make the shape depend on data."""
    dims = tuple(i for i, index in enumerate(indices) if index is not None)
    given = [index for index in indices if index is not None]
    if any(typeof(i).dtype.name in ("i1", "u8") for i in given):
        raise Unsupported("indexing with a mask: the shape depends on data")
    return dims, [c.cast(i, I64) for i in given]


def index(c: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    if typeof(x).dtype.kind == "complex":
        raise Unsupported("complex numbers")
    dims, given = _indices(c, x, indices)
    return c.b.op("graph.index", x, *given, type=c.out(), dims=dims)


def index_put(c: Context, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False, *_: Any) -> Value:
    given = [i for i in indices if i is not None]
    if len(given) == 1 and typeof(given[0]).dtype == I1:
        return _masked_put(c, x, indices, given[0], values, accumulate)
    dims, tensors = _indices(c, x, indices)
    values = c.cast(values, typeof(x).dtype)
    extra = {"accumulate": True} if accumulate else {}
    return c.b.op("graph.index_put", x, values, *tensors, type=like(x), dims=dims, **extra)


def _masked_put(c: Context, x: Value, indices: Sequence[Value | None], mask: Value, values: Value, accumulate: bool) -> Value:
    """x[.., mask, ..] = values, where the values are the same for every true element: a select."""
    start = next(i for i, index in enumerate(indices) if index is not None)
    rank, covered = typeof(x).rank, typeof(mask).rank
    trailing = rank - start - covered
    if typeof(values).rank > trailing and any(s != 1 for s in typeof(values).shape[:typeof(values).rank - trailing]):
        raise Unsupported("a masked assignment of different values to different elements")
    values = c.reshape(values, typeof(values).shape[max(typeof(values).rank - trailing, 0):])
    wide = c.reshape(mask, (*typeof(mask).shape, *(1,) * trailing))
    new = c.cast(values, typeof(x).dtype)
    return c.ew("select", wide, c.ew("add", x, new) if accumulate else new, x)


def embedding(c: Context, weight: Value, indices: Value, *_: Any) -> Value:
    return c.b.op("graph.embedding", weight, c.cast(indices, I64), type=c.out())


def bags(c: Context, weight: Value, indices: Value, starts: Value, scales: Value | None, mode: int, padding: int | None, closed: bool) -> Value:
    """`aicc::bags`; `closed` follows from the sizes."""
    given = [] if scales is None else [scales]
    return c.b.op("graph.bags", weight, indices, c.cast(starts, I64), *given, type=c.out(), kind=MODES[mode], padding=padding)


def gather(c: Context, x: Value, dim: int, at: Value, *, sparse_grad: bool = False) -> Value:
    if typeof(x).rank == 0 or typeof(at).rank == 0:
        return c.expand(c.reshape(x, ()), c.shape) if typeof(x).rank == 0 else c.reshape(
            c.b.op("graph.take", x, c.reshape(c.cast(at, I64), (1,)), type=TensorType((1,), c.dtype), dim=0), c.shape)
    return c.b.op("graph.gather", x, c.cast(at, I64), type=c.out(), dim=c.axis(dim, typeof(x).rank))


def index_select(c: Context, x: Value, dim: int, at: Value) -> Value:
    if typeof(x).rank == 0:
        return c.reshape(x, c.shape)
    at = c.reshape(c.cast(at, I64), (c.shape[c.axis(dim, typeof(x).rank)],))
    return c.b.op("graph.take", x, at, type=c.out(), dim=c.axis(dim, typeof(x).rank))


# -- scatters ---------------------------------------------------------------------------------------------------------


def _scatter(c: Context, x: Value, dim: int, at: Value, src: Any, reduce: str) -> Value:
    at = c.cast(at, I64)
    if not isinstance(src, Value):
        src = c.expand(c.scalar(src, typeof(x).dtype), typeof(at).shape)
    src = c.cast(src, typeof(x).dtype)
    rank = typeof(x).rank
    if rank == 0:
        one = (1,)
        made = _scatter(c, c.reshape(x, one), 0, c.reshape(at, one), c.reshape(src, one), reduce)
        return c.reshape(made, ())
    if typeof(at).rank == 0:
        at, src = c.reshape(at, (1,)), c.reshape(src, (1,))
    return c.b.op("graph.scatter", x, at, _cut(c, src, typeof(at).shape), type=like(x), dim=c.axis(dim, rank),
                  **({} if reduce == "set" else {"reduce": reduce}))


def _cut(c: Context, src: Value, shape: Sequence[Dim]) -> Value:
    """The part of `src` that torch reads: as much as the index covers."""
    for i, size in enumerate(shape):
        src = c.slice(src, i, 0, size)
    return src


_REDUCE = {"add": "add", "multiply": "mul", "sum": "add", "prod": "mul", "amax": "amax", "amin": "amin"}


def scatter(c: Context, x: Value, dim: int, at: Value, src: Any, *, reduce: str | None = None) -> Value:
    return _scatter(c, x, dim, at, src, "set" if reduce is None else _REDUCE[reduce])


def scatter_add(c: Context, x: Value, dim: int, at: Value, src: Value) -> Value:
    return _scatter(c, x, dim, at, src, "add")


def scatter_reduce(c: Context, x: Value, dim: int, at: Value, src: Value, reduce: str, *, include_self: bool = True) -> Value:
    """The mean divides the sum by how many elements met; without `include_self`, touched elements start neutral."""
    t = typeof(x)
    kind = _REDUCE["sum" if reduce == "mean" else reduce]
    if not include_self:
        x = _scatter(c, x, dim, at, _neutral(kind, t), "set")
    total = _scatter(c, x, dim, at, src, kind)
    if reduce != "mean":
        return total
    if not t.dtype.is_float:
        met = _scatter(c, c.full(t.shape, int(include_self), I64), dim, at, c.full(typeof(at).shape, 1, I64), "add")
        return c.ew("floordiv", total, c.cast(c.ew("max", met, 1), t.dtype))
    ones = c.full(typeof(at).shape, 1.0, F32)
    count = _scatter(c, c.full(t.shape, 1.0 if include_self else 0.0, F32), dim, at, ones, "add")
    work = F32 if t.dtype.bits < 32 else t.dtype
    return c.cast(c.ew("div", c.cast(total, work), c.cast(c.ew("max", count, 1.0), work)), t.dtype)


def _neutral(kind: str, t: TensorType) -> Any:
    if kind == "add":
        return 0
    if kind == "mul":
        return 1
    if t.dtype.is_float:
        return float("-inf") if kind == "amax" else float("inf")
    if t.dtype == I1:
        return kind == "amin"
    limits = torch.iinfo(TO_TORCH[t.dtype])
    return limits.min if kind == "amax" else limits.max


def index_reduce(c: Context, x: Value, dim: int, at: Value, src: Value, reduce: str, *, include_self: bool = True) -> Value:
    """scatter_reduce with one index for a whole slice."""
    rank = typeof(x).rank
    if rank == 0:
        return c.reshape(index_reduce(c, c.reshape(x, (1,)), 0, c.reshape(at, (1,)), c.reshape(src, (1,)), reduce,
                                      include_self=include_self), ())
    axis = c.axis(dim, rank)
    shape = typeof(src).shape
    wide = c.expand(c.reshape(c.cast(at, I64), [shape[axis] if i == axis else 1 for i in range(rank)]), shape)
    return scatter_reduce(c, x, axis, wide, src, reduce, include_self=include_self)


def index_add(c: Context, x: Value, dim: int, at: Value, src: Value, *, alpha: Any = 1) -> Value:
    src = src if alpha == 1 else c.ew("mul", src, alpha)
    return _put_along(c, x, dim, _from_front(c, x, dim, at), src, accumulate=True)


def index_copy(c: Context, x: Value, dim: int, at: Value, src: Value) -> Value:
    return _put_along(c, x, dim, _from_front(c, x, dim, at), src, accumulate=False)


def _from_front(c: Context, x: Value, dim: int, at: Value) -> Value:
    """Indices that must not count from the end: a negative one is moved out of range, where it is reported."""
    rank = typeof(x).rank
    size = c.scalar(typeof(x).shape[c.axis(dim, rank)] if rank else 1, I64)
    at = c.cast(at, I64)
    return c.ew("select", c.ew("lt", at, 0), size, at)


def index_fill(c: Context, x: Value, dim: int, at: Value, value: Any) -> Value:
    return _put_along(c, x, dim, at, c.scalar(value, typeof(x).dtype), accumulate=False)


def _put_along(c: Context, x: Value, dim: int, at: Value, src: Value, accumulate: bool) -> Value:
    t = typeof(x)
    at = c.cast(at, I64)
    if t.rank == 0:
        line = _put_along(c, c.reshape(x, (1,)), 0, c.reshape(at, (c.numel(at, range(typeof(at).rank)),)), c.reshape(src, (1,)), accumulate)
        return c.reshape(line, ())
    at = c.reshape(at, (1,)) if typeof(at).rank == 0 else at
    if typeof(src).rank not in (0, t.rank):
        raise Unsupported("an indexed write of another rank")
    return c.b.op("graph.index_put", x, c.cast(src, t.dtype), at, type=like(x), dims=(c.axis(dim, t.rank),),
                  **({"accumulate": True} if accumulate else {}))


def put(c: Context, x: Value, at: Value, src: Value, accumulate: bool = False) -> Value:
    """Writes to the flattened tensor; negative places count from the end."""
    flat = c.reshape(x, (c.numel(x, range(typeof(x).rank)),))
    count = c.numel(at, range(typeof(at).rank))
    made = c.b.op("graph.index_put", flat, c.reshape(c.cast(src, typeof(x).dtype), (count,)), c.reshape(c.cast(at, I64), (count,)),
                  type=like(flat), dims=(0,), **({"accumulate": True} if accumulate else {}))
    return c.reshape(made, typeof(x).shape)


def masked_scatter(c: Context, x: Value, mask: Value, src: Value) -> Value:
    """The n-th true element takes src[n]: n is a running count of the mask. RuntimeError when there are not as many."""
    shape = c.shape
    if not shape:
        shape, x, mask = (1,), c.reshape(x, (1,)), c.reshape(mask, (1,))
    x = c.expand(x, shape)
    t = typeof(x)
    count = c.numel(x, range(t.rank))
    wide = c.expand(c.cast(mask, I1), t.shape)
    flat = c.reshape(c.cast(wide, I64), (count,))
    order = c.ew("sub", c.b.op("graph.scan", flat, type=like(flat), dim=0, kind="sum"), 1)
    items = c.numel(src, range(typeof(src).rank))
    enough = c.ew("lt", order, c.scalar(items, I64))
    order = c.ew("require", enough, order, message="masked_scatter: the mask has more true elements than the source has elements")
    if items == 0:
        return c.reshape(c.ew("select", c.ew("lt", c.reshape(order, t.shape), 0), x, c.full((), 0, t.dtype)), c.shape)
    source = c.reshape(src, (items,))
    if not isinstance(items, int):  # there may be none: then what nobody selects is read behind the end
        source, items = c.pad(source, [0], [1], 0), items + 1
    at = c.ew("min", c.ew("max", order, 0), c.scalar(items - 1, I64))
    taken = c.b.op("graph.take", source, at, type=TensorType((count,), typeof(src).dtype), dim=0)
    return c.reshape(c.ew("select", wide, c.reshape(taken, t.shape), x), c.shape)


# -- counting: library routines -----------------------------------------------------------------------------


def native_dropout(c: Context, x: Value, p: float, train: bool | None) -> tuple[Value, Value]:
    """The mask is drawn by ATen from the global generator, as eager does; the rest is compiled."""
    t = typeof(x)
    if train is False or p == 0:
        return x, c.full(t.shape, True, I1)
    if p == 1:
        return c.full(t.shape, 0, t.dtype), c.full(t.shape, False, I1)
    like = c.full(t.shape, 0.0, F32)
    drawn, = make_extern(c, "aten.bernoulli.p", [like], ({"operand": 0}, 1 - p), {}, [typeof(like)], ["tensor"], random=True,
                         reason="random numbers come from torch's generator")
    mask = c.cast(drawn, I1)
    work = F32 if t.dtype.name in ("bf16", "f16") else t.dtype
    scaled = c.ew("mul", c.ew("mul", c.cast(x, work), c.cast(drawn, work)), 1 / (1 - p))
    return c.cast(scaled, t.dtype), mask


def take(c: Context, x: Value, at: Value) -> Value:
    """Elements of the flattened source; negative places count from the end."""
    if typeof(x).dtype.kind == "complex":
        raise Unsupported("complex numbers")
    flat = c.reshape(x, (c.numel(x, range(typeof(x).rank)),))
    at = c.cast(at, I64)
    line = at if typeof(at).rank else c.reshape(at, (1,))
    return c.reshape(c.b.op("graph.index", flat, line, type=TensorType(typeof(line).shape, c.dtype), dims=(0,)), c.shape)


ROWS: dict[str, Lower] = {
    "aten.index.Tensor": index,
    "aten._unsafe_index.Tensor": index,
    "aten.take.default": take,
    "aten.index_put.default": index_put,
    "aten._unsafe_index_put.default": index_put,
    "aten.embedding.default": embedding,
    "aicc.bags.default": bags,
    "aten.gather.default": gather,
    "aten.index_select.default": index_select,
    "aten.scatter.src": scatter,
    "aten.scatter.value": scatter,
    "aten.scatter.reduce": scatter,
    "aten.scatter.value_reduce": scatter,
    "aten.scatter_add.default": scatter_add,
    "aten.scatter_reduce.two": scatter_reduce,
    "aten.index_add.default": index_add,
    "aten.index_copy.default": index_copy,
    **{f"aten.index_fill.{o}": index_fill for o in ("int_Scalar", "int_Tensor")},
    "aten.index_reduce.default": index_reduce,
    "aten.put.default": put,
    "aten.masked_scatter.default": masked_scatter,
    "aten.native_dropout.default": native_dropout,
}
