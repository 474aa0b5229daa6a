"""Every table row against eager: static and symbolic sizes, through the reference interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

aten = torch.ops.aten
torch.manual_seed(0)


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def b(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


def p(*shape: int) -> torch.Tensor:
    """Positive numbers."""
    return torch.rand(*shape) + 0.1


def u(*shape: int) -> torch.Tensor:
    """Numbers inside (-1, 1)."""
    return torch.rand(*shape) * 1.8 - 0.9


def i(*shape: int, low: int = -9, high: int = 9, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(low, high, shape).to(dtype)


def t(*shape: int) -> torch.Tensor:
    """Truth values."""
    return torch.rand(*shape) > 0.5


SPECIAL = torch.tensor([0.0, -0.0, 1.5, -2.5, math.inf, -math.inf, math.nan, 0.5])
Case = tuple[Callable[..., Any], tuple[Any, ...]]

UNARY: dict[str, Case] = {
    **{n: (getattr(torch, n), (f(3, 4),)) for n in (
        "neg", "exp", "exp2", "expm1", "sin", "cos", "tan", "atan", "sinh", "cosh", "tanh", "asinh", "erf", "erfc", "sigmoid",
        "abs", "sign", "relu", "floor", "ceil", "trunc", "round", "isnan", "isinf", "square", "frac", "signbit", "isfinite",
        "nan_to_num", "logical_not", "sgn", "positive", "isposinf", "isneginf", "rad2deg", "deg2rad", "sinc")},
    **{n: (getattr(torch, n), (p(3, 4),)) for n in (
        "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma", "digamma", "logit")},
    **{n: (getattr(torch, n), (u(3, 4),)) for n in ("asin", "acos", "atanh", "erfinv")},
    "acosh": (torch.acosh, (p(4) + 1,)),
    **{f"{n} of special values": (getattr(torch, n), (SPECIAL,)) for n in (
        "isnan", "isinf", "isfinite", "nan_to_num", "sign", "signbit", "isposinf", "round", "logical_not", "relu", "abs")},
    **{f"{n} of integers": (getattr(torch, n), (i(3, 4),)) for n in (
        "neg", "exp", "sqrt", "sin", "sigmoid", "abs", "sign", "floor", "round", "isnan", "isinf", "isfinite", "square", "relu",
        "bitwise_not", "logical_not", "reciprocal", "signbit", "nan_to_num")},
    **{f"{n} of bf16": (getattr(torch, n), (b(3, 4),)) for n in ("exp", "sigmoid", "tanh", "neg", "sin", "round")},
    "exp of truth values": (torch.exp, (t(5),)),
    "bitwise_not of truth values": (torch.bitwise_not, (t(5),)),
}

_PAIR = (f(3, 4), f(4))
BINARY: dict[str, Case] = {
    **{n: (getattr(torch, n), (f(3, 4), p(4))) for n in (
        "add", "sub", "mul", "div", "maximum", "minimum", "fmax", "fmin", "atan2", "hypot", "copysign", "remainder", "fmod",
        "floor_divide", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "xlogy", "logaddexp",
        "logaddexp2", "nextafter", "rsub", "true_divide")},
    "pow": (torch.pow, (p(3, 4), f(4))),
    **{f"{n} of integers": (getattr(torch, n), (i(3, 4), i(4, low=1))) for n in (
        "add", "sub", "mul", "div", "maximum", "remainder", "fmod", "floor_divide", "eq", "lt", "logical_and", "bitwise_and",
        "bitwise_or", "bitwise_xor")},
    "shift left": (torch.bitwise_left_shift, (i(6), i(6, low=0, high=8))),
    "shift right": (torch.bitwise_right_shift, (i(6), i(6, low=0, high=8))),
    "bitwise_and of truth values": (torch.bitwise_and, (t(3, 4), t(4))),
    "add of truth values": (torch.add, (t(3, 4), t(4))),
    "mul of truth values": (torch.mul, (t(3, 4), t(4))),
    "div floor": (lambda x, y: torch.div(x, y, rounding_mode="floor"), (f(9), p(9))),
    "div trunc": (lambda x, y: torch.div(x, y, rounding_mode="trunc"), (f(9), p(9))),
    "div floor of integers": (lambda x: torch.div(x, 2, rounding_mode="floor"), (i(9),)),
    "div trunc of integers": (lambda x: torch.div(x, 2, rounding_mode="trunc"), (i(9),)),
    "add alpha": (lambda x, y: torch.add(x, y, alpha=0.3), _PAIR),
    "sub alpha": (lambda x, y: torch.sub(x, y, alpha=2), _PAIR),
    "rsub scalar": (lambda x: 1.0 - x, (f(4),)),
    "float plus integer": (torch.add, (f(3), i(3))),
    "integer plus number": (lambda x: x + 0.5, (i(4),)),
    "integer times integer": (lambda x: x * 16, (i(4),)),
    "truth times number": (lambda x: x * 2, (t(4),)),
    "f32 times f64 0-d": (lambda x, y: x * y, (f(4), torch.tensor(0.1, dtype=torch.float64))),
    "integer times f64 0-d": (lambda x, y: x * y, (i(4), torch.tensor(0.1, dtype=torch.float64))),
    "i32 plus i64": (torch.add, (i(4, dtype=torch.int32), i(4))),
    "u8 plus number": (lambda x: x + 250, (i(4, low=0, dtype=torch.uint8),)),
    "bf16 plus f32": (torch.add, (b(4), f(4))),
    "bf16 times rounded number": (lambda x: x * 0.1, (b(64),)),
    "bf16 plus 1": (lambda x: x + 1, (b(64),)),
    "compare with number": (lambda x: x > 0.5, (i(5),)),
    "compare with 0-d": (lambda x, y: x <= y, (i(5), torch.tensor(0.5))),
    **{f"pow {e}": (lambda x, e=e: x ** e, (p(5),)) for e in (0, 1, 2, 3, 3.0, -1, -2, 0.5, -0.5, 2.5)},
    "integer pow": (lambda x: x ** 2, (i(5),)),
    "integer pow 5": (lambda x: x ** 5, (i(5),)),
    "number to a power": (lambda x: 3.0 ** x, (f(5),)),
    "two to a power": (lambda x: 2 ** x, (f(5),)),
    "maximum of NaN": (torch.maximum, (SPECIAL, torch.ones(8))),
    "fmax of NaN": (torch.fmax, (SPECIAL, torch.ones(8))),
    "xlogy at zero": (torch.xlogy, (torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([0.0, math.nan, 2.0, 0.0]))),
    "xlog1py": (torch.special.xlog1py, (f(4), p(4))),
    "logaddexp of infinities": (torch.logaddexp,
                                (torch.tensor([-math.inf, math.inf, 1.0]), torch.tensor([-math.inf, math.inf, -math.inf]))),
    "heaviside": (torch.heaviside, (torch.tensor([-1.0, 0.0, 2.0]), f(3))),
}

SELECTION: dict[str, Case] = {
    "where": (torch.where, (t(3, 4), f(3, 4), f(4))),
    "where number": (lambda c, x: torch.where(c, x, -math.inf), (t(3, 4), f(3, 4))),
    "where mixed": (torch.where, (t(3, 4), f(3, 4), i(4))),
    "masked_fill": (lambda x, m: x.masked_fill(m, -math.inf), (f(3, 4), t(3, 4))),
    "masked_fill 0-d": (lambda x, m, v: x.masked_fill(m, v), (f(3, 4), t(4), torch.tensor(2.0))),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), (f(9),)),
    "clamp of integers": (lambda x: x.clamp(min=-2), (i(9),)),
    "clamp of integers by a float": (lambda x: x.clamp(min=0.5), (i(9),)),
    "clamp tensors": (lambda x, lo, hi: torch.clamp(x, lo, hi), (f(3, 4), -p(4), p(4))),
    "clamp_min": (lambda x: x.clamp_min(0.1), (f(9),)),
    "clamp_max": (lambda x, y: x.clamp_max(y), (f(9), f(9))),
    "clamp NaN": (lambda x: x.clamp(-1, 1), (SPECIAL,)),
    "addcmul": (lambda x, y, z: torch.addcmul(x, y, z, value=0.5), (f(3, 4), f(4), f(3, 1))),
    "addcdiv": (lambda x, y, z: torch.addcdiv(x, y, z), (f(3, 4), f(4), p(3, 1))),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.7), (f(4), f(4))),
    "lerp tensor": (torch.lerp, (f(4), f(4), torch.tensor([0.0, 0.3, 0.5, 1.0]))),
}

ACTIVATIONS: dict[str, Case] = {
    **{n: (getattr(F, n), (f(3, 8) * 4,)) for n in (
        "gelu", "silu", "relu6", "elu", "leaky_relu", "hardsigmoid", "hardswish", "hardtanh", "softplus", "mish", "selu",
        "celu", "softsign", "tanhshrink", "hardshrink", "softshrink", "logsigmoid")},
    **{f"{n} of bf16": (getattr(F, n), (b(3, 8),)) for n in ("gelu", "silu", "elu", "hardswish", "softplus", "mish")},
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), (f(9),)),
    "prelu": (F.prelu, (f(2, 3, 4), f(3))),
    "glu": (F.glu, (f(3, 8),)),
    "threshold": (lambda x: F.threshold(x, 0.2, 5.0), (f(9),)),
    "threshold_backward": (lambda g, x: aten.threshold_backward(g, x, 0.0), (f(9), f(9))),
    "hardtanh_backward": (lambda g, x: aten.hardtanh_backward(g, x, -0.5, 0.5), (f(9), f(9))),
    "gelu_backward": (lambda g, x: aten.gelu_backward(g, x), (f(9), f(9))),
    "silu_backward": (aten.silu_backward, (f(9), f(9))),
    "softmax": (lambda x: x.softmax(-1), (f(3, 8),)),
    "softmax inner": (lambda x: x.softmax(1), (f(3, 8, 2),)),
    "softmax to f32": (lambda x: F.softmax(x, -1, dtype=torch.float32), (b(3, 8),)),
    "log_softmax": (lambda x: x.log_softmax(-1), (f(3, 8),)),
    "safe_softmax": (lambda x: aten._safe_softmax(x, -1), (torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]]),)),
    "softmax_backward": (lambda g, y: aten._softmax_backward_data(g, y.softmax(-1), -1, torch.float32), (f(3, 8), f(3, 8))),
}

CASTS: dict[str, Case] = {
    "f32 to i64": (lambda x: x.to(torch.int64), (f(9) * 5,)),
    "f32 to bool": (lambda x: x.to(torch.bool), (torch.tensor([0.0, 0.5, -0.0, math.nan]),)),
    "i64 to bool": (lambda x: x.bool(), (i(9),)),
    "bool to f32": (lambda x: x.float(), (t(9),)),
    "f32 to bf16": (lambda x: x.bfloat16(), (f(9),)),
    "i64 to i8": (lambda x: x.to(torch.int8), (i(9),)),
    "clone": (lambda x: x.t().clone(memory_format=torch.contiguous_format), (f(3, 4),)),
    "type_as": (lambda x, y: x.type_as(y), (f(3), i(3))),
}

VIEWS: dict[str, Case] = {
    "view": (lambda x: x.view(4, 6), (f(2, 3, 4),)),
    "view -1": (lambda x: x.reshape(x.shape[0], -1), (f(2, 3, 4),)),
    "flatten": (lambda x: x.flatten(1), (f(2, 3, 4),)),
    "squeeze": (lambda x: x.squeeze(), (f(2, 1, 4),)),
    "squeeze dim": (lambda x: x.squeeze(1), (f(2, 1, 4),)),
    "unsqueeze": (lambda x: x.unsqueeze(-1), (f(2, 3),)),
    "permute": (lambda x: x.permute(2, 0, -2), (f(2, 3, 4),)),
    "transpose": (lambda x: x.transpose(-1, 0), (f(2, 3, 4),)),
    "t": (lambda x: x.t(), (f(2, 3),)),
    "mT": (lambda x: x.mT, (f(2, 3, 4),)),
    "movedim": (lambda x: x.movedim(0, 2), (f(2, 3, 4),)),
    "expand": (lambda x: x.expand(5, -1, 4), (f(3, 1),)),
    "broadcast_to": (lambda x: x.broadcast_to(2, 3, 4), (f(4),)),
    "slice": (lambda x: x[1:3], (f(5, 4),)),
    "slice to the end": (lambda x: x[:, 1:], (f(5, 4),)),
    "slice from the back": (lambda x: x[-2:], (f(5, 4),)),
    "slice up to the back": (lambda x: x[:-1], (f(5, 4),)),
    "slice step": (lambda x: x[:, 1::2], (f(5, 7),)),
    "slice beyond": (lambda x: x[2:100], (f(5, 4),)),
    "slice half": (lambda x: x[..., : x.shape[-1] // 2], (f(5, 8),)),
    "select": (lambda x: x[1], (f(5, 4),)),
    "select from the back": (lambda x: x[:, -1], (f(5, 4),)),
    "narrow": (lambda x: x.narrow(1, 2, 3), (f(5, 6),)),
    "split": (lambda x: torch.split(x, 2, dim=1), (f(3, 5),)),
    "split sizes": (lambda x: torch.split(x, [1, 3, 1], dim=1), (f(3, 5),)),
    "chunk": (lambda x: x.chunk(3, dim=-1), (f(3, 7),)),
    "unbind": (lambda x: x.unbind(1), (f(3, 2),)),
    "tensor_split": (lambda x: x.tensor_split(3), (f(7, 2),)),
    "flip": (lambda x: x.flip(0, -1), (f(3, 4),)),
    "roll": (lambda x: x.roll(2, 1), (f(3, 5),)),
    "roll both": (lambda x: x.roll((-1, 3), (0, 1)), (f(3, 5),)),
    "roll flat": (lambda x: x.roll(4), (f(3, 5),)),
    "repeat": (lambda x: x.repeat(2, 1, 3), (f(3, 4),)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, dim=1), (f(2, 4),)),
    "tile": (lambda x: x.tile(2), (f(3, 4),)),
    "cat": (lambda x, y: torch.cat([x, y], -1), (f(3, 4), f(3, 2))),
    "cat mixed": (lambda x, y: torch.cat([x, y]), (f(3), i(2))),
    "cat empty": (lambda x, y: torch.cat([x, y]), (f(3, 2), torch.empty(0))),
    "stack": (lambda x, y: torch.stack([x, y], 1), (f(3, 4), f(3, 4))),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 3), value=0.5), (f(3, 4),)),
    "pad crop": (lambda x: F.pad(x, (-1, 2)), (f(3, 4),)),
    "pad of integers": (lambda x: F.pad(x, (1, 0), value=-1), (i(3, 4),)),
    "replication_pad": (lambda x: F.pad(x, (2, 1, 1, 3), mode="replicate"), (f(1, 2, 3, 4),)),
    "reflection_pad": (lambda x: F.pad(x, (2, 1, 1, 2), mode="reflect"), (f(1, 2, 3, 4),)),
    "circular_pad": (lambda x: F.pad(x, (2, 1), mode="circular"), (f(2, 3, 4),)),
    "diagonal": (lambda x: x.diagonal(), (f(4, 4),)),
    "diagonal offset": (lambda x: x.diagonal(1, 0, 2), (f(3, 2, 5),)),
    "diagonal below": (lambda x: x.diagonal(-1), (f(4, 3),)),
    "unfold": (lambda x: x.unfold(1, 3, 2), (f(2, 9),)),
    "as_strided": (lambda x: x.as_strided((2, 3), (1, 4), 1), (f(3, 4),)),
    "as_strided of all, turned": (lambda x: x.as_strided((4, 3, 2), (1, 8, 4)) * 2, (f(3, 8),)),
    "as_strided_scatter": (lambda x, y: torch.as_strided_scatter(x, y, (2, 3), (4, 1), 1), (f(4, 4), f(2, 3))),
    "as_strided_scatter of all, turned": (lambda x, y: torch.as_strided_scatter(x, y, (4, 3, 2), (1, 8, 4)), (f(6, 4), f(4, 3, 2))),
    "as_strided overlap": (lambda x: x.as_strided((4, 3), (1, 1)), (f(8),)),
    "slice_scatter": (lambda x, s: torch.slice_scatter(x, s, 1, 1, 3), (f(3, 5), f(3, 2))),
    "slice_scatter step": (lambda x, s: torch.slice_scatter(x, s, 1, 1, 7, 2), (f(3, 8), f(3, 3))),
    "slice_scatter into zeros": (lambda s: torch.slice_scatter(torch.zeros(3, 5), s, 1, 2, 4), (f(3, 2),)),
    "select_scatter": (lambda x, s: torch.select_scatter(x, s, 1, -2), (f(3, 5), f(3))),
    "diagonal_scatter": (lambda x, s: torch.diagonal_scatter(x, s, 1), (f(4, 4), f(3))),
    "tril": (lambda x: x.tril(), (f(4, 5),)),
    "triu": (lambda x: x.triu(1), (f(2, 4, 5),)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (f(2, 8, 3, 3),)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (f(2, 2, 4, 6),)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (f(2, 4, 3, 3),)),
    "rot90": (lambda x: x.rot90(), (f(3, 4),)),
    "diag_embed": (lambda x: torch.diag_embed(x), (f(2, 3),)),
    "meshgrid": (lambda x, y: torch.meshgrid(x, y, indexing="ij"), (f(3), f(4))),
    "of a transposed input": (lambda x: (x + 1)[:, 1:], (f(3, 4).t(),)),
}

REDUCTIONS: dict[str, Case] = {
    "sum": (lambda x: x.sum(), (f(3, 4),)),
    "sum dim": (lambda x: x.sum(-1), (f(3, 4),)),
    "sum dims": (lambda x: x.sum((0, 2), keepdim=True), (f(3, 4, 2),)),
    "sum of truth values": (lambda x: x.sum(), (t(9),)),
    "sum of i32": (lambda x: x.sum(0), (i(3, 4, dtype=torch.int32),)),
    "sum to f64": (lambda x: x.sum(0, dtype=torch.float64), (f(3, 4),)),
    "sum of bf16": (lambda x: x.sum(0), (b(3, 4),)),
    "sum of 0-d": (lambda x: x.sum(-1), (torch.tensor(2.0),)),
    "mean": (lambda x: x.mean(), (f(3, 4),)),
    "mean dim": (lambda x: x.mean(-1, keepdim=True), (f(3, 4),)),
    "mean of bf16": (lambda x: x.mean(1), (b(3, 4),)),
    "prod": (lambda x: x.prod(), (f(6),)),
    "prod dim": (lambda x: x.prod(1), (f(3, 4),)),
    "any": (lambda x: x.any(), (t(3, 4),)),
    "any of floats": (lambda x: x.any(1), (f(3, 4).relu(),)),
    "all dim": (lambda x: x.all(0, keepdim=True), (t(3, 4),)),
    "amax": (lambda x: x.amax((0, 1)), (f(3, 4),)),
    "amin": (lambda x: x.amin(-1, keepdim=True), (f(3, 4),)),
    "max": (lambda x: x.max(), (f(3, 4),)),
    "min of integers": (lambda x: x.min(), (i(3, 4),)),
    "max dim": (lambda x: x.max(1), (f(3, 4),)),
    "min dim": (lambda x: x.min(0, keepdim=True), (f(3, 4),)),
    "max of NaN": (lambda x: x.max(0), (SPECIAL,)),
    "aminmax": (lambda x: torch.aminmax(x), (f(3, 4),)),
    "argmax": (lambda x: x.argmax(), (f(3, 4),)),
    "argmax dim": (lambda x: x.argmax(-1, keepdim=True), (f(3, 4),)),
    "argmin dim": (lambda x: x.argmin(0), (f(3, 4),)),
    "var": (lambda x: x.var(), (f(3, 4),)),
    "var dim": (lambda x: x.var(1, correction=0), (f(3, 4),)),
    "std": (lambda x: x.std(0), (f(3, 4),)),
    "var_mean": (lambda x: torch.var_mean(x, (0, 2), keepdim=True, unbiased=False), (f(3, 4, 2),)),
    "std_mean": (lambda x: torch.std_mean(x, 1), (f(3, 4),)),
    **{f"norm {o}": (lambda x, o=o: torch.linalg.vector_norm(x, o, dim=1),
                     (f(3, 4),)) for o in (0, 1, 2, 3, math.inf, -math.inf)},
    "norm": (lambda x: x.norm(), (f(3, 4),)),
    "logsumexp": (lambda x: x.logsumexp(1), (f(3, 4),)),
    "logsumexp of -inf": (lambda x: x.logsumexp((0, 1), keepdim=True), (torch.full((2, 2), -math.inf),)),
    "count_nonzero": (lambda x: torch.count_nonzero(x, 1), (f(3, 4).relu(),)),
    "nansum": (lambda x: torch.nansum(x), (torch.tensor([1.0, math.nan, 2.0]),)),
    "cumsum": (lambda x: x.cumsum(-1), (f(3, 4),)),
    "cumsum of truth values": (lambda x: x.cumsum(0), (t(3, 4),)),
    "cumsum to i32": (lambda x: x.cumsum(0, dtype=torch.int32), (f(9),)),
    "cumprod": (lambda x: x.cumprod(1), (f(3, 4),)),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), (f(3, 4),)),
    "topk 1": (lambda x: torch.topk(x, 1), (f(3, 4),)),
}

CONTRACTIONS: dict[str, Case] = {
    "mm": (torch.mm, (f(3, 4), f(4, 5))),
    "mm of integers": (torch.mm, (i(3, 4), i(4, 5))),
    "mm of bf16": (torch.mm, (b(3, 4), b(4, 5))),
    "bmm": (torch.bmm, (f(2, 3, 4), f(2, 4, 5))),
    "matmul": (torch.matmul, (f(2, 3, 4, 5), f(5, 6))),
    "matmul vector": (torch.matmul, (f(3, 4), f(4))),
    "linear": (F.linear, (f(2, 3, 4), f(5, 4), f(5))),
    "addmm": (lambda c, x, y: torch.addmm(c, x, y, beta=0.5, alpha=2.0), (f(5), f(3, 4), f(4, 5))),
    "addmm beta 0": (lambda c, x, y: torch.addmm(c, x, y, beta=0), (torch.full((5,), math.nan), f(3, 4), f(4, 5))),
    "baddbmm": (lambda c, x, y: torch.baddbmm(c, x, y, alpha=0.5), (f(2, 1, 5), f(2, 3, 4), f(2, 4, 5))),
    "addbmm": (torch.addbmm, (f(3, 5), f(2, 3, 4), f(2, 4, 5))),
    "dot": (torch.dot, (f(4), f(4))),
    "mv": (torch.mv, (f(3, 4), f(4))),
    "addmv": (torch.addmv, (f(3), f(3, 4), f(4))),
    "outer": (torch.outer, (f(3), f(4))),
    "einsum": (lambda x, y: torch.einsum("bik,bjk->bij", x, y), (f(2, 3, 4), f(2, 5, 4))),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1), (f(2, 3, 9), f(4, 3, 3))),
    "conv2d": (lambda x, w, c: F.conv2d(x, w, c, stride=2, padding=(1, 0)), (f(2, 3, 9, 8), f(4, 3, 3, 2), f(4))),
    "conv2d groups": (lambda x, w: F.conv2d(x, w, groups=2, dilation=2), (f(2, 4, 9, 8), f(6, 2, 3, 2))),
    "conv3d": (lambda x, w: F.conv3d(x, w), (f(1, 2, 5, 5, 5), f(3, 2, 2, 2, 2))),
    "conv_transpose2d": (lambda x, w, c: F.conv_transpose2d(x, w, c, stride=2, padding=1, output_padding=1, groups=2),
                         (f(2, 4, 5, 5), f(4, 3, 3, 3), f(6))),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (f(2, 3, 8, 16), f(2, 3, 8, 16), f(2, 3, 8, 16))),
    "attention causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
                         (f(2, 3, 8, 16), f(2, 3, 8, 16), f(2, 3, 8, 16))),
    "attention mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
                       (f(2, 3, 8, 16), f(2, 3, 6, 16), f(2, 3, 6, 16), f(2, 1, 8, 6))),
    "attention truth mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
                             (f(2, 3, 8, 16), f(2, 3, 6, 16), f(2, 3, 6, 16), torch.ones(8, 6, dtype=torch.bool).tril())),
}

INDEXING: dict[str, Case] = {
    "index": (lambda x, k: x[k], (f(5, 4), i(3, low=-5, high=5))),
    "index two": (lambda x, k, m: x[k, m], (f(5, 4), i(3, 1, low=0, high=5), i(2, low=0, high=4))),
    "index last": (lambda x, k: x[:, k], (f(5, 4), i(2, 3, low=0, high=4))),
    "index apart": (lambda x, k, m: x[k, :, m], (f(5, 3, 4), i(2, low=0, high=5), i(2, low=0, high=4))),
    "index by i32": (lambda x, k: x[k], (f(5, 4), i(3, low=0, high=5, dtype=torch.int32))),
    "index_select": (lambda x, k: x.index_select(1, k), (f(5, 4), i(3, low=0, high=4))),
    "gather": (lambda x, k: x.gather(1, k), (f(5, 4), i(5, 2, low=0, high=4))),
    "gather smaller": (lambda x, k: x.gather(0, k), (f(5, 4), i(3, 2, low=0, high=5))),
    "take_along_dim": (lambda x, k: torch.take_along_dim(x, k, 1), (f(5, 4), i(5, 1, low=0, high=4))),
    "embedding": (F.embedding, (i(2, 3, low=0, high=7), f(7, 4))),
    "index_put": (lambda x, k, v: x.index_put((k,), v), (f(5, 4), torch.tensor([3, 1]), f(2, 4))),
    "index_put accumulate": (lambda x, k, v: x.index_put((k,), v, accumulate=True), (f(5, 4), torch.tensor([3, 3]), f(2, 4))),
    "index_put broadcast": (lambda x, k, m, v: x.index_put((k, m), v),
                            (f(5, 4), i(2, low=0, high=5), torch.tensor([0, 1]), f(1))),
    "index_put mask": (lambda x, m, v: x.index_put((m,), v), (f(5, 4), t(5, 4), torch.tensor(2.0))),
    "index_put row mask": (lambda x, m, v: x.index_put((m,), v), (f(5, 4), t(5), f(4))),
    "scatter": (lambda x, k, v: x.scatter(1, k, v), (f(5, 4), torch.tensor([[0, 2], [1, 3]]), f(2, 2))),
    "scatter value": (lambda x, k: x.scatter(1, k, 7.0), (f(5, 4), i(5, 1, low=0, high=4))),
    "scatter cut": (lambda x, k, v: x.scatter(1, k, v), (f(5, 4), torch.tensor([[0, 2]]), f(3, 4))),
    "scatter_add": (lambda x, k, v: x.scatter_add(0, k, v), (f(5, 4), i(6, 4, low=0, high=5), f(6, 4))),
    **{f"scatter_reduce {r}": (lambda x, k, v, r=r: x.scatter_reduce(0, k, v, r), (f(5, 4), i(6, 4, low=0, high=5), f(6, 4)))
       for r in ("sum", "prod", "mean", "amax", "amin")},
    **{f"scatter_reduce {r} without self": (lambda x, k, v, r=r: x.scatter_reduce(0, k, v, r, include_self=False),
                                            (f(5, 4), i(6, 4, low=0, high=5), f(6, 4)))
       for r in ("sum", "prod", "mean", "amax", "amin")},
    "index_add": (lambda x, k, v: x.index_add(1, k, v, alpha=2), (f(5, 4), i(3, low=0, high=4), f(5, 3))),
    "index_copy": (lambda x, k, v: x.index_copy(1, k, v), (f(5, 4), torch.tensor([2, 0]), f(5, 2))),
    "index_fill": (lambda x, k: x.index_fill(0, k, 3.0), (f(5, 4), torch.tensor([2, 0]))),
    "masked_scatter": (lambda x, m, v: x.masked_scatter(m, v), (f(5, 4), t(5, 4), f(20))),
    "one_hot": (lambda k: F.one_hot(k, 5), (i(6, low=0, high=5),)),
    "upsample nearest": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), (f(1, 2, 3, 4),)),
    "upsample bilinear": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), (f(1, 2, 3, 4),)),
}

POOLING: dict[str, Case] = {
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), (f(2, 3, 8, 9),)),
    "max_pool2d indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), (f(2, 3, 8, 9),)),
    "max_pool2d dilation": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), (f(2, 3, 8, 9),)),
    "max_pool2d ceil": (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), (f(2, 3, 8, 8),)),
    "max_pool2d unbatched": (lambda x: F.max_pool2d(x, 2), (f(3, 8, 8),)),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), (f(2, 3, 8),)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (f(2, 3, 8, 8),)),
    "avg_pool2d padding": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (f(2, 3, 8, 8),)),
    "avg_pool2d ceil": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (f(2, 3, 8, 8),)),
    "avg_pool2d divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (f(2, 3, 8, 8),)),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), (f(2, 3, 8),)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), (f(1, 2, 4, 4, 4),)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 4)), (f(2, 3, 8, 8),)),
    "adaptive_avg_pool2d to 1": (lambda x: F.adaptive_avg_pool2d(x, 1), (f(2, 3, 8, 8),)),
    **{f"avg_pool2d_backward {n}": (lambda g, x, a=a: aten.avg_pool2d_backward(g, x, *a), (f(2, 3, *s), f(2, 3, 8, 8)))
       for n, s, a in (("plain", (4, 4), ([2, 2], [2, 2], [0, 0], False, True, None)),
                       ("padded", (4, 4), ([3, 3], [2, 2], [1, 1], False, True, None)),
                       ("uncounted", (4, 4), ([3, 3], [2, 2], [1, 1], False, False, None)),
                       ("ceil", (5, 5), ([3, 3], [2, 2], [1, 1], True, True, None)),
                       ("divisor", (3, 3), ([3, 3], [2, 2], [0, 0], False, True, 5)))},
    "adaptive_avg_pool2d_backward": (aten._adaptive_avg_pool2d_backward, (f(2, 3, 2, 4), f(2, 3, 8, 8))),
}

NORMS: dict[str, Case] = {
    "layer_norm": (lambda x, w, c: F.layer_norm(x, (8,), w, c), (f(2, 3, 8), f(8), f(8))),
    "layer_norm two dims": (lambda x: F.layer_norm(x, (3, 8)), (f(2, 3, 8),)),
    "layer_norm weight": (lambda x, w: F.layer_norm(x, (8,), w), (f(2, 3, 8), f(8))),
    "layer_norm bias": (lambda x, c: F.layer_norm(x, (8,), None, c), (f(2, 3, 8), f(8))),
    "layer_norm statistics": (lambda x: aten.native_layer_norm(x, [8], None, None, 1e-5), (f(2, 3, 8),)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (8,), w, 1e-6), (f(2, 3, 8), f(8))),
    "rms_norm default": (lambda x: F.rms_norm(x, (8,)), (f(2, 3, 8),)),
    "group_norm": (lambda x, w, c: F.group_norm(x, 2, w, c), (f(2, 4, 3, 3), f(4), f(4))),
    "group_norm statistics": (lambda x: aten.native_group_norm(x, None, None, 2, 4, 9, 2, 1e-5), (f(2, 4, 3, 3),)),
    "batch_norm": (lambda x, m, v, w, c: F.batch_norm(x, m, v, w, c), (f(2, 4, 3, 3), f(4), p(4), f(4), f(4))),
    "batch_norm plain": (lambda x, m, v: F.batch_norm(x, m, v), (f(5, 4), f(4), p(4))),
    "instance_norm": (lambda x: F.instance_norm(x), (f(2, 4, 3, 3),)),
}

CREATION: dict[str, Case] = {
    "full": (lambda x: x + torch.full((3, 1), 2.5), (f(3, 4),)),
    "full_like": (lambda x: torch.full_like(x, 2, dtype=torch.int64), (f(3, 4),)),
    "zeros_like": (torch.zeros_like, (f(3, 4),)),
    "ones_like": (torch.ones_like, (t(3),)),
    "new_zeros": (lambda x: x.new_zeros(2, 2), (f(3),)),
    "new_full": (lambda x: x.new_full((2,), True, dtype=torch.bool), (f(3),)),
    "arange": (lambda x: torch.arange(x.shape[0]) + x, (f(5),)),
    "arange start step": (lambda x: torch.arange(2, 11, 3) + x, (f(3),)),
    "arange of floats": (lambda x: torch.arange(0, x.shape[0], dtype=torch.float32) + x, (f(5),)),
    "arange fractional": (lambda x: torch.arange(0.0, 1.0, 0.1) + x, (f(10),)),
    "linspace": (lambda x: torch.linspace(-1, 1, 7) + x, (f(7),)),
    "eye": (lambda x: torch.eye(3, 4) + x, (f(3, 4),)),
    "scalar_tensor": (lambda x: x * torch.tensor(2.0), (f(3),)),
    "size as a number": (lambda x: x * x.shape[0], (f(5, 3),)),
    "fraction of a size": (lambda x: x / math.sqrt(x.shape[0] * 1.0) + 1 / x.shape[1], (f(5, 3),)),
}

FAMILIES = {"unary": UNARY, "binary": BINARY, "selection": SELECTION, "activations": ACTIVATIONS, "casts": CASTS,
            "views": VIEWS, "reductions": REDUCTIONS, "contractions": CONTRACTIONS, "indexing": INDEXING, "pooling": POOLING,
            "norms": NORMS, "creation": CREATION}
CASES = [pytest.param(fn, args, id=f"{family}: {name}")
         for family, cases in FAMILIES.items() for name, (fn, args) in cases.items()]


@pytest.mark.parametrize(("fn", "args"), CASES)
def test_static(tools, request, fn, args):
    name = request.node.callspec.id.partition(": ")[2]
    tools.compare(fn, *args, compiled=name != "one_hot")


LEFT_TO_ATEN = {"one_hot", "adaptive_avg_pool2d_backward"}
"""With symbolic sizes: a check with an effect, and windows of unknown size."""


AGAIN = (" of special values", " of integers", " of bf16")
"""Operators that have a row of floats beside: what differs is the element type, and not what symbols become."""


@pytest.mark.parametrize(("fn", "args"), [pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] * str(case.id).endswith(AGAIN)) for case in CASES])
def test_symbolic(tools, request, fn, args):
    name = request.node.callspec.id.partition(": ")[2]
    tools.compare(fn, *args, dynamic=True, compiled=name not in LEFT_TO_ATEN)
