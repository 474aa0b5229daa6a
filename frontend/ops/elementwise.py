"""Elementwise operators: unary and binary maths, comparisons, logic, casts and the activations.

Operands are cast to the element type of the result (for comparisons: to the promoted type of the operands). Where eager keeps a
Python number in float32 while the tensor is bf16 or f16, and rounding it would change it, the op is done in f32 as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...ir.core import Value
from ...ir.types import DType
from ..context import F32, F64, I1, Context, fits, typeof
from ..dtypes import TO_TORCH, from_torch
from ..errors import Unsupported
from .table import Lower

# -- unary ------------------------------------------------------------------------------------------------------------


def unary(name: str) -> Lower:
    """`graph.<name>` in the result's element type."""
    return lambda c, x: c.ew(name, c.cast(x, c.dtype))


def rounding(name: str) -> Lower:
    """Rounding: integers are left as they are."""
    return lambda c, x: c.ew(name, x) if typeof(x).dtype.is_float else x


def predicate(name: str) -> Lower:
    """A test for a special float; false for integers."""
    return lambda c, x: c.ew(name, x) if typeof(x).dtype.is_float else c.full(typeof(x).shape, False, I1)


def identity(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    return x


def identity_of_reals(c: Context, x: Value) -> Value:
    if typeof(x).dtype.kind == "complex":
        raise Unsupported("complex numbers")
    return x


def bitwise_not(c: Context, x: Value) -> Value:
    return c.ew("bitnot", x)


def logical_not(c: Context, x: Value) -> Value:
    return c.ew("bitnot", x) if typeof(x).dtype == I1 else c.ew("eq", x, 0)


def round_decimals(c: Context, x: Value, *, decimals: int) -> Value:
    """Scaled by a power of ten, rounded, scaled back, in the order of ATen: the power is a whole number."""
    if not typeof(x).dtype.is_float:
        return x
    if decimals == 0:
        return c.ew("round", x)
    power = 10.0 ** abs(decimals)
    there, back = ("mul", "div") if decimals > 0 else ("div", "mul")
    work = F32 if c.dtype.name in ("bf16", "f16") else c.dtype
    return c.cast(c.ew(back, c.ew("round", c.ew(there, c.cast(x, work), power)), power), c.dtype)


def sgn(c: Context, x: Value) -> Value:
    return c.ew("sign", x)


def signbit(c: Context, x: Value) -> Value:
    if not typeof(x).dtype.is_float:
        return c.ew("lt", x, 0)
    return c.ew("lt", c.ew("copysign", c.full((), 1.0, typeof(x).dtype), x), 0)


def square(c: Context, x: Value) -> Value:
    return c.ew("mul", x, x)


def frac(c: Context, x: Value) -> Value:
    return c.ew("sub", x, c.ew("trunc", x))


def isfinite(c: Context, x: Value) -> Value:
    if not typeof(x).dtype.is_float:
        return c.full(typeof(x).shape, True, I1)
    return c.ew("lt", c.ew("abs", x), math.inf)


def infinite(sign: float) -> Lower:
    def lower(c: Context, x: Value) -> Value:
        return c.ew("eq", x, sign * math.inf) if typeof(x).dtype.is_float else c.full(typeof(x).shape, False, I1)
    return lower


def nan_to_num(c: Context, x: Value, nan: float | None, posinf: float | None, neginf: float | None) -> Value:
    if not typeof(x).dtype.is_float:
        return x
    limits = torch.finfo(TO_TORCH[typeof(x).dtype])
    y = c.ew("select", c.ew("isnan", x), 0.0 if nan is None else nan, x)
    y = c.ew("select", c.ew("eq", x, math.inf), limits.max if posinf is None else posinf, y)
    return c.ew("select", c.ew("eq", x, -math.inf), limits.min if neginf is None else neginf, y)


# -- binary -----------------------------------------------------------------------------------------------------------


def working_type(c: Context, *operands: Any, rounds: bool = False) -> DType:
    """The result's element type, or f32 where a number or 0-d operand would lose bits in a 16-bit float.

    `rounds` is for operators whose kernels round numbers first on CPUs: all but products, quotients and interpolations.
    """
    dtype = c.dtype
    if dtype.name not in ("bf16", "f16") or (rounds and c.fake().device.type == "cpu"):
        return dtype
    for x in operands:
        if isinstance(x, Value):
            t = typeof(x)
            if t.rank == 0 and t.dtype in (F32, F64) and len(c.shape) and not fits(c.constant_of(x), dtype):
                return F32
        elif not fits(x, dtype):
            return F32
    return dtype


def binary(name: str) -> Lower:
    """`graph.<name>` of both operands in the working type."""
    def lower(c: Context, a: Any, b: Any) -> Value:
        work = working_type(c, a, b, rounds=name != "mul")
        return c.cast(c.ew(name, c.scalar(a, work), c.scalar(b, work)), c.dtype)
    return lower


def nextafter(c: Context, a: Value, b: Value) -> Value:
    if c.dtype.bits < 32 and c.fake().device.type != "cpu":
        raise Unsupported("neighbours of 16-bit floats on a GPU")
    return binary("nextafter")(c, a, b)


def ignoring_nan(name: str, of_integers: str) -> Lower:
    return lambda c, a, b: binary(name if c.dtype.is_float else of_integers)(c, a, b)


def additive(name: str, swap: bool = False) -> Lower:
    """a +- alpha * b, or with `swap` b - alpha * a."""
    def lower(c: Context, a: Any, b: Any, alpha_: Any = 1, *, alpha: Any = None) -> Value:
        alpha = alpha_ if alpha is None else alpha
        work = working_type(c, a, b, alpha, rounds=True)
        x, y = c.scalar(a, work), c.scalar(b, work)
        if swap:
            x, y = y, x
        if alpha != 1:  # one rounding for both steps
            wide = F32 if work.bits < 32 else work
            return c.cast(c.ew(name, c.cast(x, wide), c.ew("mul", c.cast(y, wide), c.cast(c.scalar(alpha, work), wide))), c.dtype)
        return c.cast(c.ew(name, x, y), c.dtype)
    return lower


def _divisor(c: Context, y: Value) -> Value:
    """An integer divisor: eager raises RuntimeError for a zero among its elements (on CPUs; a GPU gives any number)."""
    if typeof(y).dtype.is_float or (c.constant_of(y) or 0) != 0:
        return y
    return c.ew("require", c.ew("ne", y, 0), y, message="ZeroDivisionError: an integer is divided by zero")


def remainder(name: str) -> Lower:
    """remainder and fmod."""
    def lower(c: Context, a: Any, b: Any) -> Value:
        work = working_type(c, a, b, rounds=True)
        return c.cast(c.ew(name, c.scalar(a, work), _divisor(c, c.scalar(b, work))), c.dtype)
    return lower


def div(c: Context, a: Any, b: Any, *, rounding_mode: str | None = None) -> Value:
    work = working_type(c, a, b)
    x, y = c.scalar(a, work), c.scalar(b, work)
    if rounding_mode is None:
        made = c.ew("div", x, y)
    elif rounding_mode == "floor":
        made = c.ew("floordiv", x, _divisor(c, y))
    elif work.is_float:
        made = c.ew("trunc", c.ew("div", x, y))
    else:
        made = c.ew("truncdiv", x, _divisor(c, y))
    return c.cast(made, c.dtype)


def floor_divide(c: Context, a: Any, b: Any) -> Value:
    return div(c, a, b, rounding_mode="floor")


def power(c: Context, a: Any, b: Any) -> Value:
    """The exponents that eager treats specially are written out: they are exact there, and cheap."""
    work = F32 if c.dtype.name in ("bf16", "f16") and not (isinstance(a, Value) and isinstance(b, Value)) else c.dtype
    exponent = c.constant_of(b) if not (isinstance(b, Value) and typeof(b).rank) else None
    if c.dtype.is_integer and exponent is not None and exponent < 0:
        raise Unsupported("integers to a negative power")  # ATen refuses them, unless they are a tensor's
    rule = _POWERS.get(float(exponent)) if exponent is not None else None
    if c.dtype.name == "f16" and exponent in (0.5, -0.5):
        rule = None  # eager takes no roots here: they differ for -0.0 and -inf
    if rule is not None and (work.is_float or exponent in (0, 1, 2, 3)):
        return c.cast(rule(c, c.scalar(a, work)), c.dtype)
    base = c.constant_of(a) if not isinstance(a, Value) else None
    if base == 2 and work.is_float:
        return c.cast(c.ew("exp2", c.scalar(b, work)), c.dtype)
    first = c.dtype if c.fake().device.type == "cpu" else work  # there, numbers are rounded before they are used
    return c.cast(c.ew("pow", c.cast(c.scalar(a, first), work), c.cast(c.scalar(b, first), work)), c.dtype)


_POWERS: dict[float, Lower] = {
    0.0: lambda c, x: c.full(typeof(x).shape, 1, typeof(x).dtype),
    1.0: lambda c, x: x,
    2.0: lambda c, x: c.ew("mul", x, x),
    3.0: lambda c, x: c.ew("mul", c.ew("mul", x, x), x),
    -1.0: lambda c, x: c.ew("reciprocal", x),
    -2.0: lambda c, x: c.ew("reciprocal", c.ew("mul", x, x)),
    0.5: lambda c, x: c.ew("sqrt", x),
    -0.5: lambda c, x: c.ew("rsqrt", x),
}


def comparison(name: str) -> Lower:
    def lower(c: Context, a: Any, b: Any) -> Value:
        common = c.promote(a, b)
        return c.ew(name, c.scalar(a, common), c.scalar(b, common))
    return lower


def logical(name: str) -> Lower:
    """and, or, xor of truth values."""
    return lambda c, a, b: c.ew(name, c.scalar(a, I1), c.scalar(b, I1))


def bitwise(name: str) -> Lower:
    return lambda c, a, b: c.ew(name, c.scalar(a, c.dtype), c.scalar(b, c.dtype))


def xlogy(log: str) -> Lower:
    """x * log(y), 0 where x is 0 and NaN where y is."""
    def lower(c: Context, x: Any, y: Any) -> Value:
        work = F32 if c.dtype.name in ("bf16", "f16") else c.dtype
        a, b = c.scalar(x, work), c.scalar(y, work)
        product = c.ew("select", c.ew("eq", a, 0), 0, c.ew("mul", a, c.ew(log, b)))
        return c.cast(c.ew("select", c.ew("isnan", b), math.nan, product), c.dtype)
    return lower


def logaddexp(exp: str) -> Lower:
    """log(exp(a) + exp(b)) (or with base 2) without overflow; equal infinities give themselves."""
    def lower(c: Context, a: Value, b: Value) -> Value:
        work = F32 if c.dtype.name in ("bf16", "f16") else c.dtype
        x, y = c.cast(a, work), c.cast(b, work)
        high = c.ew("max", x, y)
        gap = c.ew("neg", c.ew("abs", c.ew("sub", x, y)))
        correction = c.ew("log1p", c.ew(exp, gap))
        if exp == "exp2":
            correction = c.ew("mul", correction, 1 / math.log(2))
        same = c.ew("and", c.ew("isinf", x), c.ew("eq", x, y))
        return c.cast(c.ew("select", same, x, c.ew("add", high, correction)), c.dtype)
    return lower


# -- selection, clamping, interpolation -------------------------------------------------------------------------------


def where(c: Context, cond: Value, a: Any, b: Any) -> Value:
    return c.ew("select", c.cast(cond, I1), c.scalar(a, c.dtype), c.scalar(b, c.dtype))


def masked_fill(c: Context, x: Value, mask: Value, value: Any) -> Value:
    return c.expand(c.ew("select", c.cast(mask, I1), c.scalar(value, c.dtype), c.cast(x, c.dtype)), c.shape)


def clamp(c: Context, x: Value, low: Any = None, high: Any = None) -> Value:
    y = c.cast(x, c.dtype)
    if low is not None:
        y = c.ew("max", y, c.scalar(low, c.dtype))
    if high is not None:
        y = c.ew("min", y, c.scalar(high, c.dtype))
    return y


def clamp_max(c: Context, x: Value, high: Any) -> Value:
    return clamp(c, x, None, high)


def addcmul(op: str) -> Lower:
    """x + value * (a op b)."""
    def lower(c: Context, x: Value, a: Value, b: Value, *, value: Any) -> Value:
        work = working_type(c, value)
        inner = c.ew(op, c.cast(a, work), c.cast(b, work))
        if value != 1:
            inner = c.ew("mul", inner, c.scalar(value, work))
        return c.cast(c.ew("add", c.cast(x, work), inner), c.dtype)
    return lower


def fma(c: Context, a: Value, b: Value, addend: Value) -> Value:
    """a * b + addend, rounded once: what Dynamo makes of `addcmul_` and `addcdiv_` of an optimizer."""
    work = F32 if c.dtype.bits < 32 else c.dtype
    return c.cast(c.ew("fma", *(c.cast(c.scalar(v, work), work) for v in (a, b, addend))), c.dtype)


def lerp(c: Context, start: Value, end: Value, weight: Any) -> Value:
    """start + w * (end - start), from the nearer end: one fused multiply-add, as ATen's vector form."""
    work = F32 if c.dtype.bits < 32 else c.dtype
    a, b, w = c.cast(start, work), c.cast(end, work), c.scalar(weight, work)
    near = c.ew("lt", c.ew("abs", w), 0.5)
    coefficient = c.ew("select", near, w, c.ew("sub", w, 1))
    return c.cast(c.ew("fma", coefficient, c.ew("sub", b, a), c.ew("select", near, a, b)), c.dtype)


# -- activations ------------------------------------------------------------------------------------------------------


def in_f32(formula: Lower) -> Lower:
    """Evaluates a formula of several steps on 16-bit floats in f32, rounding once."""
    def lower(c: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
        work = F32 if c.dtype.name in ("bf16", "f16") else c.dtype
        return c.cast(formula(c, c.cast(x, work), *args, **kwargs), c.dtype)
    return lower


def gelu(c: Context, x: Value, *, approximate: str) -> Value:
    return c.ew("gelu", x, **({} if approximate == "none" else {"approximate": approximate}))


def elu(c: Context, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    scaled = x if input_scale == 1 else c.ew("mul", x, input_scale)
    negative = c.ew("mul", c.ew("expm1", scaled), alpha * scale)
    positive = x if scale == 1 else c.ew("mul", x, scale)
    return c.ew("select", c.ew("le", x, 0), negative, positive)


def leaky_relu(c: Context, x: Value, slope: float) -> Value:
    return c.ew("select", c.ew("gt", x, 0), x, c.ew("mul", x, slope))


def hardsigmoid(c: Context, x: Value) -> Value:
    return c.ew("mul", _six(c, x), 1 / 6)


def hardswish(c: Context, x: Value) -> Value:
    return c.ew("mul", c.ew("mul", x, _six(c, x)), 1 / 6)  # in eager's order: the product overflows where eager's does


def _six(c: Context, x: Value) -> Value:
    return clamp_to(c, c.ew("add", x, 3), 0, 6)


def clamp_to(c: Context, x: Value, low: float, high: float) -> Value:
    return c.ew("min", c.ew("max", x, low), high)


def softplus(c: Context, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    scaled = c.ew("mul", x, beta) if beta != 1 else x
    soft = c.ew("log1p", c.ew("exp", scaled))
    return c.ew("select", c.ew("gt", scaled, threshold), x, c.ew("div", soft, beta) if beta != 1 else soft)


def mish(c: Context, x: Value) -> Value:
    return c.ew("mul", x, c.ew("tanh", softplus(c, x)))


def threshold(c: Context, x: Value, limit: Any, value: Any) -> Value:
    return c.ew("select", c.ew("le", x, limit), value, x)


def threshold_backward(c: Context, grad: Value, x: Value, limit: Any) -> Value:
    return c.ew("select", c.ew("le", x, limit), c.full((), 0, typeof(grad).dtype), grad)


def hardtanh_backward(c: Context, grad: Value, x: Value, low: Any, high: Any) -> Value:
    outside = c.ew("or", c.ew("le", x, low), c.ew("ge", x, high))
    return c.ew("select", outside, c.full((), 0, typeof(grad).dtype), grad)


def prelu(c: Context, x: Value, weight: Value) -> Value:
    return c.ew("select", c.ew("gt", x, 0), x, c.ew("mul", weight, x))


# -- casts ------------------------------------------------------------------------------------------------------------


def to_copy(c: Context, x: Value, *, device: Any = None, **_: Any) -> Value:
    if not isinstance(x, Value):  # a number, where torch's decompositions promote one
        return c.scalar(x, c.dtype)
    source = c.argument(0)
    if device is not None and source.device != c.fake().device:
        raise Unsupported(f"a copy from {source.device} to {c.fake().device}")
    return c.cast(x, c.dtype)


def convert(c: Context, x: Value, dtype: Any) -> Value:
    return c.cast(x, from_torch(dtype))


def copy(c: Context, target: Value, source: Value, *_: Any) -> Value:
    return c.expand(c.cast(source, typeof(target).dtype), typeof(target).shape)


_UNARY = ("neg", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan",
          "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "erfinv", "lgamma",
          "digamma", "sigmoid", "abs", "sign", "relu", "silu")
_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")

ROWS: dict[str, Lower] = {
    **{f"aten.{n}.default": unary(n) for n in _UNARY},
    **{f"aten.{n}.default": rounding(n) for n in ("floor", "ceil", "trunc", "round")},
    "aten.round.decimals": round_decimals,
    **{f"aten.{n}.default": predicate(n) for n in ("isnan", "isinf")},
    **{f"aten.{n}.default": identity for n in ("alias", "clone", "detach", "lift_fresh_copy", "lift_fresh", "lift", "positive",
                                               "contiguous", "resolve_conj", "resolve_neg", "alias_copy", "detach_copy")},
    **{f"aten.{n}.default": identity_of_reals for n in ("_conj", "_conj_physical", "real")},
    "aten.bitwise_not.default": bitwise_not,
    "aten.logical_not.default": logical_not,
    "aten.sgn.default": sgn,
    "aten.signbit.default": signbit,
    "aten.square.default": square,
    "aten.frac.default": frac,
    "aten.isfinite.default": isfinite,
    "aten.isposinf.default": infinite(1.0),
    "aten.isneginf.default": infinite(-1.0),
    "aten.nan_to_num.default": nan_to_num,
    **{f"aten.add.{o}": additive("add") for o in ("Tensor", "Scalar")},
    **{f"aten.sub.{o}": additive("sub") for o in ("Tensor", "Scalar")},
    **{f"aten.rsub.{o}": additive("sub", swap=True) for o in ("Tensor", "Scalar")},
    **{f"aten.mul.{o}": binary("mul") for o in ("Tensor", "Scalar")},
    **{f"aten.multiply.{o}": binary("mul") for o in ("Tensor", "Scalar")},
    **{f"aten.subtract.{o}": additive("sub") for o in ("Tensor", "Scalar")},
    **{f"aten.{n}.{o}": div for n in ("divide", "true_divide") for o in ("Tensor", "Scalar")},
    **{f"aten.divide.{o}": div for o in ("Tensor_mode", "Scalar_mode")},
    **{f"aten.div.{o}": div for o in ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode")},
    **{f"aten.floor_divide.{o}": floor_divide for o in ("default", "Scalar")},
    **{f"aten.remainder.{o}": remainder("mod") for o in ("Tensor", "Scalar", "Scalar_Tensor")},
    **{f"aten.fmod.{o}": remainder("rem") for o in ("Tensor", "Scalar")},
    **{f"aten.pow.{o}": power for o in ("Tensor_Tensor", "Tensor_Scalar", "Scalar")},
    "aten.maximum.default": binary("max"),
    "aten.minimum.default": binary("min"),
    **{f"aten.{n}.default": binary(n) for n in ("atan2", "hypot")},
    "aten.nextafter.default": nextafter,
    "aten.fmax.default": ignoring_nan("fmax", "max"),
    "aten.fmin.default": ignoring_nan("fmin", "min"),
    **{f"aten.copysign.{o}": binary("copysign") for o in ("Tensor", "Scalar")},
    **{f"aten.{n}.{o}": comparison(n) for n in _COMPARE for o in ("Tensor", "Scalar")},
    **{f"aten.logical_{n}.default": logical(n) for n in ("and", "or", "xor")},
    **{f"aten.bitwise_{n}.{o}": bitwise(n) for n in ("and", "or", "xor") for o in ("Tensor", "Scalar", "Scalar_Tensor")},
    **{f"aten.bitwise_{t}_shift.{o}": bitwise(n) for t, n in (("left", "shl"), ("right", "shr"))
       for o in ("Tensor", "Tensor_Scalar", "Scalar_Tensor")},
    **{f"aten.__{t}__.{o}": bitwise(n) for t, n in (("lshift", "shl"), ("rshift", "shr")) for o in ("Tensor", "Scalar")},
    **{f"aten.xlogy.{o}": xlogy("log") for o in ("Tensor", "Scalar_Other", "Scalar_Self")},
    **{f"aten.special_xlog1py.{o}": xlogy("log1p") for o in ("default", "other_scalar", "self_scalar")},
    "aten.logaddexp.default": logaddexp("exp"),
    "aten.logaddexp2.default": logaddexp("exp2"),
    **{f"aten.where.{o}": where for o in ("self", "ScalarOther", "ScalarSelf", "Scalar")},
    **{f"aten.masked_fill.{o}": masked_fill for o in ("Scalar", "Tensor")},
    **{f"aten.clamp.{o}": clamp for o in ("default", "Tensor")},
    **{f"aten.clamp_min.{o}": clamp for o in ("default", "Tensor")},
    **{f"aten.clamp_max.{o}": clamp_max for o in ("default", "Tensor")},
    "aten.addcmul.default": addcmul("mul"),
    "aten.addcdiv.default": addcmul("div"),
    "prims.fma.default": fma,
    **{f"aten.lerp.{o}": lerp for o in ("Scalar", "Tensor")},
    "aten.gelu.default": gelu,
    "aten.elu.default": in_f32(elu),
    "aten.leaky_relu.default": in_f32(leaky_relu),
    "aten.hardsigmoid.default": in_f32(hardsigmoid),
    "aten.hardswish.default": in_f32(hardswish),
    "aten.hardtanh.default": clamp,
    "aten.relu6.default": lambda c, x: clamp(c, x, 0, 6),
    "aten.softplus.default": in_f32(softplus),
    "aten.mish.default": in_f32(mish),
    "aten.threshold.default": threshold,
    "aten.threshold_backward.default": threshold_backward,
    "aten.hardtanh_backward.default": hardtanh_backward,
    "aten._prelu_kernel.default": prelu,
    "aten._to_copy.default": to_copy,
    "prims.convert_element_type.default": convert,
    "aten.copy.default": copy,
}
