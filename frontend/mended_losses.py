"""Losses that torch's own tracing gets wrong, with every backend, written out before it sees them.

`multilabel_margin_loss` takes the targets of a row up to the first negative one. torch's decomposition (2.11 to 2.13) masks the rest only in the set
of targets; its sum over them goes on, with class 0 in the place of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.nn import functional as F
from torch.nn._reduction import get_enum, legacy_get_string

__all__ = ["mend_losses"]


def mend_losses(gm: fx.GraphModule) -> None:
    """Replaces such losses in Dynamo's graph `gm`, in place."""
    for inner in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
        found = [n for n in inner.graph.nodes if n.op == "call_function" and n.target in _MENDED]
        for node in found:
            node.target = _MENDED[node.target]
        if found:
            inner.recompile()


def _multilabel_margin_loss(input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None,
                            reduction: str = "mean") -> Tensor:
    """input [N, C] or [C] of floats, target the same of int64: sum over targets t and other classes i of max(0, 1 - x[t] + x[i]) / C.

    ATen's `LossMultiLabelMargin.cpp`; the arguments are those of `torch.nn.functional`.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    if input.dim() > 2 or input.shape != target.shape or not input.shape[-1:].numel():
        return torch.ops.aten.multilabel_margin_loss.default(input, target, get_enum(reduction))  # says what is wrong with them
    x, targets = torch.atleast_2d(input), torch.atleast_2d(target)
    counts = (targets < 0).cumsum(1) == 0
    safe = torch.where(counts, targets, 0)
    others = torch.zeros_like(x).scatter_add(1, safe, counts.to(x.dtype)) == 0
    margins = (1 - x.gather(1, safe)[:, :, None] + x[:, None, :]).clamp_min(0)
    loss = torch.where(counts[:, :, None] & others[:, None, :], margins, 0).sum((1, 2)) / x.shape[1]
    if reduction == "none":
        return loss.reshape(target.shape[:-1])
    return loss.mean() if reduction == "mean" else loss.sum()


_MENDED: dict[Any, Any] = {F.multilabel_margin_loss: _multilabel_margin_loss}
