"""Cheaper float32 functions, for `options={"fast_math": True}`: fewer terms, and nothing done for the ends of the range.

Chosen per op by the attribute `_approximate` (`passes/tiling/emit.py`). Against the default set: errors up to `FAST_MAX_ULP` instead of about 1;
exponentials are infinite from 2^127.5 on (half a binade early), zero instead of denormal, and denormal logarithms are those of zero. NaN gives NaN,
infinities and the signs of zeros are kept. docs/fast-math.md has the table. Coefficients come from `benchmarks/minimax.py` (names fast_*).
float64 is left as it is.

Instructions per vector as compiled for AVX2, default -> fast: exp 20 -> 13, exp2 19 -> 13, sigmoid 27 -> 16,
tanh 23 -> 13, erf 36 -> 15, log 30 -> 26.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from . import vecmath_exp, vecmath_special
from .lanes import Lanes
from .vecmath_exp import EXPONENT_FIELD, INF, LN2_HI, LN2_LO, LOG2_E, MAGIC, MIN_NORMAL, NAN, ONE_BITS, SQRT_HALF_BITS

__all__ = ["FAST", "FAST_MAX_ULP"]

EXP = (1.0, 1.0, 0.499992311, 0.166671112, 0.0418902077, 0.00831291825)
EXP2 = (1.0, 0.693147004, 0.240222469, 0.0555071086, 0.00967129786, 0.0013269654)
LOG = (0.333339095, -0.250013351, 0.199630991, -0.165776506, 0.14914532, -0.142669618, 0.0870035961)
TANH = (0.999999981, 0.129792213, 0.00298585966, 9.87864009e-06, -1.47041624e-08, 2.35084624e-11)
TANH_DENOMINATOR = (1.0, 0.463125373, 0.0240279152, 0.000237202926)
ERF = (1.12837915, 0.187225566, 0.052410027, 0.00364979673, 0.000285984541, 2.12526809e-06)
ERF_DENOMINATOR = (1.0, 0.499257245, 0.112868496, 0.0147365835, 0.00114118393, 3.89223303e-05)
K_LN2 = (LN2_HI + LN2_LO) * 2.0**-23

# Bounds on the error in ulps where the exact result is a normal number below 2^127.5 (for log: where the input is normal), with a margin of about
# 10 % above the worst that `benchmarks/ulp_fast.py` finds.
FAST_MAX_ULP: dict[str, float] = {"exp": 6.5, "exp2": 2.2, "sigmoid": 6.5, "tanh": 5.0, "erf": 6.1, "log": 1.3}


def _scaled(m: Lanes, p: ir.Value, z: ir.Value) -> ir.Value:
    """p * 2^n for n = z - MAGIC in [-127, 128]: 0 at one end and infinity at the other."""
    return m.mul(p, m.from_bits(m.iadd(m.shl(m.bits(z), 23), ONE_BITS)))


def exp(m: Lanes, x: ir.Value) -> ir.Value:
    """e^x, one constant for ln2: what that loses grows with |x|."""
    if not m.single:
        return vecmath_exp.exp(m, x)
    x = m.max(m.min(x, 88.8), -88.0)
    z = m.fma(x, LOG2_E, MAGIC)
    return _scaled(m, m.horner(m.fma(m.sub(z, MAGIC), -(LN2_HI + LN2_LO), x), EXP), z)


def exp2(m: Lanes, x: ir.Value) -> ir.Value:
    """2^x; exact at integers."""
    if not m.single:
        return vecmath_exp.exp2(m, x)
    x = m.max(m.min(x, 128.0), -127.0)
    z = m.add(x, MAGIC)
    return _scaled(m, m.horner(m.sub(x, m.sub(z, MAGIC)), EXP2), z)


def sigmoid(m: Lanes, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x)."""
    if not m.single:
        return vecmath_exp.sigmoid(m, x)
    return m.div(1.0, m.add(exp(m, m.neg(x)), 1.0))


def _odd(m: Lanes, x: ir.Value, high: float, numerator: tuple[float, ...], denominator: tuple[float, ...]) -> ir.Value:
    """x p(x^2) / q(x^2) with x held within [-high, high]."""
    x = m.max(m.min(x, high), -high)
    s = m.mul(x, x)
    return m.div(m.mul(x, m.horner(s, numerator)), m.horner(s, denominator))


def tanh(m: Lanes, x: ir.Value) -> ir.Value:
    return _odd(m, x, 8.0, TANH, TANH_DENOMINATOR) if m.single else vecmath_exp.tanh(m, x)


def erf(m: Lanes, x: ir.Value) -> ir.Value:
    return _odd(m, x, 3.83, ERF, ERF_DENOMINATOR) if m.single else vecmath_special.erf(m, x)


def log(m: Lanes, x: ir.Value) -> ir.Value:
    """k ln2 + log(1 + f)."""
    if not m.single:
        return vecmath_exp.log(m, x)
    bits = m.bits(x)
    k = m.iand(m.isub(bits, SQRT_HALF_BITS), EXPONENT_FIELD)
    f = m.sub(m.from_bits(m.isub(bits, k)), 1.0)
    s = m.mul(f, f)
    tail = m.fma(m.mul(s, f), m.estrin(f, s, LOG), m.mul(s, -0.5))
    y = m.fma(m.to_float(k), K_LN2, m.add(f, tail))
    y = m.select(m.cmp("<", x, INF), y, x)
    return m.select(m.cmp(">=", x, MIN_NORMAL), y, m.select(m.cmp("<", x, 0.0), NAN, m.select(m.isnan(x), x, -INF)))


def _unary(emit: Callable[[Lanes, ir.Value], ir.Value]) -> Callable[..., ir.Value]:
    def call(builder: ir.IRBuilder, x: ir.Value, features: frozenset[str] = frozenset()) -> ir.Value:
        return emit(Lanes(builder, x.type, features), x)
    return call


FAST: dict[str, Callable[..., ir.Value]] = {
    name: _unary(emit) for name, emit in {"exp": exp, "exp2": exp2, "sigmoid": sigmoid, "tanh": tanh, "erf": erf, "log": log}.items()}
"""As `vecmath.UNARY`."""
