"""Matrix products, convolutions and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...ir.core import Value
from ...ir.expr import Dim, product
from ...ir.types import TensorType
from ..attention import TILE, suits_hopper, suits_library
from ..context import F32, I1, Context, typeof
from ..errors import Unsupported
from .table import Lower


def matmul(c: Context, a: Value, b: Value, out_dtype: Any = None) -> Value:
    """mm, bmm and int_mm: operands in the result's type where torch widens it."""
    if c.dtype.kind == "complex":
        raise Unsupported("complex numbers")
    return c.matmul(c.cast(a, c.dtype), c.cast(b, c.dtype))


def wide_mm(c: Context, a: Value, b: Value) -> Value:
    """A product that is not rounded to 16 bits."""
    return c.b.op("graph.matmul", a, b, type=TensorType(c.shape, c.dtype))


def _scaled(c: Context, x: Value, factor: Any) -> Value:
    return x if factor == 1 else c.ew("mul", x, factor)


def _scaled_sum(c: Context, made: Value, bias: Value, beta: Any, alpha: Any) -> Value:
    """beta * bias + alpha * made; factors of 16-bit floats are no 16-bit floats, and the sum is rounded once, as in eager."""
    work = F32 if c.dtype.name in ("bf16", "f16") and (alpha, beta) != (1, 1) else c.dtype
    made = _scaled(c, c.cast(made, work), alpha)
    return c.cast(made if beta == 0 else c.ew("add", made, _scaled(c, c.cast(bias, work), beta)), c.dtype)


def add_product(c: Context, bias: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    """addmm and baddbmm: beta * bias + alpha * (a @ b); a bias that is multiplied by 0 is not read."""
    return _scaled_sum(c, matmul(c, a, b), bias, beta, alpha)


def add_batch_product(c: Context, bias: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    """addbmm: the products are summed over the batch."""
    return _scaled_sum(c, c.reduce("sum", c.matmul(a, b), (0,)), bias, beta, alpha)


def _column(c: Context, v: Value) -> Value:
    return c.reshape(v, (*typeof(v).shape, 1))


def mv(c: Context, a: Value, v: Value) -> Value:
    return c.reshape(c.matmul(a, _column(c, v)), c.shape)


def addmv(c: Context, bias: Value, a: Value, v: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    return _scaled_sum(c, mv(c, a, v), bias, beta, alpha)


def dot(c: Context, a: Value, b: Value) -> Value:
    return c.reshape(c.matmul(c.reshape(a, (1, *typeof(a).shape)), _column(c, b)), ())


def linear(c: Context, x: Value, w: Value, bias: Value | None = None) -> Value:
    *batch, k = typeof(x).shape
    made = c.reshape(c.matmul(c.reshape(x, (product(batch), k)), c.transpose(w, 0, 1)), (*batch, typeof(w).shape[0]))
    return made if bias is None else c.ew("add", made, bias)


# -- convolution ------------------------------------------------------------------------------------------------------


def _spread(x: Sequence[Any], n: int) -> tuple[int, ...]:
    """Window parameters, one per spatial dimension: torch takes one for all."""
    if any(not isinstance(v, int) for v in x):
        raise Unsupported("symbolic window parameters")
    return tuple(x) * n if len(x) == 1 else tuple(x)


def convolution(c: Context, x: Value, w: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
                output_padding: Any, groups: int) -> Value:
    n = typeof(x).rank - 2
    window: dict[str, Any] = {"stride": _spread(stride, n), "padding": _spread(padding, n), "dilation": _spread(dilation, n)}
    if groups != 1:
        window["groups"] = groups
    if transposed:
        extra = _spread(output_padding, n)
        made = c.b.op("graph.conv_transpose", x, w, type=c.out(), **window, **({"output_padding": extra} if any(extra) else {}))
    else:
        made = c.b.op("graph.conv", x, w, type=c.out(), **window)
    return made if bias is None else c.ew("add", made, c.reshape(bias, (typeof(bias).shape[0], *(1,) * n)))


def convolution_backward(c: Context, grad: Value, x: Value, w: Value, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
                         transposed: bool, output_padding: Any, groups: int, mask: Sequence[bool]) -> tuple[Value | None, ...]:
    """The gradients of input, weight and bias, where `mask` wants them. A transposed convolution swaps input and output."""
    if any(isinstance(v, torch.Tensor) and v.is_cuda and v.is_floating_point() for v in c.val):
        # Sums over all positions of a batch: cuDNN has kernels for every size of them, and they take long to compile.
        raise Unsupported("cuDNN's kernels are quicker")
    n = typeof(x).rank - 2
    window: dict[str, Any] = {"stride": _spread(stride, n), "padding": _spread(padding, n), "dilation": _spread(dilation, n)}
    if groups != 1:
        window["groups"] = groups
    dx = dw = db = None
    if mask[0] and transposed:
        dx = c.b.op("graph.conv", grad, w, type=c.out(0), **window)
    elif mask[0]:
        sizes = zip(typeof(x).shape[2:], typeof(grad).shape[2:], typeof(w).shape[2:], strict=True)
        extra = [_rest(*s, window["stride"][i], window["padding"][i], window["dilation"][i]) for i, s in enumerate(sizes)]
        more = {} if all(e == 0 for e in extra) else {"output_padding": tuple(extra)}
        dx = c.b.op("graph.conv_transpose", grad, w, type=c.out(0), **window, **more)
    if mask[1]:
        big, small = (grad, x) if transposed else (x, grad)
        dw = c.b.op("graph.conv_weight_grad", small, big, type=c.out(1), **window)
    if mask[2]:
        db = c.reduce("sum", grad, (0, *range(2, n + 2)))
    return dx, dw, db


def _rest(size: Dim, out: Dim, kernel: Dim, stride: int, padding: int, dilation: int) -> Dim:
    """Input elements at the end that no window reached: what a transposed convolution must add."""
    return size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)


# -- attention --------------------------------------------------------------------------------------------------------


def _leave_to_library(c: Context, q: TensorType, k: TensorType, v: TensorType) -> None:
    """Declines plain attention that the library's own kernel does quicker, or whose backward is the library's."""
    result = c.val[0] if isinstance(c.val, (tuple, list)) else c.val
    queries, keys = q.shape[-2], k.shape[-2]
    if not suits_library(result.is_cuda, result.dtype, queries * keys):
        return
    saved = isinstance(c.val, (tuple, list)) and any(u.args[1] != 0 for u in c.node.users)  # log-sum-exp and seeds, in the library's own form
    rows = product(q.shape[:-1])
    programs = rows // TILE if isinstance(rows, int) else 0
    if saved or not suits_hopper(result.device, programs, (queries, keys), (q.shape[-1], v.shape[-1])):
        raise Unsupported("the library's attention kernel is quicker")


def _attention(c: Context, q: Value, k: Value, v: Value, mask: Value | None, causal: bool, scale: float | None,
               lse_shape: tuple[Dim, ...]) -> tuple[Value, Value]:
    q_type, v_type = typeof(q), typeof(v)
    if q_type.rank != 4:
        raise Unsupported("attention of other than 4-d tensors")
    if mask is None:
        _leave_to_library(c, q_type, typeof(k), v_type)
    if mask is not None and typeof(mask).dtype == I1:
        zero = c.full((), 0.0, q_type.dtype)
        mask = c.ew("select", mask, zero, -math.inf)
    if scale is None and isinstance(q_type.shape[-1], int):
        scale = 1 / math.sqrt(q_type.shape[-1])
    elif scale is None:  # a symbolic head size: the scale is computed, and applied to q
        root = c.ew("rsqrt", c.scalar(q_type.shape[-1], F32))
        q, scale = c.cast(c.ew("mul", c.cast(q, F32), root), q_type.dtype), 1.0
    if not isinstance(scale, (int, float)):
        raise Unsupported("a symbolic scale of attention")
    masks = [] if mask is None else [c.cast(mask, q_type.dtype)]
    made = c.b.create("graph.attention", [q, k, v, *masks], {"scale": float(scale), **({"causal": True} if causal else {})},
                      [TensorType((*q_type.shape[:-1], v_type.shape[-1]), q_type.dtype), TensorType(lse_shape, F32)])
    return made.results[0], made.results[1]


def _no_dropout(p: float) -> None:
    if p != 0:
        raise Unsupported("attention with dropout")


def flash_cpu(c: Context, q: Value, k: Value, v: Value, dropout_p: float = 0.0, is_causal: bool = False, *,
              attn_mask: Value | None = None, scale: float | None = None) -> tuple[Value, ...]:
    _no_dropout(dropout_p)
    if c.out(1).dtype != F32:
        raise Unsupported(f"attention in {typeof(q).dtype}")
    return _attention(c, q, k, v, attn_mask, is_causal, scale, typeof(q).shape[:-1])


def flash(c: Context, q: Value, k: Value, v: Value, dropout_p: float = 0.0, is_causal: bool = False, debug: bool = False, *,
          scale: float | None = None) -> tuple[Any, ...]:
    """The flash variant of CUDA: (result, lse, cu_seqlens, ..., max_q, max_k, seed, offset, mask)."""
    _no_dropout(dropout_p)
    if debug:
        raise Unsupported("attention with a debug mask")
    out, lse = _attention(c, q, k, v, None, is_causal, scale, typeof(q).shape[:-1])
    return (out, lse, *_seeds(c, 2))


def efficient(c: Context, q: Value, k: Value, v: Value, bias: Value | None, compute_lse: bool, dropout_p: float = 0.0,
              is_causal: bool = False, *, scale: float | None = None) -> tuple[Any, ...]:
    """The memory-efficient variant of CUDA: (result, lse, seed, offset); torch pads the lse to a multiple of 32."""
    _no_dropout(dropout_p)
    wanted = c.out(1).shape
    out, lse = _attention(c, q, k, v, bias, is_causal, scale, typeof(q).shape[:-1])
    if product(wanted) == 0:
        return (out, c.full(wanted, 0.0, F32), *_seeds(c, 2))
    high = wanted[-1] - typeof(lse).shape[-1]
    return (out, c.pad(lse, (0, 0, 0), (0, 0, high), math.inf), *_seeds(c, 2))


def cudnn(c: Context, q: Value, k: Value, v: Value, bias: Value | None, compute_lse: bool, dropout_p: float = 0.0,
          is_causal: bool = False, debug: bool = False, *, scale: float | None = None) -> tuple[Any, ...]:
    _no_dropout(dropout_p)
    out, lse = _attention(c, q, k, v, bias, is_causal, scale, typeof(q).shape[:-1])
    wanted = c.out(1).shape
    lse = c.reshape(lse, wanted) if len(wanted) >= 3 and product(wanted) != 0 else c.full(wanted, 0.0, F32)
    return (out, lse, *_seeds(c, 2))


def overrideable(c: Context, q: Value, k: Value, v: Value, bias: Value | None = None, dropout_p: float = 0.0,
                 is_causal: bool = False, debug: bool = False, *, scale: float | None = None) -> tuple[Any, ...]:
    _no_dropout(dropout_p)
    return (*_attention(c, q, k, v, bias, is_causal, scale, typeof(q).shape[:-1]), *_seeds(c, 2))


def sdpa(c: Context, q: Value, k: Value, v: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
         is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Value:
    _no_dropout(dropout_p)
    return _attention(c, q, k, v, attn_mask, is_causal, scale, typeof(q).shape[:-1])[0]


def whole(c: Context, q: Value, k: Value, v: Value, mask: Value | None, causal: bool, scale: float) -> tuple[Value, ...]:
    """`aicc::attention`, which is never left to the library."""
    q_type, masks = typeof(q), [] if mask is None else [c.cast(mask, typeof(q).dtype)]
    made = c.b.create("graph.attention", [q, k, v, *masks], {"scale": float(scale), **({"causal": True} if causal else {})},
                      [TensorType((*q_type.shape[:-1], typeof(v).shape[-1]), q_type.dtype), TensorType(q_type.shape[:-1], F32)])
    return tuple(made.results)


def whole_backward(c: Context, grad: Value, q: Value, k: Value, v: Value, result: Value, lse: Value, mask: Value | None, causal: bool,
                   scale: float) -> tuple[Value, ...]:
    masks = [] if mask is None else [c.cast(mask, typeof(q).dtype)]
    attrs = {"scale": float(scale), **({"causal": True} if causal else {})}
    made = c.b.create("graph.attention_backward", [grad, q, k, v, result, lse, *masks], attrs,
                      [TensorType(typeof(x).shape, typeof(x).dtype) for x in (q, k, v)])
    return tuple(made.results)


def _seeds(c: Context, start: int) -> tuple[Any, ...]:
    """The remaining results: random state that nothing reads without dropout."""
    made: list[Any] = []
    for r in c.val[start:]:
        made.append(c.full(c.dims(r.shape), 0, c.type_of(r).dtype) if isinstance(r, torch.Tensor) else
                    c.dim(r) if isinstance(r, (int, torch.SymInt)) else None)
    return tuple(made)


ROWS: dict[str, Lower] = {
    "aten.mm.default": matmul,
    "aicc.wide_mm.default": wide_mm,
    "aten.bmm.default": matmul,
    "aten.mm.dtype": matmul,
    "aten.bmm.dtype": matmul,
    "aten._int_mm.default": matmul,
    "aten.addmm.default": add_product,
    "aten.baddbmm.default": add_product,
    "aten.addbmm.default": add_batch_product,
    "aten.mv.default": mv,
    "aten.addmv.default": addmv,
    "aten.dot.default": dot,
    "aten.vdot.default": dot,
    "aten.linear.default": linear,
    "aten.convolution.default": convolution,
    "aten.convolution_backward.default": convolution_backward,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": flash_cpu,
    "aten._scaled_dot_product_flash_attention.default": flash,
    "aten._scaled_dot_product_efficient_attention.default": efficient,
    "aten._scaled_dot_product_cudnn_attention.default": cudnn,
    "aten._scaled_dot_product_fused_attention_overrideable.default": overrideable,
    "aten.scaled_dot_product_attention.default": sdpa,
    "aicc.attention.default": whole,
    "aicc.attention_backward.default": whole_backward,
}
