"""Symbolic numbers that are not sizes (`1 / (s0 * s1)`, `sqrt(s0)`) as 0-d f64 tensors computed in the graph.

torch computes such numbers in Python, in double precision, before the call; here they are ops on `graph.sym` values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

from ..ir.core import Value
from ..ir.expr import Expr
from ..ir.types import DTYPES, TensorType
from .errors import Unsupported
from .symbols import to_dim

if TYPE_CHECKING:
    from .context import Context

__all__ = ["lower_number"]

F64, I64 = DTYPES["f64"], DTYPES["i64"]


def lower_number(c: Context, expr: Any) -> Value:
    """The sympy expression `expr` as a 0-d f64 tensor, or i1 for a comparison. Unsupported, naming it, if there is no such."""
    if str(expr) in c.numbers:
        return c.cast(c.numbers[str(expr)], DTYPES["i1"] if expr.is_Relational or expr.is_Boolean else F64)
    if getattr(expr, "is_number", False) and not expr.is_Boolean:
        return c.full((), float(expr), F64)
    if getattr(expr, "is_integer", False) and not any(s.name in c.numbers for s in expr.free_symbols):
        try:
            size = to_dim(expr)
        except Unsupported:
            pass
        else:
            if isinstance(size, Expr):
                return c.cast(c.b.op("graph.sym", type=TensorType((), I64), expr=size), F64)
            return c.full((), float(size), F64)
    rule = _RULES.get(type(expr).__name__)
    if rule is None:
        raise Unsupported(f"'{type(expr).__name__}' in the symbolic number '{expr}'")
    return rule(c, [lower_number(c, a) for a in expr.args])


def _op(name: str) -> Callable[[Context, list[Value]], Value]:
    return lambda c, args: reduce(lambda a, b: c.ew(name, a, b), args) if len(args) > 1 else c.ew(name, *args)


def _same(c: Context, args: list[Value]) -> Value:
    return args[0]


def _power(c: Context, args: list[Value]) -> Value:
    exponent = c.constant_of(args[1])
    if exponent == -1:
        return c.ew("reciprocal", args[0])
    if exponent == 0.5:
        return c.ew("sqrt", args[0])
    return c.ew("pow", *args)


def _piecewise(c: Context, args: list[Any]) -> Value:
    """The value of the first pair (value, condition) whose condition holds; torch's last condition is True."""
    *first, (result, _) = args
    for value, condition in reversed(first):
        result = c.ew("select", condition, value, result)
    return result


def _floor_div(c: Context, args: list[Value]) -> Value:
    return c.ew("floor", c.ew("div", *args))


_RULES: dict[str, Callable[[Context, list[Any]], Any]] = {
    "Add": _op("add"), "Mul": _op("mul"), "Pow": _power, "FloatPow": _power, "PowByNatural": _power,
    "IntTrueDiv": _op("div"), "FloatTrueDiv": _op("div"), "FloorDiv": _floor_div, "CleanDiv": _floor_div,
    "Piecewise": _piecewise, "ExprCondPair": lambda c, args: args, "BooleanTrue": lambda c, _: c.full((), True, DTYPES["i1"]),
    "BooleanFalse": lambda c, _: c.full((), False, DTYPES["i1"]),
    "Max": _op("max"), "Min": _op("min"), "Abs": _op("abs"), "ToFloat": _same, "Identity": _same,
    "CeilToInt": _op("ceil"), "FloorToInt": _op("floor"), "TruncToInt": _op("trunc"), "TruncToFloat": _op("trunc"),
    "RoundToInt": _op("round"),
    **{f"OpaqueUnaryFn_{n}": _op(n) for n in ("sqrt", "exp", "log", "log2", "sin", "cos", "tan", "asin", "acos", "atan", "sinh",
                                               "cosh", "tanh")},
    "Equality": _op("eq"), "Unequality": _op("ne"), "StrictLessThan": _op("lt"), "LessThan": _op("le"),
    "StrictGreaterThan": _op("gt"), "GreaterThan": _op("ge"), "And": _op("and"), "Or": _op("or"), "Not": _op("bitnot"),
}
