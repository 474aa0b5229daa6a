"""Attention that stays one operator, and its gradient another: for programs that cut it along the sequence.

    aicc::attention(q, k, v, mask, causal, scale) -> (result, lse)
    aicc::attention_backward(grad, q, k, v, result, lse, mask, causal, scale) -> (dq, dk, dv)

torch's own operators differ from device to device, and their gradients are taken apart (`formulas.py`). These are the graph dialect's
`graph.attention` and `graph.attention_backward`: [B, H, S, D], k and v may have fewer heads, lse float32 [B, H, S].
`whole_attention` has the arguments of `F.scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .formulas import flash_attention_backward

__all__ = ["ATTENTION", "whole_attention"]

Tensor = torch.Tensor

ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
"""What a captured graph calls where the user calls attention."""

_library = torch.library.Library("aicc", "FRAGMENT")
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> (Tensor result, Tensor lse)")
_library.define("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor result, Tensor lse, Tensor? mask, bool causal, float scale)"
                " -> (Tensor dq, Tensor dk, Tensor dv)")


def whole_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
                    scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """`F.scaled_dot_product_attention` as one operator; calls that it has no form for (dropout, other than four dimensions, masks that are
    trained) are torch's."""
    ours = dropout_p == 0 and q.dim() == k.dim() == v.dim() == 4 and not (attn_mask is not None and attn_mask.requires_grad)
    if not ours or (attn_mask is not None and attn_mask.dim() > 4):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(q.dtype)
    made: Tensor = torch.ops.aicc.attention(q, k, v, attn_mask, is_causal, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)[0]
    return made


def _heads(x: Tensor, like: Tensor) -> Tensor:
    repeat = like.shape[1] // x.shape[1]
    return x.repeat_interleave(repeat, 1) if repeat > 1 else x


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = _heads(k, q), _heads(v, q)
    scores = (q @ k.transpose(-2, -1)).float() * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        rows, columns = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        scores = torch.where(columns <= rows[:, None], scores, -math.inf)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    lse = torch.where(dead, 0.0, torch.logsumexp(scores, -1, keepdim=True))
    weights = torch.where(dead, 0.0, torch.exp(scores - lse))
    return (weights.to(v.dtype) @ v), lse.squeeze(-1)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, lse: Tensor, mask: Tensor | None, causal: bool,
                        scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = flash_attention_backward(grad, q, _heads(k, q), _heads(v, q), result, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return dq, dk.unflatten(1, (k.shape[1], -1)).sum(2), dv.unflatten(1, (v.shape[1], -1)).sum(2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, causal, scale = inputs
    ctx.save_for_backward(q, k, v, *output, *([] if mask is None else [mask]))
    ctx.rest = causal, scale


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, result, lse, *mask = ctx.saved_tensors
    made = torch.ops.aicc.attention_backward(grad, q, k, v, result, lse, mask[0] if mask else None, *ctx.rest)
    return (*made, None, None, None)


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("aicc::attention", _fake, lib=_library)
torch.library.register_fake("aicc::attention_backward", lambda grad, q, k, v, result, lse, mask, causal, scale: tuple(
    torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), lib=_library)
torch.library.register_autograd("aicc::attention", _differentiate, setup_context=_keep, lib=_library)
