"""Programs of strategies that need more than the op itself on local shapes.

Each takes a `LocalBuilder`, the original op and its local operands, and gives the local results. Tables that are cut by rows
(embedding, gather, the gradient of both) are read and written by the rank that has the row; the others contribute zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...ir.core import Operation, Value
from ...ir.types import TensorType
from .build import I1, I64, LocalBuilder, tensor_type
from .ring import ring_attention, ring_attention_backward

__all__ = ["PROGRAMS"]


def _own_rows(b: LocalBuilder, index: Value, rows: int) -> tuple[Value, Value]:
    """(index within this rank's `rows` rows, clamped to 0 where it is not there; whether it is there)."""
    offset = b.ew("mul", b.coordinate(), b.full((), rows, I64))
    here = b.ew("sub", index, offset)
    zero = b.full((), 0, I64)
    inside = b.ew("and", b.ew("ge", here, zero, dtype=I1), b.ew("lt", here, b.full((), rows, I64), dtype=I1))
    return b.ew("select", inside, here, zero), inside


def _zero(b: LocalBuilder, like: Value) -> Value:
    dtype = tensor_type(like).dtype
    return b.full((), 0.0 if dtype.is_float else 0, dtype)


def _embedding(b: LocalBuilder, op: Operation, xs: Sequence[Value]) -> list[Value]:
    weight, index = xs
    w, i = tensor_type(weight), tensor_type(index)
    at, inside = _own_rows(b, index, w.shape[0])  # type: ignore[arg-type]
    found = b.b.op("graph.embedding", weight, at, type=TensorType((*i.shape, *w.shape[1:]), w.dtype))
    wide = b.reshape(inside, (*i.shape, *(1,) * (w.rank - 1)))  # type: ignore[arg-type]
    return [b.ew("select", wide, found, _zero(b, found))]


def _gather(b: LocalBuilder, op: Operation, xs: Sequence[Value]) -> list[Value]:
    x, index = xs
    at, inside = _own_rows(b, index, tensor_type(x).shape[op["dim"]])  # type: ignore[arg-type]
    found = b.b.op("graph.gather", x, at, type=TensorType(tensor_type(index).shape, tensor_type(x).dtype), dim=op["dim"])
    return [b.ew("select", inside, found, _zero(b, found))]


def _index_put(b: LocalBuilder, op: Operation, xs: Sequence[Value]) -> list[Value]:
    x, values, index = xs
    at, inside = _own_rows(b, index, tensor_type(x).shape[0])  # type: ignore[arg-type]
    wide = b.reshape(inside, (*tensor_type(index).shape, *(1,) * (tensor_type(x).rank - 1)))  # type: ignore[arg-type]
    kept = b.ew("select", wide, values, _zero(b, values))
    t = tensor_type(x)
    return [b.b.op("graph.index_put", x, kept, at, type=TensorType(t.shape, t.dtype), dims=op["dims"], accumulate=True)]


def _scatter_one(b: LocalBuilder, op: Operation, xs: Sequence[Value]) -> list[Value]:
    """One element per row along `dim` is set: a select by position."""
    x, index, src = xs
    t, d = tensor_type(x), op["dim"]
    rows = t.shape[d]
    offset = b.ew("mul", b.coordinate(), b.full((), rows, I64))
    positions = b.b.op("graph.iota", type=TensorType((rows,), I64))
    positions = b.reshape(positions, [rows if i == d else 1 for i in range(t.rank)])  # type: ignore[misc]
    return [b.ew("select", b.ew("eq", positions, b.ew("sub", index, offset), dtype=I1), src, x)]


def _softmax(b: LocalBuilder, op: Operation, xs: Sequence[Value]) -> list[Value]:
    (x,) = xs
    t, d = tensor_type(x), op["dim"]
    largest = b.all_reduce(b.reduce("amax", x, d), "max")
    shifted = b.ew("sub", x, largest)
    powers = b.ew("exp", shifted)
    total = b.all_reduce(b.reduce("sum", powers, d), "sum")
    made = b.ew("div", powers, total) if op.name == "graph.softmax" else b.ew("sub", shifted, b.ew("log", total))
    assert tensor_type(made).shape == t.shape
    return [made]


def _mean(b: LocalBuilder, op: Operation, xs: Sequence[Value]) -> list[Value]:
    """The mean of one rank's elements, divided by the number of ranks: a term of the mean of all."""
    (x,) = xs
    t = tensor_type(op.result)
    made = b.b.create("graph.mean", [x], dict(op.attributes), [TensorType(t.shape, t.dtype)]).result
    return [b.ew("mul", made, b.full((), 1.0 / b.ranks, t.dtype))]


def _slice_parts(b: LocalBuilder, op: Operation, xs: Sequence[Value]) -> list[Value]:
    (x,) = xs
    whole, local, t = tensor_type(op.operands[0]), tensor_type(x), tensor_type(op.result)
    d = next(i for i, (a, c) in enumerate(zip(whole.shape, local.shape, strict=True)) if a != c)
    starts = tuple(s // b.ranks if i == d else s for i, s in enumerate(op["starts"]))
    shape = tuple(s // b.ranks if i == d else s for i, s in enumerate(t.shape))
    return [b.b.op("graph.slice", x, type=TensorType(shape, t.dtype), starts=starts, steps=op["steps"])]


PROGRAMS: dict[str, Callable[[LocalBuilder, Operation, Sequence[Value]], list[Value]]] = {
    "embedding": _embedding, "gather": _gather, "index_put": _index_put, "scatter_one": _scatter_one, "softmax": _softmax,
    "mean": _mean, "slice_parts": _slice_parts, "ring_attention": ring_attention, "ring_attention_backward": ring_attention_backward,
}
