"""Normalisations: two passes (mean, then squares of what is left) in the computing type, one rounding at the end."""

from __future__ import annotations

from ...ir import Builder, Dim, DType, Operation, Value
from ...ir.expr import floordiv
from .common import Map, Rule, computing, convert, d, identity, pointwise, reduce, shape_of, tensor_type
from .reduction import Space, divided, over

__all__ = ["RULES"]


def _statistics(b: Builder, x: Value, space: Space, eps: float, wide: DType, centred: bool) -> tuple[Value | None, Value]:
    """(mean or none, 1/sqrt(variance + eps)) over the reduction dimensions; not `centred`: of the mean square."""
    mean = None
    if centred:
        total = reduce(b, space.parallel, space.reduced, [x], [space.read], lambda i, v: i.cast(v, wide), "sum")
        mean = pointwise(b, space.parallel, [total], lambda i, s: divided(i, s, space.count), wide)

    def square(i: Builder, v: Value, *centre: Value) -> Value:
        v = i.cast(v, wide)
        off = i.arith("sub", v, centre[0]) if centre else v
        return i.arith("mul", off, off)

    inputs = [x] if mean is None else [x, mean]
    squares = reduce(b, space.parallel, space.reduced, inputs, [space.read, space.read_again][:len(inputs)], square, "sum")
    rstd = pointwise(b, space.parallel, [squares],
                     lambda i, s: i.arith("rsqrt", i.arith("add", divided(i, s, space.count), eps)), wide)
    return mean, rstd


def _normalised(b: Builder, op: Operation, mean: Value | None, rstd: Value, back: Map, affine: list[Value], affine_map: Map,
                wide: DType) -> Value:
    """(x - mean) * rstd * weight + bias, rounded once."""
    x, out = op.operands[0], tensor_type(op.results[0])
    inputs = [x, rstd, *([] if mean is None else [mean]), *affine]
    statistics = 1 if mean is None else 2

    def body(i: Builder, v: Value, *rest: Value) -> Value:
        v = i.cast(v, wide)
        if mean is not None:
            v = i.arith("sub", v, rest[1])
        v = i.arith("mul", v, rest[0])
        for name, parameter in zip(("mul", "add"), rest[statistics:]):
            v = i.arith(name, v, i.cast(parameter, wide))
        return v

    maps = [identity(out.rank), *[back] * statistics, *[affine_map] * len(affine)]
    return pointwise(b, out.shape, inputs, body, out.dtype, maps=maps)


def _last_dims_norm(centred: bool) -> Rule:
    """layer_norm and rms_norm: over the last `ndims` dimensions, weight and bias of their shape."""
    def rule(b: Builder, op: Operation) -> list[Value]:
        x, *affine = op.operands
        shape, wide = shape_of(x), computing(tensor_type(x).dtype)
        rank = len(shape)
        space = over(shape, range(rank - op["ndims"], rank), keepdim=tensor_type(op.results[-1]).rank == rank)
        mean, rstd = _statistics(b, x, space, op["eps"], wide, centred)
        affine_map = tuple(d(i) for i in range(rank - op["ndims"], rank))
        out = _normalised(b, op, mean, rstd, space.read_back, affine, affine_map, wide)
        statistics = [s for s in (mean, rstd) if s is not None]
        return [out, *(convert(b, s, tensor_type(r).dtype) for s, r in zip(statistics, op.results[1:], strict=True))]
    return rule


def _group_norm(b: Builder, op: Operation) -> list[Value]:
    """The channel is read as group * (C / groups) + c, so no tensor is reshaped. Statistics are [B, groups]."""
    x, *affine = op.operands
    batch, channels, *spatial = shape_of(x)
    groups, wide = op["groups"], computing(tensor_type(x).dtype)
    per_group: Dim = floordiv(channels, groups)
    read = (d(0), d(1) * per_group + d(2), *(d(3 + i) for i in range(len(spatial))))
    space = Space((batch, groups), (per_group, *spatial), read, (d(0), floordiv(d(1), per_group)), identity(2))
    mean, rstd = _statistics(b, x, space, op["eps"], wide, centred=True)
    assert mean is not None
    out = _normalised(b, op, mean, rstd, space.read_back, affine, (d(1),), wide)
    return [out, *(convert(b, s, tensor_type(r).dtype) for s, r in zip((mean, rstd), op.results[1:], strict=True))]


RULES: dict[str, Rule] = {"graph.layer_norm": _last_dims_norm(True), "graph.rms_norm": _last_dims_norm(False),
                          "graph.group_norm": _group_norm}
