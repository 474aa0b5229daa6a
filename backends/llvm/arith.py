"""The arith dialect on one chunk: a scalar or an `<N x T>` register value.

Entry point: `emit(b, name, dtype, *chunks)`. The tables are keyed by op name and by the kind of the element type ('f' float,
'i' signed, 'u' unsigned, 'b' bool). Semantics are those of `ir/dialects/arith.py`, that is torch's. No fast-math flag is
set: results are what eager gives, NaN and signed zeros included. Types narrower than f32 compute in f32 and
round once. Integer division never traps: a zero divisor gives an unspecified value (lanes outside a mask hold zeros).
Transcendental functions come from `vecmath`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from ...ir.dialects.arith import BY_NAME
from ...ir.types import DTYPES, DType
from . import vecmath
from .convert import emit_cast
from .intrinsics import call_same
from .lanes import OPERAND, Lanes
from .lanes import splat as repeated
from .values import constant, is_constant
from .vecmath_fast import FAST

__all__ = ["Features", "emit", "identity"]

Emit = Callable[..., ir.Value]
Features = frozenset[str]
F32 = DTYPES["f32"]
_KIND = {"float": "f", "int": "i", "uint": "u", "bool": "b", "index": "i"}


def _like(x: ir.Value, number: Any) -> ir.Constant:
    """The constant `number` of x's type (float or integer), in every lane."""
    return repeated(x.type, number)


def _all_ones(x: ir.Value) -> ir.Constant:
    return _like(x, -1)


def _intrinsic(name: str) -> Emit:
    return lambda b, x, *rest: call_same(b, name, x, *rest)


def _isnan(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.fcmp_unordered("uno", x, x)


# -- max and min ------------------------------------------------------------------------------------------------------

def _float_extreme(relation: str) -> Emit:
    """NaN-propagating maximum or minimum. With a constant operand one select (one `maxps`) is enough. Otherwise, whichever zero it gives, `maxps` and
    AVX-512's `vfixupimmps`; or `llvm.maximum`: `maxps`, a test and a blend, where selects become two tests, their union and two moves."""
    name = {">": "maximum", "<": "minimum"}[relation]

    def go(b: ir.IRBuilder, x: ir.Value, y: ir.Value, features: Features = frozenset()) -> ir.Value:
        if is_constant(x) and not _constant_nan(x):
            return b.select(b.fcmp_ordered(relation, x, y), x, y)
        if is_constant(y) and not _constant_nan(y):
            return b.select(b.fcmp_ordered(relation, y, x), y, x)
        m = Lanes(b, x.type, features)
        if not m.fixup_lanes():
            return call_same(b, name, x, y, fastmath=("nsz",))
        return m.fixup(x, b.select(b.fcmp_ordered(relation, x, y), x, y), quiet_nan=OPERAND, signalling_nan=OPERAND)
    return go


def _constant_nan(c: ir.Constant) -> bool:
    values = c.constant if isinstance(c.constant, (list, tuple)) else [c]
    return any(getattr(v, "constant", v) != getattr(v, "constant", v) for v in values)


def _number_extreme(relation: str) -> Emit:
    """fmax and fmin: the other operand where one is NaN."""
    def go(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select(_isnan(b, y), x, b.select(b.fcmp_ordered(relation, x, y), x, y))
    return go


def _int_extreme(relation: str, signed: bool) -> Emit:
    def go(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select((b.icmp_signed if signed else b.icmp_unsigned)(relation, x, y), x, y)
    return go


# -- division ---------------------------------------------------------------------------------------------------------

def _safe_divisor(b: ir.IRBuilder, x: ir.Value, y: ir.Value, signed: bool) -> ir.Value:
    """y, or 1 where dividing by y would trap (zero; -1 under the most negative x, for which wrapping is x itself)."""
    bad = b.icmp_signed("==", y, _like(y, 0))
    if signed:
        width = (y.type.element if isinstance(y.type, ir.VectorType) else y.type).width
        overflow = b.and_(b.icmp_signed("==", y, _all_ones(y)), b.icmp_signed("==", x, _like(x, -(1 << (width - 1)))))
        bad = b.or_(bad, overflow)
    return b.select(bad, _like(y, 1), y)


def _truncdiv(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.sdiv(x, _safe_divisor(b, x, y, True))


def _rem(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.srem(x, _safe_divisor(b, x, y, True))


def _udiv(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.udiv(x, _safe_divisor(b, x, y, False))


def _urem(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.urem(x, _safe_divisor(b, x, y, False))


def _crossed(b: ir.IRBuilder, r: ir.Value, y: ir.Value) -> ir.Value:
    """i1: the remainder is not zero and its sign differs from the divisor's."""
    return b.and_(b.icmp_signed("!=", r, _like(r, 0)), b.icmp_signed("<", b.xor(r, y), _like(r, 0)))


def _floordiv_int(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    y = _safe_divisor(b, x, y, True)
    q = b.sdiv(x, y)
    r = b.sub(x, b.mul(q, y))
    return b.select(_crossed(b, r, y), b.sub(q, _like(q, 1)), q)


def _mod_int(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    y = _safe_divisor(b, x, y, True)
    r = b.srem(x, y)
    return b.select(_crossed(b, r, y), b.add(r, y), r)


def _mod_float(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return vecmath.BINARY["remainder"](b, x, y)


def _floordiv_float(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """torch's div_floor_floating: the floor of the exact quotient, not of the rounded one."""
    zero, one = _like(x, 0.0), _like(x, 1.0)
    plain = b.fdiv(x, y)
    r = vecmath.BINARY["fmod"](b, x, y)
    q = b.fdiv(b.fsub(x, r), y)
    wrong = b.xor(b.fcmp_ordered("<", y, zero), b.fcmp_ordered("<", r, zero))
    q = b.select(b.and_(b.fcmp_unordered("!=", r, zero), wrong), b.fsub(q, one), q)
    floor = call_same(b, "floor", q)
    floor = b.select(b.fcmp_ordered(">", b.fsub(q, floor), _like(x, 0.5)), b.fadd(floor, one), floor)
    result = b.select(b.fcmp_unordered("!=", q, zero), floor, call_same(b, "copysign", zero, plain))
    return b.select(b.fcmp_ordered("==", y, zero), plain, result)


# -- the rest -----------------------------------------------------------------------------------------------------------

def _sign_float(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    zero = _like(x, 0.0)
    negative = b.select(b.fcmp_ordered("<", x, zero), _like(x, -1.0), zero)
    return b.select(b.fcmp_ordered(">", x, zero), _like(x, 1.0), negative)


def _sign_int(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    zero = _like(x, 0)
    return b.select(b.icmp_signed(">", x, zero), _like(x, 1), b.select(b.icmp_signed("<", x, zero), _like(x, -1), zero))


def _abs_int(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", x, _like(x, 0)), b.sub(_like(x, 0), x), x)


def _shift(kind: str) -> Emit:
    """Shifts by the width or more (or by a negative count) give what shifting one bit at a time would."""
    def go(b: ir.IRBuilder, x: ir.Value, n: ir.Value) -> ir.Value:
        width = (x.type.element if isinstance(x.type, ir.VectorType) else x.type).width
        inside = b.icmp_unsigned("<", n, _like(n, width))
        if kind == "ashr":
            return b.ashr(x, b.select(inside, n, _like(n, width - 1)))
        return b.select(inside, getattr(b, kind)(x, b.select(inside, n, _like(n, 0))), _like(x, 0))
    return go


def _pow_unsigned(b: ir.IRBuilder, x: ir.Value, n: ir.Value, bits: int | None = None) -> ir.Value:
    """Square and multiply over the low `bits` bits of n (all of them), wrapping."""
    width = (x.type.element if isinstance(x.type, ir.VectorType) else x.type).width
    result, power = _like(x, 1), x
    for bit in range(width if bits is None else bits):
        taken = b.icmp_unsigned("!=", b.and_(n, _like(n, 1 << bit)), _like(x, 0))
        result = b.select(taken, b.mul(result, power), result)
        power = b.mul(power, power)
    return result


def _pow_int(b: ir.IRBuilder, x: ir.Value, n: ir.Value) -> ir.Value:
    """Negative n: 1 for x == 1, +-1 for x == -1, else 0 (torch)."""
    width = (x.type.element if isinstance(x.type, ir.VectorType) else x.type).width
    one, zero = _like(x, 1), _like(x, 0)
    result = _pow_unsigned(b, x, n, width - 1)
    odd = b.icmp_unsigned("!=", b.and_(n, one), zero)
    for_minus_one = b.select(b.icmp_signed("==", x, _all_ones(x)), b.select(odd, x, one), zero)
    negative = b.select(b.icmp_signed("==", x, one), one, for_minus_one)
    return b.select(b.icmp_signed("<", n, zero), negative, result)


def _nextafter_narrow(b: ir.IRBuilder, x: ir.Value, y: ir.Value, dtype: DType) -> ir.Value:
    """The neighbour of x toward y among 16-bit floats: the bit pattern one up or down; away from zero is up for either sign."""
    fx, fy = (emit_cast(b, v, dtype.name, "f32") for v in (x, y))
    integer = ir.IntType(16)
    bits_type = ir.VectorType(integer, x.type.count) if isinstance(x.type, ir.VectorType) else integer
    xi, yi = (v if v.type == bits_type else b.bitcast(v, bits_type) for v in (x, y))
    up = b.fcmp_ordered("<", fx, fy)
    positive = b.icmp_signed(">=", xi, _like(xi, 0))
    away = b.icmp_unsigned("==", up, positive)
    moved = b.add(xi, b.select(away, _like(xi, 1), _like(xi, -1)))
    smallest = b.or_(b.and_(yi, _like(yi, -(1 << 15))), _like(yi, 1))
    moved = b.select(b.fcmp_ordered("==", fx, _like(fx, 0.0)), smallest, moved)
    moved = b.select(b.fcmp_ordered("==", fx, fy), yi, moved)
    moved = b.select(_isnan(b, fx), xi, b.select(_isnan(b, fy), yi, moved))
    return moved if x.type == bits_type else b.bitcast(moved, x.type)


def _isinf(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.fcmp_ordered("==", call_same(b, "fabs", x), _like(x, float("inf")))


def _op(name: str) -> Emit:
    return lambda b, *xs: getattr(b, name)(*xs)


def _compare(method: str, relation: str) -> Emit:
    return lambda b, x, y: getattr(b, method)(relation, x, y)


def _rows(**kinds: Emit) -> dict[str, Emit]:
    return {k: f for letters, f in kinds.items() for k in letters}


_RELATIONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_NOT: Emit = lambda b, x: b.xor(x, _all_ones(x))  # noqa: E731
_SAME: Emit = lambda b, x: x  # noqa: E731

_EXTREMES: dict[str, Emit] = {"max": _float_extreme(">"), "min": _float_extreme("<")}
"""Of floats: what the table has for other types."""

TABLE: dict[str, dict[str, Emit]] = {
    "neg": _rows(f=_op("fneg"), iu=lambda b, x: b.sub(_like(x, 0), x)),
    "abs": _rows(f=_intrinsic("fabs"), i=_abs_int, u=_SAME),
    "sign": _rows(f=_sign_float, i=_sign_int, u=lambda b, x: b.select(b.icmp_signed("!=", x, _like(x, 0)), _like(x, 1), x),
                  b=_SAME),
    "bitnot": _rows(iub=_NOT), "isnan": _rows(f=_isnan), "isinf": _rows(f=_isinf),
    "floor": _rows(f=_intrinsic("floor")), "ceil": _rows(f=_intrinsic("ceil")), "trunc": _rows(f=_intrinsic("trunc")),
    "round": _rows(f=_intrinsic("rint")), "sqrt": _rows(f=_intrinsic("sqrt")),
    "rsqrt": _rows(f=lambda b, x: b.fdiv(_like(x, 1.0), call_same(b, "sqrt", x))),
    "reciprocal": _rows(f=lambda b, x: b.fdiv(_like(x, 1.0), x)),
    "add": _rows(f=_op("fadd"), iu=_op("add"), b=_op("or_")), "sub": _rows(f=_op("fsub"), iu=_op("sub")),
    "mul": _rows(f=_op("fmul"), iu=_op("mul"), b=_op("and_")), "div": _rows(f=_op("fdiv")),
    "floordiv": _rows(f=_floordiv_float, i=_floordiv_int, u=_udiv), "truncdiv": _rows(i=_truncdiv, u=_udiv),
    "mod": _rows(f=_mod_float, i=_mod_int, u=_urem), "rem": _rows(f=vecmath.BINARY["fmod"], i=_rem, u=_urem),
    "pow": _rows(i=_pow_int, u=_pow_unsigned), "copysign": _rows(f=_intrinsic("copysign")),
    "max": _rows(i=_int_extreme(">", True), u=_int_extreme(">", False), b=_op("or_")),
    "min": _rows(i=_int_extreme("<", True), u=_int_extreme("<", False), b=_op("and_")),
    "fmax": _rows(f=_number_extreme(">")), "fmin": _rows(f=_number_extreme("<")),
    "and": _rows(iub=_op("and_")), "or": _rows(iub=_op("or_")), "xor": _rows(iub=_op("xor")),
    "shl": _rows(iu=_shift("shl")), "shr": _rows(i=_shift("ashr"), u=_shift("lshr")), "fma": _rows(f=_intrinsic("fma")),
    **{n: _rows(f=_compare("fcmp_unordered" if n == "ne" else "fcmp_ordered", r), i=_compare("icmp_signed", r),
                ub=_compare("icmp_unsigned", r)) for n, r in _RELATIONS.items()},
}


def emit(b: ir.IRBuilder, features: Features, name: str, dtype: DType, *xs: ir.Value, fast: bool = False) -> ir.Value:
    """`arith.<name>` on chunks of element type `dtype`; `fast` by the cheaper set, where that has it.

    NotImplementedError names an op that has no lowering."""
    kind = _KIND.get(dtype.kind, "")
    if name == "nextafter" and dtype.name in ("bf16", "f16"):
        return _nextafter_narrow(b, xs[0], xs[1], dtype)
    if kind == "f" and dtype.bits < 32:
        wide = emit(b, features, name, F32, *[emit_cast(b, x, dtype.name, "f32") for x in xs], fast=fast)
        return wide if BY_NAME[name].result == "i1" else emit_cast(b, wide, "f32", dtype.name)
    if kind == "f" and name in _EXTREMES:
        return _EXTREMES[name](b, *xs, features)
    found = TABLE.get(name, {}).get(kind)
    if found is not None:
        return found(b, *xs)
    if fast and kind == "f" and name in FAST:
        return FAST[name](b, xs[0], features)
    if kind == "f" and name in vecmath.UNARY:
        return vecmath.UNARY[name](b, xs[0], features)
    if kind == "f" and name in vecmath.BINARY:
        return vecmath.BINARY[name](b, xs[0], xs[1], features)
    raise NotImplementedError(f"arith.{name} on {dtype} has no lowering to LLVM")


def identity(kind: str, dtype: DType, width: int = 1) -> ir.Constant:
    """The neutral element of a reduction kind (`tile.reduce`)."""
    signed, bits = dtype.is_signed, dtype.bits
    infinity = float("inf")
    low: Any = -infinity if dtype.is_float else 0 if not signed or dtype.kind == "bool" else -(1 << (bits - 1))
    high: Any = infinity if dtype.is_float else 1 if dtype.kind == "bool" else (1 << (bits - signed)) - 1
    return constant({"sum": 0, "prod": 1, "max": low, "min": high, "any": 0, "all": 1}[kind], dtype, width)


