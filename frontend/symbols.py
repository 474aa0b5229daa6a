"""torch's symbolic sizes (sympy expressions with the functions of torch.utils._sympy) to `ir.expr`.

Sizes go through rationals: `TruncToInt(ToFloat(s0)*0.5)` is `s0 // 2` and `CeilToInt(IntTrueDiv(s0, 8))` is `ceil(s0 / 8)`.
That is exact, because a float that stands for a size is below 2^53 and binary fractions scale it without rounding; a
factor that is no such fraction (0.1) is refused.

Entry points: `to_dim` for one expression, `SymbolTable` for a graph: it remembers conversions and the range of each symbol.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.numbers import int_oo

from ..ir.expr import Dim, Expr, ceildiv, floordiv, free_symbols, maximum, minimum, mod, sym
from ..ir.ranges import Bounds, known_nonnegative, lower_bound, simplify
from .errors import Unsupported

__all__ = ["SymbolTable", "to_dim"]

MAX_DENOMINATOR = 1 << 20
"""Float factors with a larger power of two below the line are taken for rounded values, not for fractions."""

_OWN = 1_000_000
"""Where our own symbols are numbered from: torch counts up from 0."""

Ratio = tuple[Dim, Dim]
"""Numerator and denominator; the denominator is positive."""


def to_dim(expr: Any) -> Dim:
    """The integer sympy expression `expr` as a Dim. Unsupported, naming the expression, if there is no equal one."""
    if isinstance(expr, (int, sympy.Integer)):
        return int(expr)
    number, unit = _ratio(sympy.sympify(expr), expr)
    if unit == 1:
        return number
    if isinstance(number, int) and isinstance(unit, int) and number % unit == 0:
        return number // unit
    raise Unsupported(f"the size expression '{expr}' is not an integer polynomial of sizes")


def _ratio(e: Any, whole: Any) -> Ratio:
    rule = _RULES.get(type(e).__name__)
    if rule is not None:
        return rule(e, whole)
    if e.is_Integer:
        return int(e), 1
    if e.is_Rational:
        return int(e.p), int(e.q)
    raise Unsupported(f"'{type(e).__name__}' in the size expression '{whole}'")


def _symbol(e: Any, whole: Any) -> Ratio:
    if e.is_integer is False or e.name.startswith(("zf", "zuf")):
        raise Unsupported(f"the float symbol '{e.name}' in the size expression '{whole}'")
    return sym(e.name), 1


def _float(e: Any, whole: Any) -> Ratio:
    value = float(e)
    exact = Fraction(value) if value == value and abs(value) != float("inf") else None
    if exact is None or exact.denominator > MAX_DENOMINATOR:
        raise Unsupported(f"the factor {value} in the size expression '{whole}' is not a binary fraction")
    return exact.numerator, exact.denominator


def _add(e: Any, whole: Any) -> Ratio:
    number, unit = 0, 1
    total: Ratio = (number, unit)
    for x in e.args:
        (n, d), (m, u) = total, _ratio(x, whole)
        total = (n + m, d) if d == u else (n * u + m * d, d * u)
    return total


def _mul(e: Any, whole: Any) -> Ratio:
    number: Dim = 1
    unit: Dim = 1
    for x in e.args:
        n, d = _ratio(x, whole)
        number, unit = number * n, unit * d
    return _reduced(number, unit)


def _reduced(number: Dim, unit: Dim) -> Ratio:
    if unit == 1:
        return number, unit
    exact = mod(number, unit) if isinstance(unit, int) else None
    return (floordiv(number, unit), 1) if exact == 0 else (number, unit)


def _pow(e: Any, whole: Any) -> Ratio:
    base, exponent = e.args
    if not exponent.is_Integer or abs(int(exponent)) > 64:
        raise Unsupported(f"the power '{e}' in the size expression '{whole}'")
    n, d = _ratio(base, whole)
    if int(exponent) < 0:
        n, d = _positive(d, n, e, whole)
    number: Dim = 1
    unit: Dim = 1
    for _ in range(abs(int(exponent))):
        number, unit = number * n, unit * d
    return number, unit


def _positive(n: Dim, d: Dim, e: Any, whole: Any) -> Ratio:
    """n / d with the sign moved into n; a symbolic denominator must be a size (non-negative, and torch has guarded zero)."""
    if isinstance(d, int):
        if d == 0:
            raise Unsupported(f"division by zero in the size expression '{whole}'")
        return (n, d) if d > 0 else (-n, -d)
    if known_nonnegative(d):
        return n, d
    if known_nonnegative(-d):
        return -n, -d
    raise Unsupported(f"the sign of the divisor of '{e}' in the size expression '{whole}' is unknown")


def _quotient(e: Any, whole: Any) -> Ratio:
    (a, da), (b, db) = (_ratio(x, whole) for x in e.args[:2])
    return _reduced(*_positive(a * db, da * b, e, whole))


def _floor_div(e: Any, whole: Any) -> Ratio:
    return floordiv(*_quotient(e, whole)), 1


def _integer(e: Any, whole: Any) -> Dim:
    n, d = _ratio(e, whole)
    if d != 1:
        raise Unsupported(f"the fraction '{e}' in the size expression '{whole}'")
    return n


def _mod(e: Any, whole: Any) -> Ratio:
    a, b = (_integer(x, whole) for x in e.args)
    return mod(*_positive(a, b, e, whole)), 1


def _modular_indexing(e: Any, whole: Any) -> Ratio:
    base, divisor, modulus = (_integer(x, whole) for x in e.args)
    return mod(floordiv(base, divisor), modulus), 1


def _extreme(pick: Callable[..., Dim]) -> Callable[[Any, Any], Ratio]:
    return lambda e, whole: (pick(*(_integer(x, whole) for x in e.args)), 1)


def _rounded(how: Callable[[Dim, Dim], Dim]) -> Callable[[Any, Any], Ratio]:
    return lambda e, whole: (how(*_ratio(e.args[0], whole)), 1)


def _trunc(n: Dim, d: Dim) -> Dim:
    if known_nonnegative(n):
        return floordiv(n, d)
    return maximum(floordiv(n, d), 0) + minimum(ceildiv(n, d), 0)


def _left_shift(e: Any, whole: Any) -> Ratio:
    a, b = (_integer(x, whole) for x in e.args)
    if not isinstance(b, int):
        raise Unsupported(f"a shift by '{b}' in the size expression '{whole}'")
    return a * (1 << b), 1


def _right_shift(e: Any, whole: Any) -> Ratio:
    a, b = (_integer(x, whole) for x in e.args)
    if not isinstance(b, int):
        raise Unsupported(f"a shift by '{b}' in the size expression '{whole}'")
    return floordiv(a, 1 << b), 1


def _same(e: Any, whole: Any) -> Ratio:
    return _ratio(e.args[0], whole)


_RULES: dict[str, Callable[[Any, Any], Ratio]] = {
    "Symbol": _symbol, "Float": _float, "Add": _add, "Mul": _mul, "Pow": _pow, "PowByNatural": _pow, "FloatPow": _pow,
    "FloorDiv": _floor_div, "CleanDiv": _floor_div, "IntTrueDiv": _quotient, "FloatTrueDiv": _quotient,
    "Mod": _mod, "PythonMod": _mod, "ModularIndexing": _modular_indexing,
    "Max": _extreme(maximum), "Min": _extreme(minimum), "ToFloat": _same, "Identity": _same,
    "CeilToInt": _rounded(ceildiv), "FloorToInt": _rounded(floordiv), "TruncToInt": _rounded(_trunc),
    "ceiling": _rounded(ceildiv), "floor": _rounded(floordiv), "TruncToFloat": _rounded(_trunc),
    "LShift": _left_shift, "RShift": _right_shift,
}
"""Class name of the sympy function -> how it becomes a ratio. Named, not typed: sympy and torch both have Max, Min and Mod."""


class SymbolTable:
    """The symbols of one graph: conversion with memory, and the range of every symbol met, as `func` records it."""

    def __init__(self) -> None:
        self._known: dict[Any, Dim] = {}
        self._ranges: dict[str, tuple[Dim, Dim | None]] = {}
        self._own: dict[Any, Any] = {}  # sympy expressions of floats in the data -> what they are in symbols of our own

    @property
    def bounds(self) -> Bounds:
        """Symbol -> (smallest, largest or None)."""
        return self._ranges

    def dim(self, size: Any) -> Dim:
        """An int or torch.SymInt as a Dim, simplified by the ranges of its symbols. Unsupported if not convertible."""
        if isinstance(size, int):
            return int(size)
        if isinstance(size, Expr):
            return size
        if not isinstance(size, torch.SymInt):
            raise Unsupported(f"{type(size).__name__} where a size is needed")
        if not hasattr(size.node, "expr"):  # a SymInt of constants only
            return int(size)
        expr = size.node.expr
        found = self._known.get(expr)
        if found is None:
            found = to_dim(expr.xreplace(self._own) if self._own else expr)
            for name in free_symbols(found) - self._ranges.keys():
                low, high = _range_of(name, size)
                if low < 0:  # size expressions take their symbols for non-negative
                    raise Unsupported(f"the number '{name}', which may be negative, in a size")
                self._ranges[name] = low, high
            found = simplify(found, self._ranges)
            if isinstance(found, Expr) and not expr.is_symbol and statically_known_true(size == 1):  # by a guard: torch broadcasts it
                found = 1
            self._known[expr] = found
        return found

    def define(self, size: torch.SymInt) -> str:
        """A symbol of our own for the size of a tensor that is no expression of sizes; its name. Sizes made of the same number are then
        expressions of it: with `int(f) + 1` for a symbol u, `int(f)` is u - 1."""
        name = f"u{_OWN + len(self._own)}"
        expr = size.node.expr.xreplace(self._own)
        own = sympy.Symbol(name, integer=True, nonnegative=True)
        numbers = [a for a in expr.atoms(sympy.Function) if type(a).__name__ in _TO_INT and _of_floats(a)]
        outer = [a for a in numbers if not any(a is not b and b.has(a) for b in numbers)]
        if len(outer) == 1 and expr.coeff(outer[0]) == 1 and not _of_floats(expr - outer[0]):
            self._own[outer[0]] = own - (expr - outer[0])
        else:
            self._own[expr] = own
        self._ranges[name] = 0, None
        return name

    def nonnegative(self, e: Dim) -> bool:
        """True if `e` >= 0 is certain for the ranges of the symbols."""
        low = lower_bound(e, self._ranges)
        return low is not None and known_nonnegative(low)

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        """The `symbols` attribute of the function, in order of name."""
        return {name: self._ranges[name] for name in sorted(self._ranges)}  # type: ignore[misc]


_TO_INT = ("TruncToInt", "FloorToInt", "CeilToInt", "RoundToInt", "floor", "ceiling")


def _of_floats(e: Any) -> bool:
    return any(s.name.startswith(("zf", "zuf")) for s in e.free_symbols)


def _range_of(name: str, size: torch.SymInt) -> tuple[int, int | None]:
    for symbol, known in size.node.shape_env.var_to_range.items():
        if symbol.name == name:
            low = int(known.lower) if known.lower != -int_oo and known.lower.is_finite else -(1 << 62)
            high = int(known.upper) if known.upper != int_oo and known.upper.is_finite else None
            if high is not None and high >= (1 << 62):  # "anything": sys.maxsize
                high = None
            return low, high
    return 0, None
