"""Reductions over given dimensions, variance, softmax and running combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir import Builder, Dim, DType, Operation, TensorType, Value, element_type
from ...ir.expr import product
from .common import (
    F64,
    I1,
    Map,
    Rule,
    computing,
    convert,
    d,
    identity,
    move,
    pointwise,
    reduce,
    scalar_size,
    shape_of,
    simplified,
    structured_body,
    tensor_type,
    to_dtype,
)

__all__ = ["RULES", "Space", "divided", "over"]


@dataclass(frozen=True)
class Space:
    """The iteration space of a reduction of a tensor: sizes, and how the tensor and a result without its dimensions are read.

    Kept dimensions stay in `parallel` with size 1, so that keepdim needs no reshape.
    """

    parallel: tuple[Dim, ...]
    reduced: tuple[Dim, ...]
    read: Map        # the tensor, in this space
    read_back: Map   # the reduced result, in the space of the tensor
    read_again: Map  # the reduced result, in this space

    @property
    def count(self) -> Dim:
        """How many elements are combined into one."""
        return product(self.reduced)


def over(shape: Sequence[Dim], dims: Sequence[int], keepdim: bool) -> Space:
    """The space that reduces `dims` of a tensor of `shape`."""
    gone = set(dims)
    kept = [i for i in range(len(shape)) if keepdim or i not in gone]
    parallel = tuple(1 if i in gone else shape[i] for i in kept)
    order = {i: n for n, i in enumerate(dims)}
    place = {i: n for n, i in enumerate(kept)}
    read = tuple(d(len(kept) + order[i]) if i in gone else d(place[i]) for i in range(len(shape)))
    back = tuple(0 if i in gone else d(i) for i in kept)
    again = tuple(0 if size == 1 else d(i) for i, size in enumerate(parallel))
    return Space(parallel, tuple(shape[i] for i in dims), read, back, again)


def divided(i: Builder, total: Value, count: Dim) -> Value:
    """total / count, in a body."""
    return i.arith("div", total, scalar_size(i, count, element_type(total.type)))


def _space(op: Operation) -> Space:
    return over(shape_of(op.operands[0]), op["dims"], op["keepdim"])


def _reduction(kind: str) -> Rule:
    """Floats combine in their computing type and are rounded after; integers combine in the result's type."""
    def rule(b: Builder, op: Operation) -> list[Value]:
        want, space = tensor_type(op.result).dtype, _space(op)
        inside = I1 if kind in ("any", "all") else computing(want)
        total = reduce(b, space.parallel, space.reduced, op.operands, [space.read], lambda i, x: to_dtype(i, x, inside), kind)
        return [convert(b, total, want)]
    return rule


def _arg(kind: str) -> Rule:
    def rule(b: Builder, op: Operation) -> list[Value]:
        space = _space(op)
        return [reduce(b, space.parallel, space.reduced, op.operands, [space.read], lambda _, x: x, kind)]
    return rule


def _mean_of(b: Builder, x: Value, space: Space, wide: DType) -> Value:
    total = reduce(b, space.parallel, space.reduced, [x], [space.read], lambda i, v: i.cast(v, wide), "sum")
    return pointwise(b, space.parallel, [total], lambda i, s: divided(i, s, space.count), wide)


def _mean(b: Builder, op: Operation) -> list[Value]:
    want = tensor_type(op.result).dtype
    return [convert(b, _mean_of(b, op.operands[0], _space(op), computing(want)), want)]


def _var_mean(b: Builder, op: Operation) -> list[Value]:
    """Two passes: the mean, then the squares of what is left."""
    x, space = op.operands[0], _space(op)
    t = tensor_type(op.results[0])
    wide, correction = F64 if op["exact"] else computing(t.dtype), float(op["correction"])
    mean = _mean_of(b, x, space, wide)

    def square(i: Builder, v: Value, centre: Value) -> Value:
        off = i.arith("sub", i.cast(v, wide), centre)
        return i.arith("mul", off, off)

    squares = reduce(b, space.parallel, space.reduced, [x, mean], [space.read, space.read_again], square, "sum")

    def variance(i: Builder, s: Value) -> Value:
        if isinstance(space.count, int):
            return i.arith("div", s, max(space.count - correction, 0))
        freedom = i.arith("sub", scalar_size(i, space.count, wide), correction)
        return i.arith("div", s, i.arith("max", freedom, 0))

    return [pointwise(b, space.parallel, [squares], variance, t.dtype), convert(b, mean, t.dtype)]


def _softmax(b: Builder, op: Operation) -> list[Value]:
    x, space, wide = _along(op)
    shape = shape_of(x)
    m = reduce(b, space.parallel, space.reduced, [x], [space.read], lambda i, v: i.cast(v, wide), "max")
    e = pointwise(b, shape, [x, m], lambda i, v, top: i.arith("exp", i.arith("sub", i.cast(v, wide), top)), wide,
                  maps=(identity(len(shape)), space.read_back))
    total = reduce(b, space.parallel, space.reduced, [e], [space.read], lambda _, v: v, "sum")
    return [pointwise(b, shape, [e, total], lambda i, v, s: i.arith("div", v, s), tensor_type(op.result).dtype,
                      maps=(identity(len(shape)), space.read_back))]


def _log_softmax(b: Builder, op: Operation) -> list[Value]:
    x, space, wide = _along(op)
    shape = shape_of(x)
    m = reduce(b, space.parallel, space.reduced, [x], [space.read], lambda i, v: i.cast(v, wide), "max")

    def shifted(i: Builder, v: Value, top: Value) -> Value:
        return i.arith("sub", i.cast(v, wide), top)

    total = reduce(b, space.parallel, space.reduced, [x, m], [space.read, space.read_again],
                   lambda i, v, top: i.arith("exp", shifted(i, v, top)), "sum")
    back = space.read_back
    return [pointwise(b, shape, [x, m, total], lambda i, v, top, s: i.arith("sub", shifted(i, v, top), i.arith("log", s)),
                      tensor_type(op.result).dtype, maps=(identity(len(shape)), back, back))]


def _along(op: Operation) -> tuple[Value, Space, DType]:
    """Operand, space and computing type of a softmax; a 0-d tensor has no dimension to go along."""
    x = op.operands[0]
    dims = (op["dim"],) if shape_of(x) else ()
    return x, over(shape_of(x), dims, False), computing(tensor_type(op.result).dtype)


def _scan(b: Builder, op: Operation) -> list[Value]:
    """The scanned dimension goes last, and back afterwards."""
    x, t = op.operands[0], tensor_type(op.result)
    if not t.shape:
        return [pointwise(b, (), [x], lambda _, v: v, t.dtype)]
    order = [*(i for i in range(t.rank) if i != op["dim"]), op["dim"]]
    dims = tuple(t.shape[i] for i in order)
    read = tuple(d(order.index(i)) for i in range(t.rank))
    inside = computing(t.dtype)
    region = structured_body(b, [x], [read], lambda i, v: [to_dtype(i, v, inside)])
    scanned = b.create("tensor.scan", [x], {"dims": dims, "maps": (simplified(read, dims),), "kind": op["kind"]},
                       [TensorType(dims, inside)], [region]).result
    if order == list(range(t.rank)):
        return [convert(b, scanned, t.dtype)]
    back: list[Dim] = [d(i) for i in order]
    return [convert(b, move(b, scanned, t.shape, tuple(back)), t.dtype)]


def _sort(b: Builder, op: Operation) -> list[Value]:
    """The sorted dimension goes last, and back afterwards."""
    x, t = op.operands[0], tensor_type(op.operands[0])
    order = [*(i for i in range(t.rank) if i != op["dim"]), op["dim"]]
    dims = tuple(t.shape[i] for i in order)
    read = tuple(d(order.index(i)) for i in range(t.rank))
    region = structured_body(b, [x], [read], lambda i, v: [v])
    shape = (*dims[:-1], 1 if op["pick"] else op["keep"])
    attrs = {"dims": dims, "maps": (simplified(read, dims),), "keep": op["keep"], "largest": op["largest"], "pick": op["pick"]}
    made = b.create("tensor.sort", [x], attrs,
                    [TensorType(shape, t.dtype), TensorType(shape, tensor_type(op.results[1]).dtype)], [region])
    if order == list(range(t.rank)):
        return list(made.results)
    back: tuple[Dim, ...] = tuple(d(i) for i in order)
    return [move(b, r, tensor_type(old).shape, back) for r, old in zip(made.results, op.results, strict=True)]


RULES: dict[str, Rule] = {
    "graph.sum": _reduction("sum"), "graph.prod": _reduction("prod"), "graph.amax": _reduction("max"),
    "graph.amin": _reduction("min"), "graph.any": _reduction("any"), "graph.all": _reduction("all"),
    "graph.argmax": _arg("argmax"), "graph.argmin": _arg("argmin"),
    "graph.mean": _mean, "graph.var_mean": _var_mean, "graph.softmax": _softmax, "graph.log_softmax": _log_softmax,
    "graph.scan": _scan, "graph.sort": _sort,
}
