"""scaled_dot_product_attention written out, where it is trained or drops weights: then its backward streams like any other attention's.

    write_out_attention(gm, drops=True)      # in place, on Dynamo's graph, before AOTAutograd

torch would choose a kernel with a backward of its own, an operator that nothing can be fused with, and that not every variant has
(dropout on CPUs, say). `written_out` decides while AOTAutograd traces, where sizes, types and the wish for gradients are known:
inference without dropout stays one operator, and so does what the library's kernels do quicker.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["LIBRARY_POINTS", "attention", "suits_hopper", "suits_library", "write_out_attention", "written_out"]

LIBRARY_POINTS = 1 << 20
"""Scores per head from which, on GPUs and in 16 bits, cuDNN's and FlashAttention's kernels beat the streaming one by more than a call costs."""
TILE = 128
"""Rows, and steps, of the tiles of the Hopper schedule (`backends/triton/warp_groups.py`)."""

Tensor = torch.Tensor


def suits_library(cuda: bool, dtype: torch.dtype, points: Any) -> bool:
    """Whether plain attention with that many scores per head is left to the library (measured on an H100: 1.3 to 1.6 times at 4096 by 4096)."""
    return cuda and dtype in (torch.bfloat16, torch.float16) and isinstance(points, int) and points >= LIBRARY_POINTS


def suits_hopper(device: torch.device, programs: int, sizes: tuple[Any, ...], widths: tuple[Any, ...]) -> bool:
    """Whether the generated kernel has the schedule that keeps up with the library's: on a Hopper GPU, queries and keys (`sizes`) in whole tiles,
    heads of 128, and blocks of rows (`programs`) for nearly every multiprocessor. Measured at 4096 x 128: 583 TFLOP/s against 573 causal, 645 to
    691 against 653 without a mask; for 16 causal heads of 2048 (17 GFLOP) the library takes 81 us."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    if not all(isinstance(n, int) and n % TILE == 0 for n in sizes) or set(widths) != {128}:
        return False
    return 4 * programs >= 3 * torch.cuda.get_device_properties(device).multi_processor_count


class _Scores(torch.autograd.Function):
    """q k^T in float32, with gradients of 16 bits. torch's own kernels take four dimensions of 16 bits; with others it computes in float32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor) -> Tensor:
        return q.float() @ k.float().transpose(-2, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        g = gradient.to(q.dtype)
        return g @ k, g.transpose(-2, -1) @ q


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
              scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """What torch documents: softmax(q k^T * scale + mask) v, the softmax in float32 at least, each factor of 1 / (1 - p) from dropout included."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) if x.shape[-3] != q.shape[-3] else x for x in (k, v))
    wide = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    product = q @ k.transpose(-2, -1) if q.dim() == 4 or q.dtype == wide else _Scores.apply(q, k)
    scores = product.to(wide) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    alive: Tensor | None = None
    if is_causal:
        rows, columns = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        scores = torch.where(columns <= rows[:, None], scores, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        alive = attn_mask
        scores = torch.where(alive, scores, -math.inf)
    elif attn_mask is not None:
        alive = attn_mask != -math.inf
        scores = torch.where(alive, scores + attn_mask, -math.inf)
    weights = torch.softmax(scores, -1)
    if alive is not None:  # a row that is masked throughout has weights of NaN, and gradients: neither passes a mask
        weights = torch.where(alive, weights, 0.0)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return weights.to(v.dtype) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
                scale: float | None = None, enable_gqa: bool = False, order: tuple[int, ...] | None = None, drops: bool = True) -> Tensor:
    """`F.scaled_dot_product_attention`, as `attention` where that pays. order: dimensions of the result, the one with the largest stride first;
    drops: whether dropout may draw other numbers than eager."""
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    library = attn_mask is None and suits_library(q.is_cuda, q.dtype, q.shape[-2] * k.shape[-2])
    declined = dropout_p > 0 and not drops
    if library or declined or not (trained or dropout_p > 0) or not q.is_floating_point() or not isinstance(dropout_p, (int, float)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    out = attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if order is None or len(order) != out.dim() or order == tuple(range(out.dim())):
        return out
    return out.permute(order).contiguous().permute([order.index(d) for d in range(out.dim())])


class _WritesOut(TorchFunctionMode):
    """Calls of attention within a function that Dynamo keeps whole."""

    def __init__(self, drops: bool):
        super().__init__()
        self.drops = drops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return written_out(*args, **(kwargs or {}), drops=self.drops)


def multi_head(*args: Any, drops: bool, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward` with its attention written out."""
    with _WritesOut(drops):
        return F.multi_head_attention_forward(*args, **kwargs)


def write_out_attention(gm: fx.GraphModule, *, drops: bool) -> int:
    """Lets each call of attention in `gm` and the graphs within decide for itself whether it is written out. How many there are.

    drops: whether dropout may draw other numbers than eager."""
    found = 0
    for inner in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
        changed = 0
        for n in inner.graph.nodes:
            if n.op == "call_function" and n.target is F.scaled_dot_product_attention:
                n.target = written_out
                value = n.meta.get("example_value")
                n.kwargs = {**n.kwargs, "order": _order(value) if isinstance(value, Tensor) else None, "drops": drops}
                changed += 1
            elif n.op == "call_function" and n.target is F.multi_head_attention_forward:
                n.target, n.kwargs = multi_head, {**n.kwargs, "drops": drops}
                changed += 1
        if changed:
            inner.recompile()
        found += changed
    return found


def _order(t: Tensor) -> tuple[int, ...] | None:
    strides = t.stride()
    return tuple(sorted(range(t.dim()), key=lambda d: -strides[d])) if all(isinstance(s, int) for s in strides) else None
