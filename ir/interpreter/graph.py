"""Reference semantics of the graph level: each op through the obvious torch function, independent of our decompositions.

Floats narrower than 32 bits are computed in f32 and rounded once at the end, wherever an op accumulates.
Attention rows whose scores are all -inf give 0 (and a log-sum-exp of 0), as torch's own attention does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..core import Operation
from . import arith
from .context import WIDENED, Context, Handler, affine_index, flat_take, to_tensor
from .extern import extern

Tensor = torch.Tensor

__all__ = ["HANDLERS"]


def _wide(x: Tensor) -> Tensor:
    """`x` in the type that sums are accumulated in."""
    return x.to(torch.float32) if x.dtype in WIDENED else x


def _typed(ctx: Context, op: Operation, *values: Tensor) -> list[Tensor]:
    """The results, in the declared element types."""
    return [ctx.to_type(x, r.type) for x, r in zip(values, op.results, strict=True)]


# -- elementwise ------------------------------------------------------------------------------------------------------

def _gelu(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return _typed(ctx, op, F.gelu(_wide(xs[0]), approximate=op["approximate"]))


# -- constants --------------------------------------------------------------------------------------------------------

def _full(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    t = op.result.type
    return [ctx.scalar(op["value"], t.dtype).expand(ctx.shape(t)).clone()]  # type: ignore[attr-defined]


def _constant(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return _typed(ctx, op, to_tensor(op["value"]))


def _iota(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    (n,) = ctx.shape(op.result.type)
    start, step = (v if isinstance(v, float) else ctx.dim(v) for v in (op["start"], op["step"]))
    wide = torch.float64 if isinstance(start, float) or isinstance(step, float) else torch.int64
    return _typed(ctx, op, start + step * torch.arange(n, dtype=wide))


def _random_bits(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    """Philox 4x32-10 as the paper writes it, in numpy's u64."""
    t = op.result.type
    shape = ctx.shape(t)
    seed, low = int(xs[0].item()) & (1 << 64) - 1, np.uint64(0xFFFFFFFF)
    element = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64).reshape(shape)
    half, wide = np.uint64(32), t.dtype.name == "u64"  # type: ignore[attr-defined]
    index = element if wide else element // np.uint64(4)
    c = [index & low, index >> half, np.full_like(index, op["stream"]), np.zeros_like(index)]
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(q >> half) ^ c[1] ^ np.uint64(keys[0]), q & low, (p >> half) ^ c[3] ^ np.uint64(keys[1]), p & low]
        keys = [(k + step) & 0xFFFFFFFF for k, step in zip(keys, (0x9E3779B9, 0xBB67AE85), strict=True)]
    if wide:
        low_word, high_word = c[2 * op["pair"]:2 * op["pair"] + 2]
        return [torch.from_numpy(np.asarray(low_word | high_word << half))]
    return [torch.from_numpy(np.asarray(np.choose((element % np.uint64(4)).astype(np.int64), c).astype(np.uint32)))]


def _sym(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return _typed(ctx, op, torch.tensor(ctx.dim(op["expr"])))


# -- views ------------------------------------------------------------------------------------------------------------

def _reshape(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return [xs[0].reshape(ctx.shape(op.result.type))]


def _permute(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return [xs[0].permute(op["perm"])]


def _expand(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return [xs[0].expand(ctx.shape(op.result.type))]


def _slice(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x, shape = xs[0], ctx.shape(op.result.type)
    for d, (start, step, n) in enumerate(zip(ctx.dims(op["starts"]), ctx.dims(op["steps"]), shape, strict=True)):
        last = start + step * (n - 1)
        if n and not (0 <= start < x.shape[d] and 0 <= last < x.shape[d]):
            raise IndexError(f"the slice reads elements {start} to {last} of dimension {d}, which has {x.shape[d]}")
        if step > 0:
            x = x[(slice(None),) * d + (slice(start, start + step * n, step),)] if n else x.narrow(d, 0, 0)
        else:
            x = _take_along(x, d, start + step * torch.arange(n))
    return [x]


def _take_along(x: Tensor, d: int, index: Tensor) -> Tensor:
    return x[(slice(None),) * d + (index,)]


def _flip(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x = xs[0]
    for d in op["dims"]:
        x = _take_along(x, d, torch.arange(x.shape[d]).flip(0))
    return [x]


def _remap(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x, shape = xs[0].contiguous(), ctx.shape(op.result.type)
    grids = {f"d{i}": torch.arange(n).reshape([-1 if j == i else 1 for j in range(len(shape))]) for i, n in enumerate(shape)}
    flat, inside = affine_index(ctx, op["map"], grids, x.shape)
    if not bool(inside.all()):
        raise IndexError("the map reads out of bounds")
    return [flat_take(x.reshape(-1), flat).expand(shape)]


def _cat(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return [torch.cat(xs, op["dim"])]


def _pad(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x, low, high = xs[0], ctx.dims(op["low"]), ctx.dims(op["high"])
    out = ctx.scalar(op["value"], op.result.type.dtype).expand(ctx.shape(op.result.type)).clone()  # type: ignore[attr-defined]
    source = tuple(slice(max(0, -lo), n - max(0, -hi)) for lo, hi, n in zip(low, high, x.shape, strict=True))
    target = tuple(slice(max(0, lo), n - max(0, hi)) for lo, hi, n in zip(low, high, out.shape, strict=True))
    out[target] = x[source]
    return [out]


# -- contractions -----------------------------------------------------------------------------------------------------

def _matmul(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return _typed(ctx, op, _wide(xs[0]) @ _wide(xs[1]))


def _window(ctx: Context, op: Operation) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return ctx.dims(op["stride"]), ctx.dims(op["padding"]), ctx.dims(op["dilation"])


def _conv(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x, w = map(_wide, xs)
    return _typed(ctx, op, torch.convolution(x, w, None, *_window(ctx, op), False, (0,) * (x.dim() - 2), op["groups"]))


def _conv_transpose(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x, w = map(_wide, xs)
    stride, padding, dilation = _window(ctx, op)
    # the result type says how large the convolution's input was; the sizes it leaves open become the output padding
    extra = tuple(n - ((i - 1) * s - 2 * p + d * (k - 1) + 1) for n, i, k, s, p, d in zip(
        ctx.shape(op.result.type)[2:], x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True))
    return _typed(ctx, op, torch.convolution(x, w, None, stride, padding, dilation, True, extra, op["groups"]))


def _conv_weight_grad(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    grad, x = map(_wide, xs)
    w = x.new_zeros(ctx.shape(op.result.type))
    _, dw, _ = torch.ops.aten.convolution_backward(grad, x, w, None, *_window(ctx, op), False, (0,) * (x.dim() - 2),
                                                   op["groups"],
                                                   [False, True, False])
    return _typed(ctx, op, dw)


def _attention(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    q, k, v = (_wide(x) for x in xs[:3])
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * op["scale"]
    if len(xs) > 3:
        mask = xs[3]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if op["causal"]:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)
    lse = torch.logsumexp(scores, -1, keepdim=True).masked_fill(dead, 0.0)
    return _typed(ctx, op, weights @ v, lse.reshape(ctx.shape(op.results[1].type)))


def _attention_backward(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    """P = exp(S - lse), dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)): Dao 2023, section 3.1.2. P and dS are multiplied in the operands' type."""
    grad, q, k, v, result, lse = (_wide(x) for x in xs[:6])
    groups, repeat = k.shape[1], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * op["scale"]
    if len(xs) > 6:
        scores = scores + xs[6].to(scores.dtype)
    if op["causal"]:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    p = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(scores == float("-inf"), 0.0)
    ds = p * (grad @ v.transpose(-1, -2) - (grad * result).sum(-1, keepdim=True)) * op["scale"]
    ds, p = _wide(ds.to(xs[1].dtype)), _wide(p.to(xs[3].dtype))
    dk, dv = (x.transpose(-1, -2) @ y for x, y in ((ds, q), (p, grad)))
    return _typed(ctx, op, ds @ k, dk.unflatten(1, (groups, repeat)).sum(2), dv.unflatten(1, (groups, repeat)).sum(2))


# -- reductions -------------------------------------------------------------------------------------------------------

def _over(dims: tuple[int, ...], x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """`x` and the dimensions to reduce; none is spelled as a new dimension of size 1, because torch reads () as all."""
    return (x, dims) if dims else (x.unsqueeze(0), (0,))


def _reduction(function: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Handler:
    """A handler that reduces all of `dims`, keeping them, and then gives the declared shape."""
    def run(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
        x, dims = _over(op["dims"], xs[0])
        return _typed(ctx, op, function(_wide(x), dims).reshape(ctx.shape(op.result.type)))
    return run


def _one_by_one(function: Callable[..., Tensor]) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """For torch functions that reduce a single dimension at a time."""
    def run(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        for d in dims:
            x = function(x, d, keepdim=True)
        return x
    return run


def _arg_extreme(largest: bool) -> Handler:
    def run(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
        x, dims = xs[0], op["dims"]
        x = x.to(torch.int64) if x.dtype == torch.bool or x.dtype in arith.WIDE_UNSIGNED else x
        if len(dims) == 1:
            (d,) = dims
        else:
            x, d = x.reshape(-1), 0
        got = torch.argmax(x, d) if largest else torch.argmin(x, d)
        return [got.reshape(ctx.shape(op.result.type))]
    return run


def _var_mean(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x, dims = _over(op["dims"], _wide(xs[0]))
    var, mean = torch.var_mean(x, dims, correction=op["correction"])
    return _typed(ctx, op, *(v.reshape(ctx.shape(r.type)) for v, r in zip((var, mean), op.results)))


SCANS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": torch.cumsum, "prod": torch.cumprod, "max": lambda x, d: torch.cummax(x, d).values,
    "min": lambda x, d: torch.cummin(x, d).values, "logsumexp": torch.logcumsumexp,
}


def _scan(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return _typed(ctx, op, SCANS[op["kind"]](_wide(xs[0]), op["dim"]))


def first_of(x: Tensor, k: int, largest: bool, pick: str = "") -> tuple[Tensor, Tensor]:
    """The first k along the last dimension in sorted order, NaN as the largest, the first of equal ones first; of those the last alone, or of a
    median the first NaN if there is any."""
    places = torch.sort(x, dim=-1, descending=largest, stable=True).indices[..., :k]
    if pick:
        places = places[..., k - 1:]
    if pick == "median":
        bad = torch.isnan(x)
        places = torch.where(bad.any(-1, keepdim=True), bad.to(torch.uint8).argmax(-1, keepdim=True), places)
    return x.gather(-1, places), places


def _sort(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    values, places = first_of(xs[0].movedim(op["dim"], -1), ctx.dim(op["keep"]), op["largest"], op["pick"])
    return _typed(ctx, op, values.movedim(-1, op["dim"]), places.movedim(-1, op["dim"]))


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Handler:
    return lambda ctx, op, xs: _typed(ctx, op, function(_wide(xs[0]), op["dim"]))


def _normalised(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps)
    return (x - mean) * rstd, mean, rstd


def _affine(y: Tensor, parameters: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """y * weight + bias, of whichever are given, each viewed as `shape`."""
    for i, p in enumerate(parameters):
        y = y * _wide(p).reshape(shape) if i == 0 else y + _wide(p).reshape(shape)
    return y


def _norm_results(ctx: Context, op: Operation, y: Tensor, *stats: Tensor) -> list[Tensor]:
    return _typed(ctx, op, y, *(s.reshape(ctx.shape(r.type)) for s, r in zip(stats, op.results[1:])))


def _layer_norm(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x = _wide(xs[0])
    dims = tuple(range(x.dim() - op["ndims"], x.dim()))
    y, mean, rstd = _normalised(x, dims, op["eps"])
    return _norm_results(ctx, op, _affine(y, xs[1:], tuple(x.shape[d] for d in dims)), mean, rstd)


def _rms_norm(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x = _wide(xs[0])
    dims = tuple(range(x.dim() - op["ndims"], x.dim()))
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + op["eps"])
    return _norm_results(ctx, op, _affine(x * rstd, xs[1:], tuple(x.shape[d] for d in dims)), rstd)


def _group_norm(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x = _wide(xs[0])
    batch, channels = x.shape[:2]
    y, mean, rstd = _normalised(x.reshape(batch, op["groups"], -1), (2,), op["eps"])
    return _norm_results(ctx, op, _affine(y.reshape(x.shape), xs[1:], (channels, *(1,) * (x.dim() - 2))), mean, rstd)


# -- windows ----------------------------------------------------------------------------------------------------------

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _max_pool(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    rank = xs[0].dim() - 2
    values, indices = _MAX_POOL[rank](_wide(xs[0]), op["kernel"], op["stride"], op["padding"], op["dilation"] or 1,
                                      op["ceil_mode"], return_indices=True)
    return _typed(ctx, op, values, indices)


def _avg_pool(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x = _wide(xs[0])
    kernel, stride, padding = op["kernel"], op["stride"], op["padding"]
    if x.dim() == 3:  # only the 2-d form takes a divisor
        x, kernel, stride, padding = x.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding)
    pool = F.avg_pool2d if x.dim() == 4 else F.avg_pool3d
    y = pool(x, kernel, stride, padding, op["ceil_mode"], op["count_include_pad"], op["divisor"])
    return _typed(ctx, op, y.reshape(ctx.shape(op.result.type)))


# -- indexing ---------------------------------------------------------------------------------------------------------

def _embedding(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    weight, indices = xs
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= weight.shape[0]):
        raise IndexError(f"indices from {int(indices.min())} to {int(indices.max())} do not fit {weight.shape[0]} rows")
    return [weight[indices]]


def _bags(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    weight, indices, starts, *scales = xs
    rows = _wide(_embedding(ctx, op, [weight, indices])[0])
    if scales:
        rows = rows * _wide(scales[0]).unsqueeze(1)
    counts = None if op["padding"] is None else indices != op["padding"]
    return _typed(ctx, op, segments(op["kind"], rows, counts, starts, int(ctx.shape(op.result.type)[0])))


def segments(kind: str, rows: Tensor, counts: Tensor | None, starts: Tensor, number: int) -> Tensor:
    """[number, D]: the rows [N, D] of each segment combined, those alone for which `counts` holds; of none 0."""
    bounds = [*starts.tolist(), rows.shape[0]][:number + 1]
    if number and (bounds[0] < 0 or bounds[-1] > rows.shape[0] or any(a > b for a, b in itertools.pairwise(bounds))):
        raise RuntimeError(f"segments begin at {bounds[:8]}... of {rows.shape[0]} positions, which fall or lie outside")
    made = rows.new_zeros(number, rows.shape[1])
    how: dict[str, Callable[[Tensor], Tensor]] = {"sum": lambda x: x.sum(0), "mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        some = rows[begin:end] if counts is None else rows[begin:end][counts[begin:end]]
        if some.shape[0]:
            made[n] = how[kind](some)
    return made


def _gather(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return [torch.gather(xs[0], op["dim"], xs[1].to(torch.int64))]


def _take(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return [torch.index_select(xs[0], op["dim"], xs[1])]


def _indices(rank: int, dims: tuple[int, ...], tensors: list[Tensor]) -> list[Tensor | None]:
    """One index per dimension, none where the dimension is taken whole."""
    at: dict[int, Tensor] = dict(zip(dims, tensors, strict=True))
    return [at.get(d) for d in range(rank)]


def _index(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return [torch.ops.aten.index.Tensor(xs[0], _indices(xs[0].dim(), op["dims"], xs[1:]))]


def _index_put(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x, values, *tensors = xs
    return [torch.ops.aten.index_put.default(x, _indices(x.dim(), op["dims"], tensors), values, op["accumulate"])]


_SCATTER = {"add": "sum", "mul": "prod", "amax": "amax", "amin": "amin"}


def _scatter(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    x, index, src = xs
    if op["reduce"] == "set":
        return [torch.scatter(x, op["dim"], index, src)]
    return [torch.scatter_reduce(x, op["dim"], index, src, _SCATTER[op["reduce"]], include_self=True)]


# -- effects ----------------------------------------------------------------------------------------------------------

def _assign(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Any]:
    ctx.assignments.append((op.operands[0], xs[1]))
    return []


def _relu(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return [torch.relu(xs[0])]


def _silu(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    return _typed(ctx, op, F.silu(_wide(xs[0])))


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "sum": lambda x, d: torch.sum(x, d, keepdim=True), "prod": _one_by_one(torch.prod),
    "amax": lambda x, d: torch.amax(x, d, keepdim=True), "amin": lambda x, d: torch.amin(x, d, keepdim=True),
    "any": _one_by_one(torch.any), "all": _one_by_one(torch.all), "mean": lambda x, d: torch.mean(x, d, keepdim=True),
}

HANDLERS: dict[str, Handler] = {
    **{name.replace("arith.", "graph."): handler for name, handler in arith.HANDLERS.items()},
    "graph.require": arith.require, "graph.relu": _relu, "graph.silu": _silu, "graph.gelu": _gelu,
    "graph.full": _full, "graph.constant": _constant, "graph.iota": _iota, "graph.random_bits": _random_bits, "graph.sym": _sym,
    "graph.reshape": _reshape, "graph.permute": _permute, "graph.expand": _expand, "graph.slice": _slice, "graph.flip": _flip,
    "graph.remap": _remap, "graph.cat": _cat, "graph.pad": _pad,
    "graph.matmul": _matmul, "graph.conv": _conv, "graph.conv_transpose": _conv_transpose,
    "graph.conv_weight_grad": _conv_weight_grad, "graph.attention": _attention,
    "graph.attention_backward": _attention_backward,
    **{f"graph.{name}": _reduction(function) for name, function in _REDUCTIONS.items()},
    "graph.argmax": _arg_extreme(True), "graph.argmin": _arg_extreme(False), "graph.var_mean": _var_mean, "graph.scan": _scan,
    "graph.sort": _sort,
    "graph.softmax": _softmax(torch.softmax), "graph.log_softmax": _softmax(torch.log_softmax),
    "graph.layer_norm": _layer_norm, "graph.rms_norm": _rms_norm, "graph.group_norm": _group_norm,
    "graph.max_pool": _max_pool, "graph.avg_pool": _avg_pool,
    "graph.embedding": _embedding, "graph.gather": _gather, "graph.take": _take, "graph.index": _index,
    "graph.index_put": _index_put, "graph.scatter": _scatter, "graph.bags": _bags, "graph.assign": _assign, "graph.extern": extern,
}
