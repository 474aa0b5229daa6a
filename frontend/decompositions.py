"""Which operators AOTAutograd takes apart before aicc sees them.

`decomposition_table()` is torch's core table, plus decompositions that torch keeps out of it and aicc profits from, plus the
gradient of CPU attention, minus the composites that stay whole because the graph level has an op for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

__all__ = ["decomposition_table"]

aten = torch.ops.aten

_WHOLE = (
    aten.native_layer_norm, aten.layer_norm, aten._fused_rms_norm, aten.rms_norm, aten.native_group_norm, aten._softmax,
    aten._log_softmax, aten._safe_softmax, aten.gelu, aten.silu, aten.relu, aten.relu6, aten.elu, aten.leaky_relu,
    aten.hardswish, aten.hardsigmoid, aten.hardtanh, aten.softplus, aten.mish, aten.threshold, aten.threshold_backward,
    aten.hardtanh_backward, aten.prelu, aten._prelu_kernel, aten.embedding, aten.addmm, aten.baddbmm, aten.addmv,
    aten.mv, aten.dot, aten.vdot, aten.linear, aten.cumsum, aten.var, aten.std, aten.var_mean, aten.std_mean,
    aten.logsumexp, aten.sum, aten.all, aten.any, aten.count_nonzero, aten.nansum, aten.aminmax, aten.norm,
    aten.native_dropout, aten.clamp_min, aten.clamp_max, aten.addcmul, aten.addcdiv, aten.lerp, aten.rsub,
    aten.masked_fill, aten.square, aten.sgn, aten.frac, aten.isfinite, aten.isposinf, aten.isneginf, aten.nan_to_num,
    aten.xlogy, aten.logaddexp, aten.logaddexp2, aten.floor_divide, aten.special_xlog1py, aten.transpose, aten.t,
    aten.stack, aten.split, aten.unbind, aten.roll, aten.tril, aten.triu, aten.pixel_shuffle, aten.pixel_unshuffle,
    aten.select_scatter, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d, aten.replication_pad1d,
    aten.replication_pad2d, aten.replication_pad3d, aten.index_add, aten.index_copy, aten.index_fill, aten.take,
    aten._unsafe_index, aten._unsafe_index_put, aten.zeros, aten.zeros_like, aten.ones, aten.ones_like, aten.empty_like,
    aten.new_empty, aten.new_full, aten.new_zeros, aten.new_ones, aten.eye, aten.linspace, aten.arange, aten.fill,
    aten.bernoulli, aten._scaled_dot_product_flash_attention_for_cpu, aten.scaled_dot_product_attention,
    aten.adaptive_avg_pool1d, aten.avg_pool1d,
    aten.detach,  # torch's alias in its place makes scan's gradient refuse results that are saved as well
)
"""Operators with a row of their own: shorter graphs, and what they mean is not lost."""

_MORE = (
    aten._native_batch_norm_legit_functional, aten._native_batch_norm_legit, aten.native_batch_norm,
    aten._batch_norm_with_update_functional, aten.native_batch_norm_backward, aten.batch_norm_backward,
    aten.upsample_bilinear2d, aten.upsample_bilinear2d_backward, aten.upsample_nearest2d_backward,
    aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d, aten._fused_rms_norm_backward, aten._fused_dropout,
    aten.upsample_bicubic2d, aten.grid_sampler_2d,
)
"""Decompositions of torch that are not in its core table."""


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Operator overload -> decomposition, for AOTAutograd."""
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    more = get_decompositions(_MORE)
    table.update(more)
    kept = {overload for packet in _WHOLE for overload in _overloads(packet)}
    return {**{op: how for op, how in table.items() if op not in kept}, **_OURS}


def _overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()]


Tensor = torch.Tensor


def flash_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, dropout_p: float,
                             is_causal: bool, *, attn_mask: Tensor | None = None,
                             scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention [B, H, S, D], with the probabilities recomputed from logsumexp f32[B, H, S].

    FlashAttention-2 (Dao, 2023), section 3.1.2: P = exp(S - L), dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)).
    """
    if dropout_p != 0:
        return NotImplemented
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.transpose(-2, -1)).float() * scale
    if is_causal:
        rows = torch.arange(q.shape[-2], device=q.device)[:, None]
        scores = torch.where(rows >= torch.arange(k.shape[-2], device=q.device), scores, -math.inf)
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    masked = scores == -math.inf  # a row masked throughout has no finite logsumexp
    p = torch.where(masked, 0.0, torch.exp(scores - logsumexp.unsqueeze(-1)))
    grad_v = p.to(v.dtype).transpose(-2, -1) @ grad
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    grad_scores = (p * ((grad @ v.transpose(-2, -1)).float() - delta) * scale).to(q.dtype)
    return grad_scores @ k, grad_scores.transpose(-2, -1) @ q, grad_v


_OURS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: flash_attention_backward,
}
