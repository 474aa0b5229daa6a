"""Random numbers from counters: the operators of `frontend/random.py`, through `graph.random_bits`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...ir.core import Value
from ...ir.types import DTYPES, DType, TensorType
from ..context import F32, F64, I64, Context
from ..extern import make_extern
from .table import Lower

I32, U32, U64 = (DTYPES[n] for n in ("i32", "u32", "u64"))
_DIGITS = {"f32": 24, "f16": 11, "bf16": 8}


def random_seed(c: Context, device: Any) -> Value:
    """The only draw from torch's generator: any i64 but the largest."""
    made, = make_extern(c, "aten.randint.low", [], (-(1 << 63), (1 << 63) - 1, ()),
                        {"dtype": {"dtype": "i64"}, "device": {"device": str(device)}}, [TensorType((), I64)], ["tensor"], random=True,
                        reason="one seed per call comes from torch's generator")
    return made


def _bits(c: Context, seed: Value, dtype: DType, stream: int, pair: int = 0) -> Value:
    extra = {"pair": pair} if pair else {}
    return c.b.op("graph.random_bits", seed, type=TensorType(c.shape, dtype), stream=stream, **extra)


def _scaled(c: Context, bits: Value, drop: int, through: DType, dtype: DType, digits: int) -> Value:
    """The upper bits as a fraction. They fit the signed type `through`, which converts faster than an unsigned one."""
    whole = c.cast(c.ew("shr", bits, drop) if drop else bits, through)
    return c.ew("mul", c.cast(whole, dtype), 2.0**-digits)


def _fraction64(c: Context, bits: Value) -> Value:
    return _scaled(c, bits, 11, I64, F64, 53)


def random_uniform(c: Context, seed: Value, size: Sequence[Any], stream: int, dtype: Any) -> Value:
    if c.dtype == F64:
        return _fraction64(c, _bits(c, seed, U64, stream))
    digits = _DIGITS[c.dtype.name]
    return c.cast(_scaled(c, _bits(c, seed, U32, stream), 32 - digits, I32, F32, digits), c.dtype)


def random_normal(c: Context, seed: Value, size: Sequence[Any], stream: int, dtype: Any) -> Value:
    """Box and Muller: sqrt(-2 ln u) cos(2 pi v), with u in (0, 1] from 31 (53) bits and v in [0, 1) from 24 (53)."""
    bits = _bits(c, seed, U64, stream)
    if c.dtype == F64:
        u = c.ew("sub", 1.0, _fraction64(c, bits))
        v = _fraction64(c, _bits(c, seed, U64, stream, 1))
    else:
        low = c.cast(c.ew("shr", c.cast(bits, U32), 1), I32)
        u = c.ew("mul", c.ew("add", c.cast(low, F32), 1.0), 2.0**-31)
        v = _scaled(c, c.cast(c.ew("shr", bits, 32), U32), 8, I32, F32, 24)
    radius = c.ew("sqrt", c.ew("mul", c.ew("log", u), -2.0))
    return c.cast(c.ew("mul", radius, c.ew("cos", c.ew("mul", v, 2 * math.pi))), c.dtype)


def random_integers(c: Context, seed: Value, size: Sequence[Any], low: Any, high: Any, stream: int) -> Value:
    """low + floor(w * span / 2^32); for spans that are larger or symbolic, low + 63 bits modulo the span."""
    span = high - low
    if isinstance(span, int) and span <= 1 << 32:
        product = c.ew("mul", c.cast(_bits(c, seed, U32, stream), U64), span)
        return c.ew("add", c.cast(c.ew("shr", product, 32), I64), c.scalar(low, I64))
    wide = c.cast(c.ew("shr", _bits(c, seed, U64, stream), 1), I64)
    return c.ew("add", c.ew("rem", wide, c.scalar(span, I64)), c.scalar(low, I64))


ROWS: dict[str, Lower] = {f"aicc.{f.__name__}.default": f for f in (random_seed, random_uniform, random_normal, random_integers)}
