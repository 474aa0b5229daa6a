"""Layer, RMS, group and batch normalisation."""

from __future__ import annotations

from typing import Any

import torch

from ...ir.core import Value
from ...ir.types import DType, TensorType
from ..context import F32, Context, typeof
from ..dtypes import TO_TORCH
from .table import Lower


def _weights(c: Context, dtype: DType, weight: Value | None, bias: Value | None) -> list[Value]:
    """[], [weight] or [weight, bias] in the input's type; ones stand in for a missing weight."""
    if bias is not None and weight is None:
        weight = c.full(typeof(bias).shape, 1.0, dtype)
    return [c.cast(w, dtype) for w in (weight, bias) if w is not None]


def _cast_all(c: Context, made: list[Value]) -> tuple[Value, ...]:
    return tuple(c.cast(v, c.out(i).dtype) for i, v in enumerate(made))


def _layer_norm(c: Context, x: Value, normalized: Any, weight: Value | None, bias: Value | None, eps: float) -> list[Value]:
    """Result, mean and rstd; the statistics keep their dimensions, as in torch."""
    t = typeof(x)
    stats = TensorType((*t.shape[:t.rank - len(normalized)], *(1,) * len(normalized)), _statistics(t.dtype))
    attrs = {"ndims": len(normalized), "eps": float(eps)}
    made = c.b.create("graph.layer_norm", [x, *_weights(c, t.dtype, weight, bias)], attrs, [t, stats, stats])
    return list(made.results)


def layer_norm(c: Context, *args: Any) -> tuple[Value, ...]:
    return _cast_all(c, _layer_norm(c, *args))


def layer_norm_only(c: Context, x: Value, normalized: Any, weight: Value | None = None, bias: Value | None = None,
                    eps: float = 1e-5, *_: Any) -> Value:
    """The composite form, which gives the result alone."""
    return _layer_norm(c, x, normalized, weight, bias, eps)[0]


def rms_norm(c: Context, x: Value, normalized: Any, weight: Value | None, eps: float | None) -> tuple[Value, Value]:
    """(result, rstd) of _fused_rms_norm; without eps, the smallest step of the input's type."""
    t = typeof(x)
    eps = torch.finfo(TO_TORCH[t.dtype]).eps if eps is None else eps
    stats = TensorType((*t.shape[:t.rank - len(normalized)], *(1,) * len(normalized)), _statistics(t.dtype))
    made = c.b.create("graph.rms_norm", [x, *_weights(c, t.dtype, weight, None)], {"ndims": len(normalized), "eps": float(eps)},
                      [t, stats])
    return made.results[0], made.results[1]


def fused_rms_norm(c: Context, *args: Any) -> tuple[Value, ...]:
    return _cast_all(c, list(rms_norm(c, *args)))


def group_norm(c: Context, x: Value, weight: Value | None, bias: Value | None, n: Any, channels: Any, area: Any, groups: int,
               eps: float) -> tuple[Value, ...]:
    """(result, mean, rstd); the statistics are [N, groups]."""
    t = typeof(x)
    stats = TensorType((t.shape[0], groups), _statistics(t.dtype))
    made = c.b.create("graph.group_norm", [x, *_weights(c, t.dtype, weight, bias)], {"groups": groups, "eps": float(eps)},
                      [t, stats, stats])
    return _cast_all(c, list(made.results))


def _statistics(dtype: DType) -> DType:
    return F32 if dtype.bits < 32 else dtype


def batch_norm_inference(c: Context, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value,
                         momentum: float, eps: float) -> tuple[Value, ...]:
    """x * scale + shift, folded per channel first, as ATen does: scale = weight * rsqrt(var + eps)."""
    t = typeof(x)
    work = _statistics(t.dtype)
    scale = c.ew("rsqrt", c.ew("add", c.cast(var, work), eps))
    if weight is not None:
        scale = c.ew("mul", scale, c.cast(weight, work))
    shift = c.ew("neg", c.ew("mul", c.cast(mean, work), scale))
    if bias is not None:
        shift = c.ew("add", shift, c.cast(bias, work))
    per_channel = (typeof(scale).shape[0], *(1,) * (t.rank - 2))
    y = c.ew("add", c.ew("mul", c.cast(x, work), c.reshape(scale, per_channel)), c.reshape(shift, per_channel))
    return (c.cast(y, t.dtype), *(c.full(c.out(i).shape, 0, c.out(i).dtype) for i in range(1, len(c.val))))


ROWS: dict[str, Lower] = {
    "aten.native_layer_norm.default": layer_norm,
    "aten.layer_norm.default": layer_norm_only,
    "aten._fused_rms_norm.default": fused_rms_norm,
    "aten.rms_norm.default": lambda c, x, shape, weight=None, eps=None: rms_norm(c, x, shape, weight, eps)[0],
    "aten.native_group_norm.default": group_norm,
    "aten._native_batch_norm_legit_no_training.default": batch_norm_inference,
}
