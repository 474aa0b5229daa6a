"""Tensors out of nothing, and the ops that keep their form on the tensor level."""

from __future__ import annotations

from ...ir import DTYPES, Builder, Expr, Operation, Value
from .common import I64, Rule, index, pointwise, scalar_size, shape_of, tensor_type

__all__ = ["RULES"]

F64 = DTYPES["f64"]


def _full(b: Builder, op: Operation) -> list[Value]:
    t, value = tensor_type(op.result), op["value"]
    if isinstance(value, Expr):
        return [pointwise(b, t.shape, [], lambda i: scalar_size(i, value), t.dtype)]
    return [b.generic([], [], t.shape, lambda i: i.constant(value, t.dtype)).result]


def _iota(b: Builder, op: Operation) -> list[Value]:
    """Integral progressions are exact in i64; others are computed in f64, as torch does on CPUs, and rounded once."""
    t = tensor_type(op.result)
    start, step = (int(n) if isinstance(n, float) and n.is_integer() else n for n in (op["start"], op["step"]))

    def integral(i: Builder) -> Value:
        scaled = index(i, 0) if step == 1 else i.arith("mul", index(i, 0), scalar_size(i, step))
        return scaled if start == 0 else i.arith("add", scaled, scalar_size(i, start))

    def fractional(i: Builder) -> Value:
        first, by = (i.constant(n, F64) if isinstance(n, float) else scalar_size(i, n, F64) for n in (start, step))
        return i.arith("add", i.arith("mul", i.cast(index(i, 0), F64), by), first)

    whole = not isinstance(start, float) and not isinstance(step, float)
    return [pointwise(b, t.shape, [], integral if whole else fractional, t.dtype)]


def _sym(b: Builder, op: Operation) -> list[Value]:
    return [pointwise(b, shape_of(op.result), [], lambda i: scalar_size(i, op["expr"], I64), tensor_type(op.result).dtype)]


def _same_form(b: Builder, op: Operation) -> list[Value]:
    """The op of the same name in the tensor dialect, attributes included."""
    made = b.create("tensor." + op.name.partition(".")[2], op.operands, dict(op.attributes), [r.type for r in op.results])
    return list(made.results)


RULES: dict[str, Rule] = {
    "graph.full": _full, "graph.iota": _iota, "graph.sym": _sym,
    "graph.constant": _same_form, "graph.extern": _same_form, "graph.assign": _same_form,
}
