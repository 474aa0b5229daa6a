"""Inlined vector math for the LLVM backend: tables from arith op names to emitters.

    from .vecmath import UNARY, BINARY
    y = UNARY["exp"](builder, x, features)          # x: float, double, or a vector of either, any width
    z = BINARY["pow"](builder, x, y, features)

The result has the operand's type (`isnan` and `isinf` give i1 lanes).  `features` names instruction sets of the target
that may be used where one instruction replaces several (`avx512f`); values do not depend on it.

float32 math is polynomial code without calls, good to `MAX_ULP` (`benchmarks/ulp.py` measures it on all 2^32 inputs), with the
NaN, infinity, signed zero and denormal behaviour of eager torch; float64 math calls the C library per lane.  sin, cos,
tan and fmod emit a branch to a cold loop and so leave the builder in a new block: phi nodes of a surrounding loop take
`builder.block` after the call.  The emitters are in `vecmath_exp.py`, `vecmath_trig.py` and `vecmath_special.py`, each
with instruction counts; the simple ones are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

from . import vecmath_exp, vecmath_special, vecmath_trig
from .lanes import Lanes

Unary = Callable[..., ir.Value]
Binary = Callable[..., ir.Value]

# Bound on the error in units of the last place of the correctly rounded float32 result: a margin of about 0.1 above the
# worst that `benchmarks/ulp.py` finds.  Functions that are not named are exact or correctly rounded (0.5).
MAX_ULP: dict[str, float] = {
    "exp": 1.0, "exp2": 1.0, "expm1": 1.6, "log": 1.1, "log2": 1.35, "log10": 1.1, "log1p": 1.6, "sigmoid": 2.0,
    "sinh": 3.0, "cosh": 3.0, "tanh": 2.8, "asinh": 2.1, "acosh": 2.3, "atanh": 2.4, "sin": 1.7, "cos": 1.7, "tan": 3.0,
    "asin": 2.5, "acos": 1.3, "atan": 2.2, "atan2": 2.2, "erf": 1.2, "erfc": 0.7, "erfinv": 2.8, "rsqrt": 1.5,
    "pow": 0.6,
}  # fmt: skip


def _intrinsic(name: str) -> Callable[[Lanes, ir.Value], ir.Value]:
    return lambda m, x: m.intrinsic(name, x)


def _rsqrt(m: Lanes, x: ir.Value) -> ir.Value:
    return m.div(1.0, m.sqrt(x))


def _sign(m: Lanes, x: ir.Value) -> ir.Value:
    """-1, 0 or 1; 0 at NaN, as torch."""
    return m.select(m.cmp(">", x, 0.0), 1.0, m.select(m.cmp("<", x, 0.0), -1.0, 0.0))


def _is_number(value: ir.Value) -> bool:
    """Whether `value` is a constant without a NaN lane."""
    if not isinstance(value, ir.Constant):
        return False
    if isinstance(value.constant, (list, tuple)):
        return all(_is_number(lane) for lane in value.constant)
    return isinstance(value.constant, (int, float)) and not math.isnan(value.constant)


def _maximum(m: Lanes, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger; NaN if either is.  One instruction where an operand is a constant, as in relu, else three."""
    if _is_number(x):
        x, y = y, x
    r = m.max(x, y)
    return r if _is_number(y) else m.select(m.isnan(y), y, r)


def _minimum(m: Lanes, x: ir.Value, y: ir.Value) -> ir.Value:
    """The smaller; NaN if either is."""
    if _is_number(x):
        x, y = y, x
    r = m.min(x, y)
    return r if _is_number(y) else m.select(m.isnan(y), y, r)


def _fmax(m: Lanes, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger; where one is NaN, the other."""
    return m.select(m.isnan(x), y, m.max(x, y))


def _fmin(m: Lanes, x: ir.Value, y: ir.Value) -> ir.Value:
    """The smaller; where one is NaN, the other."""
    return m.select(m.isnan(x), y, m.min(x, y))


_UNARY_EMITTERS: dict[str, Callable[[Lanes, ir.Value], ir.Value]] = {
    "exp": vecmath_exp.exp,
    "exp2": vecmath_exp.exp2,
    "expm1": vecmath_exp.expm1,
    "log": vecmath_exp.log,
    "log2": vecmath_exp.log2,
    "log10": vecmath_exp.log10,
    "log1p": vecmath_exp.log1p,
    "sigmoid": vecmath_exp.sigmoid,
    "sinh": vecmath_exp.sinh,
    "cosh": vecmath_exp.cosh,
    "tanh": vecmath_exp.tanh,
    "asinh": vecmath_exp.asinh,
    "acosh": vecmath_exp.acosh,
    "atanh": vecmath_exp.atanh,
    "sin": vecmath_trig.sin,
    "cos": vecmath_trig.cos,
    "tan": vecmath_trig.tan,
    "asin": vecmath_trig.asin,
    "acos": vecmath_trig.acos,
    "atan": vecmath_trig.atan,
    "erf": vecmath_special.erf,
    "erfc": vecmath_special.erfc,
    "erfinv": vecmath_special.erfinv,
    "lgamma": vecmath_special.lgamma,
    "digamma": vecmath_special.digamma,
    "sqrt": _intrinsic("sqrt"),
    "rsqrt": _rsqrt,
    "reciprocal": lambda m, x: m.div(1.0, x),
    "floor": _intrinsic("floor"),
    "ceil": _intrinsic("ceil"),
    "trunc": _intrinsic("trunc"),
    "round": _intrinsic("roundeven"),
    "abs": _intrinsic("fabs"),
    "neg": lambda m, x: m.neg(x),
    "sign": _sign,
    "isnan": lambda m, x: m.isnan(x),
    "isinf": lambda m, x: m.cmp("==", m.abs(x), math.inf),
}

_BINARY_EMITTERS: dict[str, Callable[[Lanes, ir.Value, ir.Value], ir.Value]] = {
    "pow": vecmath_exp.pow,
    "atan2": vecmath_trig.atan2,
    "fmod": vecmath_special.fmod,
    "remainder": vecmath_special.remainder,
    "hypot": vecmath_special.hypot,
    "nextafter": vecmath_special.nextafter,
    "maximum": _maximum,
    "minimum": _minimum,
    "fmax": _fmax,
    "fmin": _fmin,
    "copysign": lambda m, x, y: m.copysign(x, y),
}


def _unary(emit: Callable[[Lanes, ir.Value], ir.Value]) -> Unary:
    def call(builder: ir.IRBuilder, x: ir.Value, features: frozenset[str] = frozenset()) -> ir.Value:
        return emit(Lanes(builder, x.type, features), x)

    return call


def _binary(emit: Callable[[Lanes, ir.Value, ir.Value], ir.Value]) -> Binary:
    def call(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, features: frozenset[str] = frozenset()) -> ir.Value:
        if x.type != y.type:
            raise TypeError(f"operands of one type expected, got {x.type} and {y.type}")
        return emit(Lanes(builder, x.type, features), x, y)

    return call


# Op name -> emitter(builder, x[, features]) and emitter(builder, x, y[, features]).
UNARY: dict[str, Unary] = {name: _unary(emit) for name, emit in _UNARY_EMITTERS.items()}
BINARY: dict[str, Binary] = {name: _binary(emit) for name, emit in _BINARY_EMITTERS.items()}
