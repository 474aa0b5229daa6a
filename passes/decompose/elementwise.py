"""Elementwise ops: one generic each, with broadcasting as index maps."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...ir import Builder, Operation, Value
from ...ir.dialects.arith import ROWS
from .common import Rule, broadcast_map, pointwise, shape_of, tensor_type

__all__ = ["RULES"]

Scalar = Callable[..., Value]


def _row(name: str) -> Scalar:
    return lambda b, *args: b.arith(name, *args)


def _elementwise(body: Scalar) -> Rule:
    def rule(b: Builder, op: Operation) -> list[Value]:
        return [pointwise(b, shape_of(op.result), op.operands, body, tensor_type(op.result).dtype)]
    return rule


def _exact(name: str) -> Rule:
    """For ops that must see the operands' own type: those that move bits, and those that depend on its spacing."""
    def rule(b: Builder, op: Operation) -> list[Value]:
        shape = shape_of(op.result)
        maps = [broadcast_map(shape_of(v), len(shape)) for v in op.operands]
        return [b.generic(op.operands, maps, shape, lambda i, *args: i.arith(name, *args)).result]
    return rule


def _relu(b: Builder, x: Value) -> Value:
    return b.arith("max", x, 0)


def _silu(b: Builder, x: Value) -> Value:
    return b.arith("mul", x, b.arith("sigmoid", x))


def _gelu(b: Builder, op: Operation) -> list[Value]:
    """Hendrycks and Gimpel, "Gaussian Error Linear Units": x * Phi(x), or the paper's tanh approximation of it."""
    def exact(i: Builder, x: Value) -> Value:
        return i.arith("erf", i.arith("mul", x, math.sqrt(0.5)))

    def approximate(i: Builder, x: Value) -> Value:
        cube = i.arith("mul", i.arith("mul", x, x), x)
        inner = i.arith("add", x, i.arith("mul", cube, 0.044715))
        return i.arith("tanh", i.arith("mul", inner, math.sqrt(2 / math.pi)))

    kernel = approximate if op["approximate"] == "tanh" else exact

    def body(i: Builder, x: Value) -> Value:
        return i.arith("mul", i.arith("mul", x, 0.5), i.arith("add", kernel(i, x), 1.0))

    return [pointwise(b, shape_of(op.result), op.operands, body, tensor_type(op.result).dtype)]


def _require(b: Builder, op: Operation) -> list[Value]:
    shape = shape_of(op.result)
    maps = [broadcast_map(shape_of(v), len(shape)) for v in op.operands]
    return [b.generic(op.operands, maps, shape, lambda i, cond, x: i.op("tensor.require", cond, x, type=x.type, message=op["message"])).result]


RULES: dict[str, Rule] = {
    **{f"graph.{row.name}": _elementwise(_row(row.name)) for row in ROWS},
    "graph.cast": _elementwise(lambda b, x: x),
    "graph.relu": _elementwise(_relu),
    "graph.silu": _elementwise(_silu),
    "graph.gelu": _gelu,
    "graph.require": _require,
    "graph.select": _exact("select"),
    "graph.nextafter": _exact("nextafter"),
}
