"""What loops an op has: one row per op, for the planner (`passes/shard/op_graph.py`).

Entry points: `FUNCTIONS` (functions of torch that count as one op) and `rule_of(name)` (ATen operations by name, without overload).
An op that no row names is described as one that cannot be cut: that is never wrong, only slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F

from ...passes.shard.op_graph import Loop

__all__ = ["FUNCTIONS", "Rule", "rule_of"]

Dims = tuple[int, ...]
Described = tuple[tuple[Loop, ...], list[Dims], Dims, str]
Tensors = list[torch.Tensor]
Describe = Callable[[Tensors, Tensors, tuple[Any, ...], dict[str, Any]], Described]


@dataclass(frozen=True)
class Rule:
    """describe: (inputs, results, args, kwargs) -> loops, dims per input, dims of the result, kind. saved: operand positions that backward
    reads ((-1,): all). free: a view.
    """

    describe: Describe
    saved: Dims = ()
    free: bool = False

    def saves(self, position: int) -> bool:
        return self.saved == (-1,) or position in self.saved


def _aligned(shape: torch.Size, extents: torch.Size) -> Dims:
    """Loops of a broadcast operand: from the right, -1 where it has extent one and the result has not."""
    lead = len(extents) - len(shape)
    return tuple(lead + i if lead + i >= 0 and n == extents[lead + i] else -1 for i, n in enumerate(shape))


def _elementwise(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    out = results[0].shape
    return (tuple(Loop(n, "parallel") for n in out), [_aligned(t.shape, out) for t in inputs], tuple(range(len(out))), "memory")


def _unknown(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    return (), [(-1,) * t.ndim for t in inputs], (-1,) * results[0].ndim, "unknown"


def _along(whole: Callable[[tuple[Any, ...], dict[str, Any], torch.Tensor], set[int]]) -> Describe:
    """An op over the first input's dimensions, some of which must stay whole; the result has the same dimensions, or lacks those."""
    def describe(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
        x, out = inputs[0], results[0]
        fixed = {d % x.ndim for d in whole(args, kwargs, x)} if x.ndim else set()
        loops = tuple(Loop(n, "whole" if i in fixed else "parallel") for i, n in enumerate(x.shape))
        kept = [i for i in range(x.ndim) if i not in fixed]
        dims = tuple(i if i < x.ndim else -1 for i in range(out.ndim)) if out.ndim == x.ndim else tuple(kept)
        dims = tuple(d if d >= 0 and d not in fixed else -1 for d in dims)
        if len(dims) != out.ndim:
            return _unknown(inputs, results, args, kwargs)
        rest = [tuple(d if d >= 0 and d not in fixed else -1 for d in _aligned(t.shape, x.shape)) if t.ndim <= x.ndim else (-1,) * t.ndim
                for t in inputs[1:]]
        return loops, [tuple(-1 if i in fixed else i for i in range(x.ndim)), *rest], dims, "memory"
    return describe


def _dim_argument(position: int, default: Any = None) -> Callable[[tuple[Any, ...], dict[str, Any], torch.Tensor], set[int]]:
    def find(args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor) -> set[int]:
        value = kwargs.get("dim", args[position] if len(args) > position else default)
        if value is None:
            return set(range(x.ndim))
        return set(value) if isinstance(value, (list, tuple)) else {int(value)}
    return find


def _normalized(args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor) -> set[int]:
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else x.shape[-1:])
    return set(range(x.ndim - len(shape), x.ndim))


def _permuted(order: Callable[[tuple[Any, ...], dict[str, Any], int], list[int]]) -> Describe:
    def describe(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
        x = inputs[0]
        return (tuple(Loop(n, "parallel") for n in x.shape), [tuple(range(x.ndim))], tuple(order(args, kwargs, x.ndim)), "memory")
    return describe


def _swap(args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int) -> list[int]:
    order = list(range(ndim))
    a, b = (args[1], args[2]) if len(args) > 2 else (0, ndim - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _view(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    """Dimensions in row-major groups of equal size. Of a group only the outermost dimension can be cut, and only in as many as divide it
    on both sides: then rank r's rows before are rank r's rows after.
    """
    before, after = list(inputs[0].shape), list(results[0].shape)
    loops: list[Loop] = []
    dims_in, dims_out = [-1] * len(before), [-1] * len(after)
    i = j = 0
    while i < len(before) and j < len(after):
        start_i, start_j, a, b = i, j, before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(before):
                a *= before[i]
                i += 1
            elif j < len(after):
                b *= after[j]
                j += 1
            else:
                return _unknown(inputs, results, args, kwargs)
        outer_i = next((d for d in range(start_i, i) if before[d] > 1), -1)
        outer_j = next((d for d in range(start_j, j) if after[d] > 1), -1)
        if outer_i >= 0 and outer_j >= 0:
            dims_in[outer_i] = dims_out[outer_j] = len(loops)
            loops.append(Loop(gcd(before[outer_i], after[outer_j]), "parallel"))
    return tuple(loops), [tuple(dims_in)], tuple(dims_out), "memory"


def _resized(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    """Same rank: dimensions that keep their extent are cut as they are, others stay whole (slice, expand, pad, split, cat)."""
    out = results[0].shape
    same = [all(t.ndim == len(out) and t.shape[d] == n for t in [*inputs, *results]) for d, n in enumerate(out)]
    loops = tuple(Loop(n, "parallel" if same[d] else "whole") for d, n in enumerate(out))
    dims = tuple(d if same[d] else -1 for d in range(len(out)))
    return loops, [dims if t.ndim == len(out) else (-1,) * t.ndim for t in inputs], dims, "memory"


def _expand(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    return _elementwise(inputs, results, args, kwargs)


def _linear(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    x, w = inputs[0], inputs[1]
    lead = x.ndim - 1
    loops = (*(Loop(n, "parallel") for n in x.shape[:-1]), Loop(w.shape[0], "parallel"), Loop(w.shape[1], "reduction"))
    dims = [(*range(lead), lead + 1), (lead, lead + 1), *([(lead,)] if len(inputs) > 2 else [])]
    return loops, dims, (*range(lead), lead), "gemm"


def _matmul(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    a, b = inputs[-2], inputs[-1]  # addmm and baddbmm have the bias first
    out = results[0].shape
    if a.ndim < 2 or b.ndim < 2:
        return _unknown(inputs, results, args, kwargs)
    lead = len(out) - 2
    loops = (*(Loop(n, "parallel") for n in out[:-1]), Loop(out[-1], "parallel"), Loop(a.shape[-1], "reduction"))
    k = len(out)

    def batch(t: torch.Tensor) -> Dims:
        return _aligned(t.shape[:-2], out[:-2])

    dims = [(*batch(a), lead, k), (*batch(b), k, lead + 1)]
    if len(inputs) > 2:
        return _unknown(inputs, results, args, kwargs) if inputs[0].ndim > 2 else _biased(loops, dims, inputs, out)
    return loops, dims, tuple(range(len(out))), "gemm"


def _biased(loops: tuple[Loop, ...], dims: list[Dims], inputs: Tensors, out: torch.Size) -> Described:
    """addmm: operands in the order of its arguments would put the bias first; a GEMM's two factors come first instead."""
    bias, a, b = inputs
    inputs[:] = [a, b, bias]
    return loops, [*dims, _aligned(bias.shape, out)], tuple(range(len(out))), "gemm"


def _attention(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    q, k, v = inputs[:3]
    if q.ndim != 4:
        return _unknown(inputs, results, args, kwargs)
    batch, heads, rows, width = q.shape
    shared = heads // k.shape[1]
    # batch, key-value heads, query heads per key-value head, query rows, keys, score and value width; a causal mask halves the work
    loops = (Loop(batch, "parallel"), Loop(k.shape[1], "parallel"), Loop(shared, "whole"), Loop(rows, "whole"),
             Loop(max(1, k.shape[2] // (2 if kwargs.get("is_causal", rows > 1) else 1)), "whole"), Loop(width + v.shape[3], "whole"))
    dims = (0, 1, -1, -1)
    return loops, [dims, dims, dims, *((-1,) * t.ndim for t in inputs[3:])], dims, "attention"


def _embedding(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    table, indices = (inputs[0], inputs[1]) if inputs[0].is_floating_point() else (inputs[1], inputs[0])
    n = indices.ndim
    loops = (*(Loop(e, "parallel") for e in indices.shape), Loop(table.shape[0], "reduction"), Loop(table.shape[1], "parallel"))
    rows = {id(table): (n, n + 1), id(indices): tuple(range(n))}
    return loops, [rows[id(t)] for t in inputs], (*range(n), n + 1), "lookup"


def _grouped(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    """Rows sorted by expert times each expert's matrix: a GEMM in which every row meets one of the matrices."""
    x, w = inputs[:2]
    if x.ndim != 2 or w.ndim != 3:
        return _unknown(inputs, results, args, kwargs)
    loops = (Loop(x.shape[0], "whole"), Loop(w.shape[2], "parallel"), Loop(w.shape[1], "reduction"))
    return loops, [(0, 2), (-1, 2, 1), *((-1,) * t.ndim for t in inputs[2:])], (0, 1), "gemm"


def _gathered(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    """Rows picked or put by an index along the first dimension: that one stays whole, the others are cut as they are."""
    x, out = inputs[0], results[0]
    if x.ndim != out.ndim or x.shape[1:] != out.shape[1:]:
        return _unknown(inputs, results, args, kwargs)
    loops = (Loop(out.shape[0], "whole"), *(Loop(n, "parallel") for n in out.shape[1:]))
    dims = (-1, *range(1, out.ndim))
    return loops, [dims if t.shape[1:] == out.shape[1:] and t.ndim == out.ndim else (-1,) * t.ndim for t in inputs], dims, "memory"


def _loss(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    """Mean over rows; the vocabulary may be cut as well (each rank its part of the sum of exponents)."""
    logits = inputs[0]
    if logits.ndim != 2 or results[0].ndim:
        return _unknown(inputs, results, args, kwargs)
    loops = (Loop(logits.shape[0], "reduction"), Loop(logits.shape[1], "reduction"))
    return loops, [(0, 1), *((0,) if t.ndim == 1 and t.shape[0] == logits.shape[0] else (-1,) * t.ndim for t in inputs[1:])], (), "loss"


def _convolution(inputs: Tensors, results: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Described:
    x, w, out = inputs[0], inputs[1], results[0]
    if w.shape[1] != x.shape[1]:  # grouped
        return _unknown(inputs, results, args, kwargs)
    spatial = out.ndim - 2
    rows = 1
    for n in out.shape[2:]:
        rows *= n
    taps = w.numel() // (w.shape[0] * w.shape[1])
    loops = (Loop(x.shape[0], "parallel"), Loop(w.shape[0], "parallel"), Loop(x.shape[1], "reduction"), Loop(rows, "whole"), Loop(taps, "whole"))
    return loops, [(0, 2, *(-1,) * spatial), (1, 2, *(-1,) * spatial), *((1,) for _ in inputs[2:])], (0, 1, *(-1,) * spatial), "convolution"


ELEMENTWISE, VIEW = Rule(_elementwise), Rule(_view, free=True)
# Functions that count as one op.
FUNCTIONS: dict[Callable[..., Any], Rule] = {
    F.linear: Rule(_linear, (0,)), F.scaled_dot_product_attention: Rule(_attention, (0, 1, 2)),
    F.layer_norm: Rule(_along(_normalized), (0,)), F.rms_norm: Rule(_along(_normalized), (0,)), F.embedding: Rule(_embedding),
    F.cross_entropy: Rule(_loss, (0,)), torch.matmul: Rule(_matmul, (0, 1)), torch.Tensor.matmul: Rule(_matmul, (0, 1)),
    torch.Tensor.__matmul__: Rule(_matmul, (0, 1)), torch.bmm: Rule(_matmul, (0, 1)), torch.Tensor.reshape: VIEW, torch.reshape: VIEW,
    F.softmax: Rule(_along(_dim_argument(1, -1)), (0,)), F.conv2d: Rule(_convolution, (0,)), F.conv1d: Rule(_convolution, (0,)),
}
# Backward of these reads nothing; of the others their inputs.
_LINEAR_ELEMENTWISE = frozenset("""
    add sub neg add_ sub_ clone _to_copy copy_ lift_fresh rsub masked_fill where ones_like zeros_like eq ne lt le gt ge
    logical_not logical_and bitwise_and contiguous masked_fill_
""".split())
_CURVED_ELEMENTWISE = frozenset("""
    mul div mul_ div_ silu gelu relu relu_ tanh sigmoid exp rsqrt sqrt pow square cos sin native_dropout dropout clamp
    minimum maximum softplus elu leaky_relu log abs erf hardswish silu_ threshold_backward reciprocal dropout_
""".split())
_ATEN: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR_ELEMENTWISE, ELEMENTWISE), **dict.fromkeys(_CURVED_ELEMENTWISE, Rule(_elementwise, (-1,))),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "_reshape_alias", "detach", "alias"), VIEW),
    "t": Rule(_permuted(lambda _a, _k, n: [*range(n)][::-1]), free=True), "transpose": Rule(_permuted(_swap), free=True),
    "permute": Rule(_permuted(lambda a, _k, n: [d % n for d in a[1]]), free=True), "expand": Rule(_expand, free=True),
    **dict.fromkeys(("slice", "split", "split_with_sizes", "chunk", "narrow"), Rule(_resized, free=True)), "cat": Rule(_resized),
    **dict.fromkeys(("mm", "bmm", "addmm", "matmul"), Rule(_matmul, (0, 1))),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax"), Rule(_along(_dim_argument(1)), (0,))),
    **dict.fromkeys(("mean", "sum", "amax", "argmax", "cumsum"), Rule(_along(_dim_argument(1)))), "var": Rule(_along(_dim_argument(1)), (0,)),
    "select": Rule(_along(_dim_argument(1)), free=True), "_safe_softmax": Rule(_along(_dim_argument(1)), (0,)),
    **dict.fromkeys(("empty_like", "rand_like", "bernoulli_"), Rule(_elementwise, free=True)),  # a dropout mask: its kernel is the product's
    "_grouped_mm": Rule(_grouped, (0, 1)), **dict.fromkeys(("index", "index_put_", "index_add", "index_add_", "index_select"), Rule(_gathered)),
    "native_layer_norm": Rule(_along(_normalized), (0,)), "embedding": Rule(_embedding), "convolution": Rule(_convolution, (0,)),
}


def rule_of(name: str) -> Rule:
    """The row of an ATen operation; one that cannot be cut where there is none."""
    return _ATEN.get(name, Rule(_unknown, (-1,)))
