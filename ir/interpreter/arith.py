"""Reference semantics of scalar arithmetic, elementwise on torch tensors that broadcast.

Entry points: `apply(name, operands)` for the rows of `dialects/arith.py`, `select` and `convert`; `HANDLERS` has all arith ops.

Element types narrower than 32 bits are computed in f32 and rounded once, as torch does; `fma` is computed in f64.
torch has next to no kernels for u16, u32 and u64: those go through numpy, which has all of them.
Division by zero of integers gives 0 here (undefined on the targets): lanes outside a mask may hold any divisor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..core import Operation
from ..dialects.arith import BY_NAME, ROWS

if TYPE_CHECKING:
    from .context import Context

Tensor = torch.Tensor
Binary = Callable[[Tensor, Tensor], Tensor]

__all__ = ["HANDLERS", "SAME_WIDTH_SIGNED", "WIDE_UNSIGNED", "apply", "convert", "require", "select"]

SAME_WIDTH_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
WIDE_UNSIGNED = frozenset(SAME_WIDTH_SIGNED)
_NARROW = frozenset({torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2})


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c in f64. The product of two f64 is split exactly (Dekker 1971), so that the sum is rounded about once."""
    product = a * b
    splitter = float(2**27 + 1)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        high = x * splitter - (x * splitter - x)
        return high, x - high

    (ah, al), (bh, bl) = split(a), split(b)
    lost = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    total = product + c
    part = total - product
    lost = lost + ((product - (total - part)) + (c - part))
    return total + torch.where(torch.isfinite(lost), lost, torch.zeros_like(lost))


def _integer_division(divide: Binary, on_minus_one: Callable[[Tensor], Tensor]) -> Binary:
    """`divide`, kept away from the divisors 0 and -1 that trap on some machines."""
    def run(a: Tensor, b: Tensor) -> Tensor:
        if a.is_floating_point():
            return divide(a, b)
        trap = (b == 0) | (b == -1) if b.dtype.is_signed else b == 0
        safe = divide(a, torch.where(trap, torch.ones_like(b), b))
        return torch.where(b == 0, torch.zeros_like(safe), torch.where(trap, on_minus_one(a), safe))
    return run


def _round_quotient(mode: str) -> Binary:
    return lambda a, b: torch.div(a, b, rounding_mode=mode)


_TORCH: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "bitnot": torch.bitwise_not, "isnan": torch.isnan,
    "isinf": torch.isinf, "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc, "round": torch.round,
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log, "log2": torch.log2, "log10": torch.log10,
    "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "sin": torch.sin,
    "cos": torch.cos, "tan": torch.tan, "asin": torch.asin, "acos": torch.acos, "atan": torch.atan, "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh, "asinh": torch.asinh, "acosh": torch.acosh, "atanh": torch.atanh, "erf": torch.erf, "erfc": torch.erfc,
    "erfinv": torch.erfinv, "lgamma": torch.lgamma, "digamma": torch.digamma, "sigmoid": torch.sigmoid,
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
    "floordiv": _integer_division(_round_quotient("floor"), torch.neg),
    "truncdiv": _integer_division(_round_quotient("trunc"), torch.neg),
    "mod": _integer_division(torch.remainder, torch.zeros_like), "rem": _integer_division(torch.fmod, torch.zeros_like),
    "pow": torch.pow, "atan2": torch.atan2, "hypot": torch.hypot, "copysign": torch.copysign, "nextafter": torch.nextafter,
    "max": torch.maximum, "min": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin,
    "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift,
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "fma": _fma,
}
_UNSIGNED: dict[str, Callable[..., np.ndarray]] = {
    "neg": np.negative, "abs": np.positive, "sign": lambda x: (x != 0).astype(x.dtype), "bitnot": np.bitwise_not,
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide, "truncdiv": np.floor_divide,
    "mod": np.mod, "rem": np.mod, "pow": np.power, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift, "eq": np.equal,
    "ne": np.not_equal, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}
_OWN_PRECISION = frozenset({"nextafter"})  # a neighbour in the type itself


def apply(name: str, operands: Sequence[Tensor]) -> Tensor:
    """`arith.<name>` on broadcasting tensors of one element type; comparisons and predicates give bool tensors."""
    kind = operands[0].dtype
    if kind in WIDE_UNSIGNED:
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.asarray(_UNSIGNED[name](*(x.numpy() for x in operands))))
    predicate = BY_NAME[name].result == "i1"
    wide = kind
    if name == "fma":
        wide = torch.float64
    elif kind in _NARROW and name not in _OWN_PRECISION:
        wide = torch.float32
    if wide != kind:
        operands = [x.to(wide) for x in operands]
    result = _TORCH[name](*operands)
    return result if predicate else result.to(kind)


def select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where `condition`, else `b`, of one element type. (Not all of torch's versions choose between wide unsigned numbers.)"""
    signed = SAME_WIDTH_SIGNED.get(a.dtype)
    if signed is None:
        return torch.where(condition, a, b)
    return torch.where(condition, a.view(signed), b.view(signed)).view(a.dtype)


def convert(x: Tensor, to: torch.dtype) -> Tensor:
    """`x` as `to`: floats to integers truncate, anything to bool compares with zero."""
    if x.dtype == to:
        return x
    if to == torch.bool and x.dtype in _NARROW:
        return x.to(torch.float32) != 0
    return x.to(to)


def _row(name: str) -> Callable[[Context, Operation, list[Any]], list[Any]]:
    return lambda ctx, op, xs: [apply(name, xs)]


def _select(ctx: Context, op: Operation, xs: list[Any]) -> list[Any]:
    return [select(*xs)]


def _cast(ctx: Context, op: Operation, xs: list[Any]) -> list[Any]:
    return [ctx.numerics.cast(xs[0], op.result.type.dtype)]  # type: ignore[attr-defined]


def _constant(ctx: Context, op: Operation, xs: list[Any]) -> list[Any]:
    return [ctx.scalar(op["value"], op.result.type.dtype)]  # type: ignore[attr-defined]


def require(ctx: Context, op: Operation, xs: list[Any]) -> list[Any]:
    """The value of `graph.require` and `tensor.require`. IndexError, whatever the compiled program raises, if the condition fails."""
    cond, value = torch.broadcast_tensors(*xs)
    if not bool(cond.all()):
        raise IndexError(op["message"])
    return [value]


HANDLERS: Mapping[str, Callable[[Context, Operation, list[Any]], list[Any]]] = {
    **{f"arith.{row.name}": _row(row.name) for row in ROWS},
    "arith.select": _select, "arith.cast": _cast, "arith.constant": _constant,
}
