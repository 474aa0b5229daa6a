"""Operators that torch keeps whole, written with operators that aicc compiles: what `decompositions.py` adds of our own.

Each function has the signature of its ATen operator and is traced with fake tensors, so that sizes may be symbolic. Every one that
declines returns NotImplemented, and the operator stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._meta_registrations import meta_embedding_bag, meta_embedding_bag_forward_only

__all__ = ["FORMULAS"]

Tensor = torch.Tensor
aten, aicc = torch.ops.aten, torch.ops.aicc


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


# -- losses -----------------------------------------------------------------------------------------------------------

LARGE_VOCABULARY = 4096
"""Classes from which log-softmax is written out: its result is the largest tensor of many models."""


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """x - max - log(sum(exp(x - max))). Written out, the partitioner sees that all but two numbers per row can be computed again from x, which
    is often 16 bits wide, so that training saves x and not the wider result."""
    if x.dim() == 0 or not isinstance(x.shape[dim], int) or x.shape[dim] < LARGE_VOCABULARY or x.dtype == torch.float64:
        return NotImplemented
    shifted = x.float()
    shifted = shifted - shifted.amax(dim, keepdim=True)
    result = shifted - shifted.exp().sum(dim, keepdim=True).log()
    return result if half_to_float else result.to(x.dtype)


def nll_loss_backward(grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
                      total_weight: Tensor) -> Tensor:
    """The gradient of log-probabilities [N, C] or [C]: -grad at the target, 0 elsewhere, as one comparison per element instead of a scatter."""
    if x.dim() not in (1, 2):
        return NotImplemented
    if reduction == 1:  # the mean
        grad = grad / total_weight
    target = target.unsqueeze(-1)
    factor = torch.where(target != ignore_index, grad.unsqueeze(-1) if x.dim() == 2 and grad.dim() > 0 else grad, 0.0)
    if weight is not None:
        factor = factor * weight[torch.where(target != ignore_index, target, 0)]
    classes = torch.arange(x.shape[-1], device=x.device)
    return torch.where(classes == target, -factor, 0.0).to(x.dtype)


# -- distances --------------------------------------------------------------------------------------------------------


def cdist(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """The p-norms of all differences of rows: [*, P, M], [*, R, M] -> [*, P, R]."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _norm_gradient(gap: Tensor, norm: Tensor, grad: Tensor, p: float) -> Tensor:
    """grad * d norm / d gap; `gap` has one more dimension, the last, than the p-norm and its gradient. 0 where the norm is 0, as ATen does."""
    norm, grad = norm.unsqueeze(-1), grad.unsqueeze(-1)
    if p == 0:
        return torch.zeros_like(gap)
    if p == 1:
        return torch.sign(gap) * grad
    if p == math.inf:
        return torch.sign(gap) * (gap.abs() == norm) * grad
    if p == 2:
        return torch.where(norm == 0, 0.0, gap / norm) * grad
    if p < 2:  # |gap|^(p-1) has a pole where the gap is 0
        inner = torch.where(gap == 0, 0.0, torch.sign(gap) * gap.abs() ** (p - 1))
        return torch.where(norm == 0, 0.0, inner * grad / norm ** (p - 1))
    return torch.where(norm == 0, 0.0, gap * gap.abs() ** (p - 2) * grad / norm ** (p - 1))


def cdist_backward(grad: Tensor, x1: Tensor, x2: Tensor, p: float, distance: Tensor) -> Tensor:
    """The gradient of the first argument."""
    gap = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    return _norm_gradient(gap, distance, grad, p).sum(-2)


def _pairs(n: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and column of each element above the diagonal of [n, n], row-major; found as ATen does, by solving for the row."""
    k = torch.arange(n * (n - 1) // 2, device=device)
    middle = n - 0.5
    row = (middle - torch.sqrt(middle * middle - 2 * k.double() - 1)).long()
    return row, k - n * row + row * (row + 1) // 2 + row + 1


def pdist(x: Tensor, p: float = 2) -> Tensor:
    """The p-norms of the differences of all pairs of rows of [N, M]."""
    if x.shape[0] <= 1:
        return x.new_empty([0])
    row, column = _pairs(x.shape[0], x.device)
    return torch.linalg.vector_norm(x[row] - x[column], p, 1)


def pdist_backward(grad: Tensor, x: Tensor, p: float, distance: Tensor) -> Tensor:
    if x.shape[0] <= 1 or x.shape[1] == 0:
        return torch.zeros_like(x)
    row, column = _pairs(x.shape[0], x.device)
    each = _norm_gradient(x[row] - x[column], distance, grad, p)
    return torch.zeros_like(x).index_add(0, row, each).index_add(0, column, -each)


# -- bags of embeddings -------------------------------------------------------------------------------------------------

SUM, MEAN, MAX = 0, 1, 2


def _bags(indices: Tensor, offsets: Tensor) -> Tensor:
    """The bag of each index: how many offsets lie at or before its position, less one. int64 [N]."""
    count = indices.shape[0]
    starts = torch.zeros(count + 1, dtype=torch.int64, device=indices.device)
    starts = starts.index_add(0, offsets.long(), torch.ones_like(offsets, dtype=torch.int64))
    return starts[:count].cumsum(0) - 1


def embedding_bag(weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = SUM, sparse: bool = False,
                  per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
                  padding_idx: int = -1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(result [B, D], bag of each index [N], size of each bag [B], row that won [B, D]); without MAX the last is of no use."""
    bags = offsets.shape[0] - (1 if include_last_offset else 0)
    count = indices.shape[0]
    bag = _bags(indices, offsets[:bags])
    ours = weight.device.type == "cpu" and weight.is_floating_point()
    rows = weight.index_select(0, indices).to(torch.float32 if weight.dtype.itemsize < 4 else weight.dtype)
    used = indices != padding_idx
    size = torch.zeros(bags, dtype=torch.int64, device=indices.device).index_add(0, bag, used.long())
    won = size
    if mode == MAX:
        wide = bag.unsqueeze(1).expand(rows.shape)
        lowest = rows.new_full((bags, weight.shape[1]), -math.inf)
        best = lowest.scatter_reduce(0, wide, torch.where(used.unsqueeze(1), rows, -math.inf), "amax")
        place = torch.arange(count, device=indices.device).unsqueeze(1)
        same = (rows == best.index_select(0, bag)) & used.unsqueeze(1)
        first = torch.full((bags, weight.shape[1]), count, dtype=torch.int64, device=indices.device)
        first = first.scatter_reduce(0, wide, torch.where(same, place, count), "amin")
        empty = size.unsqueeze(1) == 0
        result = torch.where(empty, 0.0, best)
        safe = torch.where(first < count, first, 0)
        won = torch.where(empty, 0, indices.long()[safe] if count else safe).to(offsets.dtype)
    else:
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(1)
        result = rows.new_zeros(bags, weight.shape[1]).index_add(0, bag, torch.where(used.unsqueeze(1), rows, 0.0))
        if mode == MEAN:
            result = result / size.clamp(min=1).unsqueeze(1)
    if ours:
        result = aicc.bags(weight, indices, offsets, per_sample_weights, mode, padding_idx if padding_idx >= 0 else None, include_last_offset)
    return result.to(weight.dtype), bag.to(offsets.dtype), size.to(offsets.dtype), won


def _as_torch_shapes(whole: Callable[..., Any], meta: Callable[..., Any]) -> Callable[..., Any]:
    """`whole` with the side results in the sizes that the operator has on this device (empty where ATen has no use for them)."""
    def formula(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        result, *side = whole(*args, **kwargs)
        wanted = meta(*args, **kwargs)[1:]
        fitted = [s if s.shape == w.shape else s.new_zeros(w.shape) if w.numel() == 0 or s.dim() != w.dim() else
                  torch.nn.functional.pad(s, (0, w.shape[0] - s.shape[0])) for s, w in zip(side, wanted, strict=True)]
        return (result, *fitted)
    return formula


def embedding_bag_backward(grad: Tensor, indices: Tensor, offsets: Tensor, offset2bag: Tensor, bag_size: Tensor, maximum_indices: Tensor,
                           num_weights: Any, scale_grad_by_freq: bool, mode: int, sparse: bool, per_sample_weights: Tensor | None,
                           padding_idx: int = -1) -> Tensor:
    """The dense gradient of the weights [num_weights, D]."""
    if sparse or scale_grad_by_freq:
        return NotImplemented
    made = grad.new_zeros(num_weights, grad.shape[1])
    if mode == MAX:
        kept = (bag_size != 0).unsqueeze(1) & (maximum_indices >= 0)
        return made.scatter_add(0, torch.where(kept, maximum_indices, 0).long(), torch.where(kept, grad, 0.0))
    bag = _bags(indices, offsets[:grad.shape[0]])
    if mode == MEAN:
        grad = grad / bag_size[:grad.shape[0]].clamp(min=1).unsqueeze(1)
    each = grad.index_select(0, bag)
    if per_sample_weights is not None:
        each = each * per_sample_weights.unsqueeze(1)
    return made.index_add(0, indices, torch.where((indices != padding_idx).unsqueeze(1), each, 0.0))


def embedding_bag_weights_backward(grad: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor, offset2bag: Tensor, mode: int,
                                   padding_idx: int = -1) -> Tensor:
    """The gradient of per_sample_weights [N]."""
    bag = _bags(indices, offsets[:grad.shape[0]])
    work = torch.float32 if grad.dtype.itemsize < 4 else grad.dtype
    each = (grad.index_select(0, bag).to(work) * weight.index_select(0, indices).to(work)).sum(1).to(grad.dtype)
    return torch.where(indices != padding_idx, each, 0.0)


# -- adaptive pooling -----------------------------------------------------------------------------------------------------


def _ranges(size: Any, out: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `out` windows over `size` elements: the positions read, i64 [out, L], which of them count, and how many do.

    Window o covers [floor(o * size / out), ceil((o + 1) * size / out)); with the sizes exchanged, the windows that cover an element.
    """
    longest = size // out + (0 if isinstance(size, int) and isinstance(out, int) and size % out == 0 else 2)
    o = torch.arange(out, device=device).unsqueeze(1)
    first, end = o * size // out, ((o + 1) * size + out - 1) // out
    at = first + torch.arange(longest, device=device)
    return at.clamp(max=size - 1), at < end, (end - first).squeeze(1)


def _axis(t: Tensor, dim: int, rank: int) -> Tensor:
    """A tensor over one dimension, shaped to broadcast along `dim` of `rank`."""
    return t.reshape(*t.shape, *(1,) * (rank - dim - 1))


def adaptive_mean(x: Tensor, output_size: Sequence[Any]) -> Tensor:
    """Means over the windows, one spatial dimension after the other; windows of one size are left to the operator's own row."""
    n = len(output_size)
    if _even(x.shape[-n:], output_size):
        return NotImplemented
    work = x.float() if x.dtype.itemsize < 4 else x
    rank = x.dim()
    for dim, out in zip(range(rank - n, rank), output_size, strict=True):
        at, inside, count = _ranges(x.shape[dim], out, x.device)
        taken = work.index_select(dim, at.reshape(-1)).unflatten(dim, tuple(at.shape))
        total = torch.where(_axis(inside, dim + 1, rank + 1), taken, 0.0).sum(dim + 1)
        work = total / _axis(count, dim, rank)
    return work.to(x.dtype)


def _even(size: Sequence[Any], out: Sequence[Any]) -> bool:
    """True if the windows are known to be of one size, or if there is nothing in them."""
    return all(isinstance(o, int) and (o == 1 or (isinstance(s, int) and (o == 0 or s == 0 or s % o == 0)))
               for s, o in zip(size, out, strict=True))


def _spread(grad: Tensor, x: Tensor, n: int) -> Tensor:
    """Each input element gathers its share from every window that covers it."""
    rank = x.dim()
    if _even(x.shape[-n:], grad.shape[-n:]):
        return NotImplemented
    work = grad.float() if grad.dtype.itemsize < 4 else grad
    for dim in range(rank - n, rank):
        size, out = x.shape[dim], grad.shape[dim]
        _, _, count = _ranges(size, out, x.device)
        work = work / _axis(count, dim, rank)
        at, covers, _ = _ranges(out, size, x.device)
        taken = work.index_select(dim, at.reshape(-1)).unflatten(dim, tuple(at.shape))
        work = torch.where(_axis(covers, dim + 1, rank + 1), taken, 0.0).sum(dim + 1)
    return work.to(grad.dtype)


def adaptive_max(x: Tensor, output_size: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The maximum of each window and its flat position among the spatial dimensions; the first of equal ones."""
    n, rank = len(output_size), x.dim()
    if 0 in x.shape or 0 in output_size:
        return NotImplemented
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    best = x
    place: Tensor | None = None
    weight: Any = 1
    for dim, out in zip(reversed(range(rank - n, rank)), reversed(output_size), strict=True):
        at, inside, _ = _ranges(x.shape[dim], out, x.device)
        taken = best.index_select(dim, at.reshape(-1)).unflatten(dim, tuple(at.shape))
        best, k = torch.where(_axis(inside, dim + 1, rank + 1), taken, lowest).max(dim + 1)
        here = (_axis(at[:, 0], dim, rank) + k) * weight
        if place is not None:
            before = place.index_select(dim, at.reshape(-1)).unflatten(dim, tuple(at.shape))
            here = here + before.gather(dim + 1, k.unsqueeze(dim + 1)).squeeze(dim + 1)
        place, weight = here, weight * x.shape[dim]
    assert place is not None
    return best, place


def adaptive_max_backward(n: int) -> Callable[..., Tensor]:
    """Each output gradient goes to the input element that won."""
    def formula(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        if grad.numel() == 0:
            return torch.zeros_like(x)
        flat = torch.zeros_like(x).flatten(-n).scatter_add(-1, indices.flatten(-n), grad.flatten(-n))
        return flat.reshape(x.shape)
    return formula


def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _spread(grad, x, 2)


def adaptive_avg_pool3d_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _spread(grad, x, 3)


# -- other ------------------------------------------------------------------------------------------------------------------


def trilinear(a: Tensor, b: Tensor, c: Tensor, expand1: Sequence[int], expand2: Sequence[int], expand3: Sequence[int],
              sumdim: Sequence[int], unroll_dim: int = 1) -> Tensor:
    """(a * b * c) summed over `sumdim`, each with dimensions of size 1 inserted at its `expand`."""
    def wide(t: Tensor, dims: Sequence[int]) -> Tensor:
        for d in sorted(dims):
            t = t.unsqueeze(d)
        return t
    return (wide(a, expand1) * wide(b, expand2) * wide(c, expand3)).sum(tuple(sumdim))


def bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """How many boundaries, which ascend, lie below each element (or, with `right`, not above it): a binary search, bit by bit.

    torch's own decomposition indexes with a 0-d tensor, which reads it on the host.
    """
    count = boundaries.shape[0]
    if not isinstance(count, int):
        return NotImplemented
    place = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    for bit in reversed(range(count.bit_length())):
        probe = place + (1 << bit)
        bound = boundaries.take(probe.clamp(max=count) - 1)
        beyond = bound > x if right else bound >= x
        place = torch.where((probe <= count) & ~beyond, probe, place)
    return place.to(torch.int32) if out_int32 else place


def angle(x: Tensor) -> Tensor:
    """The angle of real numbers: 0, pi for negative ones, NaN for NaN."""
    if x.is_complex():
        return NotImplemented
    real = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    return torch.where(torch.isnan(real), real, torch.where(real < 0, math.pi, 0.0).to(real.dtype))


FORMULAS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: flash_attention_backward,
    aten._log_softmax.default: log_softmax,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten._cdist_forward.default: cdist,
    aten._cdist_backward.default: cdist_backward,
    aten._pdist_forward.default: pdist,
    aten._pdist_backward.default: pdist_backward,
    aten._embedding_bag.default: _as_torch_shapes(embedding_bag, meta_embedding_bag),
    aten._embedding_bag_forward_only.default: _as_torch_shapes(embedding_bag, meta_embedding_bag_forward_only),
    aten._embedding_bag_backward.default: embedding_bag_backward,
    aten._embedding_bag_per_sample_weights_backward.default: embedding_bag_weights_backward,
    aten._adaptive_avg_pool2d.default: adaptive_mean,
    aten._adaptive_avg_pool3d.default: adaptive_mean,
    aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
    aten._adaptive_avg_pool3d_backward.default: adaptive_avg_pool3d_backward,
    aten.adaptive_max_pool2d.default: adaptive_max,
    aten.adaptive_max_pool3d.default: adaptive_max,
    aten.adaptive_max_pool2d_backward.default: adaptive_max_backward(2),
    aten.adaptive_max_pool3d_backward.default: adaptive_max_backward(3),
    aten._trilinear.default: trilinear,
    aten.angle.default: angle,
    aten.bucketize.Tensor: bucketize,
}
