"""Reductions, scans, and the softmax family."""

from __future__ import annotations

import math
from typing import Any

from ...ir.core import Value
from ...ir.types import TensorType
from ..context import F32, I1, I64, Context, like, typeof
from ..dtypes import from_torch
from ..errors import Unsupported
from .table import Lower


def _rank(x: Value) -> int:
    return typeof(x).rank


def simple(name: str) -> Lower:
    """A reduction in the result's element type: op(x, dims=all, keepdim=False, *, dtype)."""
    def lower(c: Context, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
        return c.reduce(name, c.cast(x, c.dtype), c.axes(dims, _rank(x)), keepdim)
    return lower


def whole(name: str) -> Lower:
    """The same over all dimensions; the operator has no `dims` argument."""
    return lambda c, x, *, dtype=None: c.reduce(name, c.cast(x, c.dtype), c.axes(None, _rank(x)))


def prod_dim(c: Context, x: Value, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return c.reduce("prod", c.cast(x, c.dtype), c.axes(dim, _rank(x)), keepdim)


def truth(name: str) -> Lower:
    """any and all; uint8 inputs give uint8."""
    def lower(c: Context, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
        return c.cast(c.reduce(name, c.cast(x, I1), c.axes(dims, _rank(x)), keepdim), c.dtype)
    return lower


def extreme(name: str) -> Lower:
    """amax and amin (also of i1, as or and and)."""
    return lambda c, x, dims=(), keepdim=False: c.reduce(name, x, c.axes(dims, _rank(x)), keepdim)


def position(name: str) -> Lower:
    def lower(c: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        rank = _rank(x)
        if rank == 0:
            return c.full((), 0, I64)
        if dim is not None:
            return c.reduce(name, x, c.axes(dim, rank), keepdim, I64)
        flat = c.reduce(name, c.reshape(x, (c.numel(x, range(rank)),)), (0,), False, I64)
        return c.reshape(flat, c.shape)
    return lower


def extreme_dim(value: str, index: str) -> Lower:
    """max.dim and min.dim: the extreme and its position."""
    def lower(c: Context, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
        if _rank(x) == 0:
            return x, c.full((), 0, I64)
        axes = c.axes(dim, _rank(x))
        return c.reduce(value, x, axes, keepdim), c.reduce(index, x, axes, keepdim, I64)
    return lower


def aminmax(c: Context, x: Value, *, dim: int | None = None, keepdim: bool = False) -> tuple[Value, Value]:
    axes = c.axes(dim, _rank(x))
    return c.reduce("amin", x, axes, keepdim), c.reduce("amax", x, axes, keepdim)


# -- moments ----------------------------------------------------------------------------------------------------------


def _var_mean(c: Context, x: Value, dims: Any, correction: Any, keepdim: bool, exact: bool) -> tuple[Value, Value]:
    t = typeof(x)
    if not t.dtype.is_float:
        raise Unsupported(f"variance of {t.dtype}")
    axes = c.axes(dims, t.rank)
    if not axes:
        raise Unsupported("variance of a 0-d tensor")
    shape = tuple(1 if i in axes else s for i, s in enumerate(t.shape) if keepdim or i not in axes)
    attrs = {"dims": axes, "correction": float(correction), **({"keepdim": True} if keepdim else {}), **({"exact": True} if exact else {})}
    made = c.b.create("graph.var_mean", [x], attrs, [TensorType(shape, t.dtype)] * 2)
    return made.results[0], made.results[1]


def variance(root: bool, mean: bool, unbiased: bool) -> Lower:
    """var, std, var_mean and std_mean. Overloads differ in how the correction is said: a flag, or a number (1 when none).

    A variance alone is a result that somebody looks at; one with its mean is a norm's, whose square root forgives a rounding.
    """
    def finish(c: Context, x: Value, dims: Any, correction: Any, keepdim: bool) -> Any:
        var, average = _var_mean(c, x, dims, 1 if correction is None else correction, keepdim, exact=not mean and c.dtype.name == "f32")
        var = c.ew("sqrt", var) if root else var
        return (var, average) if mean else var

    def by_flag(c: Context, x: Value, *args: Any) -> Any:
        dims, flag, keepdim = (None, args[0], False) if len(args) == 1 else args
        return finish(c, x, dims, int(flag), keepdim)

    def by_number(c: Context, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
        return finish(c, x, dims, correction, keepdim)

    return by_flag if unbiased else by_number


def vector_norm(c: Context, x: Value, ord: Any = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    axes = c.axes(dims, _rank(x))
    work = F32 if c.dtype.name in ("bf16", "f16") else c.dtype
    a = c.ew("abs", c.cast(x, work))
    ord = float(ord)
    if ord == math.inf:
        made = c.reduce("amax", a, axes, keepdim)
    elif ord == -math.inf:
        made = c.reduce("amin", a, axes, keepdim)
    elif ord == 0:
        made = c.reduce("sum", c.cast(c.ew("ne", a, 0), work), axes, keepdim)
    elif ord == 1:
        made = c.reduce("sum", a, axes, keepdim)
    elif ord == 2:
        made = c.ew("sqrt", c.reduce("sum", c.ew("mul", a, a), axes, keepdim))
    else:
        made = c.ew("pow", c.reduce("sum", c.ew("pow", a, ord), axes, keepdim), 1 / ord)
    return c.cast(made, c.dtype)


def logsumexp(c: Context, x: Value, dims: Any, keepdim: bool = False) -> Value:
    """The maximum and the logarithm of a sum. In 16 bits ATen rounds after each step, and so may we (`emulate_precision_casts`)."""
    work = F32 if c.dtype.name in ("bf16", "f16") else c.dtype

    def rounded(v: Value) -> Value:
        return c.cast(c.cast(v, c.dtype), work)

    x = c.cast(x, work)
    axes = c.axes(dims, _rank(x))
    high = c.reduce("amax", x, axes, True)
    high = c.ew("select", c.ew("isinf", high), 0, high)  # of infinities only: nothing to subtract
    terms = rounded(c.ew("exp", rounded(c.ew("sub", x, high))))
    total = rounded(c.ew("log", rounded(c.reduce("sum", terms, axes, True))))
    made = c.ew("add", total, high)
    shape = [1 if i in axes else s for i, s in enumerate(typeof(x).shape) if keepdim or i not in axes]
    return c.cast(c.reshape(made, shape), c.dtype)


def count_nonzero(c: Context, x: Value, dims: Any = None) -> Value:
    return c.reduce("sum", c.cast(c.cast(x, I1), I64), c.axes(dims, _rank(x)))


# -- scans and softmax ------------------------------------------------------------------------------------------------


def scan(kind: str) -> Lower:
    def lower(c: Context, x: Value, dim: int, *, dtype: Any = None) -> Value:
        x = c.cast(x, c.dtype)
        if _rank(x) == 0:
            return x
        return c.b.op("graph.scan", x, type=like(x), dim=c.axis(dim, _rank(x)), kind=kind)
    return lower


def softmax(name: str) -> Lower:
    def lower(c: Context, x: Value, dim: int, half_to_float: Any = None, *, dtype: Any = None) -> Value:
        x = c.cast(x, c.dtype)
        if _rank(x) == 0:
            return c.full((), 1.0 if name == "softmax" else 0.0, c.dtype)
        return c.b.op(f"graph.{name}", x, type=like(x), dim=c.axis(dim, _rank(x)))
    return lower


def safe_softmax(c: Context, x: Value, dim: int, dtype: Any = None) -> Value:
    """Softmax that gives zeros, not NaN, to rows that are -inf throughout."""
    x = c.cast(x, from_torch(dtype) if dtype is not None else c.dtype)
    made = softmax("softmax")(c, x, dim)
    empty = c.reduce("all", c.ew("eq", x, -math.inf), c.axes(dim, _rank(x)), True)
    return c.ew("select", empty, 0, made)


_MOMENTS: dict[str, Lower] = {
    f"aten.{n}.{o}": variance(n.startswith("std"), n.endswith("mean"), unbiased=o != "correction")
    for n in ("var", "std", "var_mean", "std_mean") for o in ("default", "dim", "correction")}

ROWS: dict[str, Lower] = {
    "aten.sum.default": whole("sum"),
    "aten.sum.dim_IntList": simple("sum"),
    "aten.nansum.default": lambda c, x, dims=None, keepdim=False, *, dtype=None: simple("sum")(
        c, c.ew("select", c.ew("isnan", x), 0, x) if typeof(x).dtype.is_float else x, dims, keepdim),
    "aten.mean.default": whole("mean"),
    "aten.mean.dim": simple("mean"),
    "aten.prod.default": whole("prod"),
    "aten.prod.dim_int": prod_dim,
    **{f"aten.any.{o}": truth("any") for o in ("default", "dim", "dims")},
    **{f"aten.all.{o}": truth("all") for o in ("default", "dim", "dims")},
    "aten.amax.default": extreme("amax"),
    "aten.amin.default": extreme("amin"),
    "aten.max.default": extreme("amax"),
    "aten.min.default": extreme("amin"),
    "aten.max.dim": extreme_dim("amax", "argmax"),
    "aten.min.dim": extreme_dim("amin", "argmin"),
    "aten.aminmax.default": aminmax,
    "aten.argmax.default": position("argmax"),
    "aten.argmin.default": position("argmin"),
    **_MOMENTS,
    "aten.linalg_vector_norm.default": vector_norm,
    "aten.logsumexp.default": logsumexp,
    **{f"aten.count_nonzero.{o}": count_nonzero for o in ("default", "dim_IntList")},
    "aten.cumsum.default": scan("sum"),
    "aten.cumprod.default": scan("prod"),
    "aten.logcumsumexp.default": scan("logsumexp"),
    "aten._softmax.default": softmax("softmax"),
    "aten._log_softmax.default": softmax("log_softmax"),
    "aten.softmax.int": lambda c, x, dim, dtype=None: softmax("softmax")(c, x, dim),
    "aten.log_softmax.int": lambda c, x, dim, dtype=None: softmax("log_softmax")(c, x, dim),
    "aten._safe_softmax.default": safe_softmax,
}
