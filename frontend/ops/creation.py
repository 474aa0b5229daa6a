"""Operators that make tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.core import Value
from ...ir.expr import Dim, Expr
from ..context import F32, F64, I64, Context, SymScalar
from ..errors import Unsupported
from .table import Lower


def _filled(c: Context, value: Any) -> Value:
    if isinstance(value, (Expr, SymScalar, Value)):
        return c.expand(c.scalar(value, c.dtype), c.shape)
    return c.full(c.shape, value, c.dtype)


def full(c: Context, size: Sequence[Any], value: Any, **_: Any) -> Value:
    return _filled(c, value)


def full_like(c: Context, x: Any, value: Any, **_: Any) -> Value:
    return _filled(c, value)


def new_full(c: Context, x: Value, size: Sequence[Any], value: Any, **_: Any) -> Value:
    return _filled(c, value)


def filled_with(value: int) -> Lower:
    """Any signature: the shape and element type are the result's. `empty` gives zeros, since its elements are anybody's."""
    return lambda c, *_, **__: c.full(c.shape, value, c.dtype)


def scalar_tensor(c: Context, value: Any, **_: Any) -> Value:
    return _filled(c, value)


def arange(c: Context, start: Any, end: Any, step: Any = 1, **_: Any) -> Value:
    """start + step * i; floats are formed in f64 and rounded once, as ATen does."""
    size, = c.shape
    if all(isinstance(v, (int, Expr)) and not isinstance(v, bool) for v in (start, step)):
        if c.dtype.is_integer:
            return c.iota(size, c.dtype, start, step)
        return c.cast(c.iota(size, I64, start, step), c.dtype)
    if all((isinstance(v, float) and v.is_integer()) or isinstance(v, int) for v in (start, step)):
        return c.cast(c.iota(size, I64, int(start), int(step)), c.dtype)
    if not c.dtype.is_float:
        raise Unsupported("an integer range with fractional steps")
    scaled = c.ew("mul", c.cast(c.iota(size), F64), c.scalar(step, F64))
    return c.cast(c.ew("add", scaled, c.scalar(start, F64)), c.dtype)


def arange_end(c: Context, end: Any, **kwargs: Any) -> Value:
    return arange(c, 0, end)


def linspace(c: Context, start: Any, end: Any, steps: int, **_: Any) -> Value:
    """From both ends toward the middle, as ATen does, so that the last element is exact."""
    size, = c.shape
    if not c.dtype.is_float or not isinstance(steps, int) or any(not isinstance(v, (int, float)) for v in (start, end)):
        raise Unsupported("linspace of integers or with symbolic ends")
    if steps == 1:
        return c.full(c.shape, start, c.dtype)
    work = F64 if c.dtype == F64 else F32
    step = (float(end) - float(start)) / (steps - 1)
    i = c.iota(size)
    left = c.ew("add", c.ew("mul", c.cast(i, work), step), float(start))
    right = c.ew("sub", float(end), c.ew("mul", c.cast(c.ew("sub", steps - 1, i), work), step))
    return c.cast(c.ew("select", c.ew("lt", i, steps // 2), left, right), c.dtype)


def eye(c: Context, n: Any, m: Any = None, **_: Any) -> Value:
    shape: tuple[Dim, ...] = c.shape
    return c.cast(c.ew("eq", c.positions(shape, 0), c.positions(shape, 1)), c.dtype)


def iota(c: Context, length: Any, *, start: Any, step: Any, **_: Any) -> Value:
    return c.iota(c.shape[0], c.dtype, start, step)


_ZEROS = ("zeros.default", "zeros_like.default", "new_zeros.default", "empty.memory_format", "empty_like.default",
          "new_empty.default", "empty_strided.default", "new_empty_strided.default", "empty_permuted.default")

ROWS: dict[str, Lower] = {
    "aten.full.default": full,
    "aten.full_like.default": full_like,
    "aten.fill.Scalar": full_like,
    "aten.fill.Tensor": full_like,
    "aten.new_full.default": new_full,
    **{f"aten.{n}": filled_with(0) for n in _ZEROS},
    **{f"aten.{n}": filled_with(1) for n in ("ones.default", "ones_like.default", "new_ones.default")},
    "aten.scalar_tensor.default": scalar_tensor,
    "aten.arange.start_step": arange,
    "aten.arange.start": arange,
    "aten.arange.default": arange_end,
    "aten.linspace.default": linspace,
    **{f"aten.eye.{o}": eye for o in ("default", "m")},
    "prims.iota.default": iota,
}
