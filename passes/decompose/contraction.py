"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir import Builder, Dim, Operation, Value
from .common import Map, Rule, convert, d, reduce, shape_of, tensor_type, to_dtype

__all__ = ["RULES", "contract"]


def contract(b: Builder, op: Operation, parallel: Sequence[Dim], reduced: Sequence[Dim], inputs: Sequence[Value],
             maps: Sequence[Map], fills: Sequence[Any] = ()) -> Value:
    """The sum of products of two operands, in the type of the op's first result.

    Floats accumulate in their computing type; integers in the result's.
    """
    want = tensor_type(op.results[0]).dtype

    def body(i: Builder, x: Value, y: Value) -> Value:
        if not want.is_float:
            x, y = to_dtype(i, x, want), to_dtype(i, y, want)
        return i.arith("mul", x, y)

    return convert(b, reduce(b, parallel, reduced, inputs, maps, body, "sum", fills=fills), want)


def _matmul(b: Builder, op: Operation) -> list[Value]:
    """Dimensions (batch..., m, n; k)."""
    out = shape_of(op.result)
    batch, m, n = len(out) - 2, len(out) - 2, len(out) - 1
    lead, k = tuple(d(i) for i in range(batch)), d(len(out))
    maps = ((*lead, d(m), k), (*lead, k, d(n)))
    return [contract(b, op, out, (shape_of(op.operands[0])[-1],), op.operands, maps)]


RULES: dict[str, Rule] = {"graph.matmul": _matmul}
