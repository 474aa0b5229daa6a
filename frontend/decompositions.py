"""Which operators AOTAutograd takes apart before aicc sees them.

`decomposition_table()` is torch's core table, plus decompositions that torch keeps out of it and aicc profits from, plus our own
(`formulas.py`), minus the composites that stay whole because the graph level has an op for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

from .foreach import foreach_table
from .formulas import FORMULAS

__all__ = ["decomposition_table"]

aten = torch.ops.aten

_WHOLE = (
    aten.native_layer_norm, aten.layer_norm, aten._fused_rms_norm, aten.rms_norm, aten.native_group_norm, aten._softmax,
    aten._log_softmax, aten._safe_softmax, aten.gelu, aten.silu, aten.relu, aten.relu6, aten.elu, aten.leaky_relu,
    aten.hardswish, aten.hardsigmoid, aten.hardtanh, aten.softplus, aten.mish, aten.threshold, aten.threshold_backward,
    aten.hardtanh_backward, aten.prelu, aten._prelu_kernel, aten.embedding, aten.addmm, aten.baddbmm, aten.addmv,
    aten.mv, aten.dot, aten.vdot, aten.linear, aten.cumsum, aten.var, aten.std, aten.var_mean, aten.std_mean,
    aten.logsumexp, aten.sum, aten.all, aten.any, aten.count_nonzero, aten.nansum, aten.aminmax,
    aten.native_dropout, aten.clamp_min, aten.clamp_max, aten.addcmul, aten.addcdiv, aten.lerp, aten.rsub,
    aten.masked_fill, aten.square, aten.sgn, aten.frac, aten.isfinite, aten.isposinf, aten.isneginf, aten.nan_to_num,
    aten.xlogy, aten.logaddexp, aten.logaddexp2, aten.floor_divide, aten.special_xlog1py, aten.transpose, aten.t,
    aten.stack, aten.split, aten.unbind, aten.roll, aten.tril, aten.triu, aten.pixel_shuffle, aten.pixel_unshuffle,
    aten.select_scatter, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d, aten.replication_pad1d,
    aten.replication_pad2d, aten.replication_pad3d, aten.index_add, aten.index_copy, aten.index_fill, aten.take,
    aten._unsafe_index, aten._unsafe_index_put, aten.zeros, aten.zeros_like, aten.ones, aten.ones_like, aten.empty_like,
    aten.new_empty, aten.new_full, aten.new_zeros, aten.new_ones, aten.eye, aten.linspace.default, aten.arange, aten.fill,
    aten.bernoulli, aten._scaled_dot_product_flash_attention_for_cpu, aten.scaled_dot_product_attention,
    aten.adaptive_avg_pool1d, aten.avg_pool1d,
    aten.detach,  # torch's alias in its place makes scan's gradient refuse results that are saved as well
)
"""Operators with a row of their own: shorter graphs, and what they mean is not lost."""

_MORE = (
    aten._native_batch_norm_legit_functional, aten._native_batch_norm_legit, aten.native_batch_norm,
    aten._batch_norm_with_update_functional, aten.native_batch_norm_backward, aten.batch_norm_backward,
    aten.upsample_bilinear2d, aten.upsample_bilinear2d_backward, aten.upsample_nearest2d_backward,
    aten._fused_rms_norm_backward, aten._fused_dropout,
    aten.upsample_bicubic2d, aten.grid_sampler_2d, aten.dist,
    aten.narrow_copy, aten.norm, aten.tril_indices, aten.triu_indices,
)
"""Decompositions of torch that are not in its core table."""


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Operator overload -> decomposition, for AOTAutograd. A copy: torch takes half a second to list its own."""
    return dict(_table())


@cache
def _table() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    more = get_decompositions(_MORE)
    table.update(more)
    kept = {overload for packet in _WHOLE for overload in _overloads(packet)}
    return {**{op: how for op, how in table.items() if op not in kept}, **foreach_table(), **FORMULAS}


def _overloads(named: Any) -> list[Any]:
    """The overloads of an operator; one that is named with its overload stands for itself."""
    return [getattr(named, name) for name in named.overloads()] if isinstance(named, torch._ops.OpOverloadPacket) else [named]
