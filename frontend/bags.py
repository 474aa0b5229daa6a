"""Bags of embeddings of one length are a sum of rows: `F.embedding_bag` of a matrix of indices becomes a gather that is summed in one kernel.

The operator itself sees a flat list of indices and where the bags begin, that is, data. On CPUs it is

    aicc::bags(weight, indices, starts, scales, mode, padding, closed) -> result [B, D]

which is the graph dialect's `graph.bags`; its gradients, and GPUs, have `formulas.py`. `closed`: the last of `starts` is the end of the last bag.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["MODES", "bag", "write_out_bags"]

MODES = ("sum", "mean", "max")
"""By ATen's number."""

_library = torch.library.Library("aicc", "FRAGMENT")
_library.define("bags(Tensor weight, Tensor indices, Tensor starts, Tensor? scales, int mode, int? padding, bool closed) -> Tensor")


def _bags(weight: Tensor, indices: Tensor, starts: Tensor, scales: Tensor | None, mode: int, padding: int | None, closed: bool) -> Tensor:
    return F.embedding_bag(indices, weight, starts, mode=MODES[mode], per_sample_weights=scales, include_last_offset=closed, padding_idx=padding)


def _fake(weight: Tensor, indices: Tensor, starts: Tensor, scales: Tensor | None, mode: int, padding: int | None, closed: bool) -> Tensor:
    return weight.new_empty((starts.shape[0] - int(closed), weight.shape[1]))


_library.impl("bags", _bags, "CompositeExplicitAutograd")
torch.library.register_fake("aicc::bags", _fake, lib=_library)


def bag(indices: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2.0,
        scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, per_sample_weights: Tensor | None = None,
        include_last_offset: bool = False, padding_idx: int | None = None) -> Tensor:
    """`F.embedding_bag`: written out for integer `indices` [B, L], L at least 1, summed or averaged (perhaps with weights [B, L]), else as it is."""
    plain = offsets is None and max_norm is None and not scale_grad_by_freq and not sparse and padding_idx is None and not include_last_offset
    if not plain or indices.dim() != 2 or mode not in ("sum", "mean") or not isinstance(indices.shape[1], int) or indices.shape[1] == 0:
        return F.embedding_bag(indices, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
                               include_last_offset, padding_idx)
    rows = F.embedding(indices, weight)
    if per_sample_weights is not None:
        if mode != "sum" or per_sample_weights.shape != indices.shape:  # an error, which is torch's to report
            return F.embedding_bag(indices, weight, mode=mode, per_sample_weights=per_sample_weights)
        rows = rows * per_sample_weights.unsqueeze(2)
    return rows.sum(1) if mode == "sum" else rows.mean(1)


def write_out_bags(gm: fx.GraphModule) -> int:
    """Lets each call in `gm` and the graphs within decide for itself. How many there are."""
    found = 0
    for inner in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
        calls: list[Any] = inner.graph.find_nodes(op="call_function", target=torch.nn.functional.embedding_bag)
        for n in calls:
            n.target = bag
        if calls:
            inner.recompile()
        found += len(calls)
    return found
