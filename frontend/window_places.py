"""Where the maximum of a pooling window lies, kept for the backward pass as its place within the window: one byte instead of eight.

    share_window_places(joint)    # in place, before the joint graph is partitioned; how many poolings there were

torch's operator gives each maximum's position in the whole image (i64), which for 16-bit images is most of what pooling writes, and its gradient
asks up to four times for each element. Within its window a place is a small number, `sum over dimensions of (offset * product of the spans after
it)`; a dimension's span is what the windows around one position reach, at least the window, so that no two places have one number. The partitioner
then saves the smaller of the two.

The operators below run on any device through ATen, for graphs that are not compiled; `ops/pooling.py` has their rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

__all__ = ["GATHERED", "share_window_places", "spans"]

aten = torch.ops.aten
GATHERED = 4
"""Most windows around an input position that are asked whether it won; with more of them, gradients are scattered."""

_library = torch.library.Library("aicc", "FRAGMENT")
_library.define("window_places(Tensor indices, int[] size, int[] kernel, int[] stride, int[] padding) -> Tensor")
_library.define("max_pool_gradient(Tensor grad, Tensor places, int[] size, int[] kernel, int[] stride, int[] padding) -> Tensor")

_BACKWARD = {aten.max_pool2d_with_indices_backward.default: 2, aten.max_pool3d_with_indices_backward.default: 3}


def spans(kernel: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Of each dimension, the numbers that its offsets have: whole strides that cover the window."""
    return tuple(-(-k // s) * s for k, s in zip(kernel, stride, strict=True))


# -- the operators -------------------------------------------------------------------------------------------------------------


def _starts(out: Sequence[int], stride: Sequence[int], padding: Sequence[int], device: torch.device) -> list[Tensor]:
    """The first position of each window along each dimension, which broadcasts against the result."""
    n = len(out)
    return [(torch.arange(o, device=device) * s - p).reshape([-1 if j == i else 1 for j in range(n)])
            for i, (o, s, p) in enumerate(zip(out, stride, padding, strict=True))]


def _window_places(indices: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                   padding: Sequence[int]) -> Tensor:
    """Flat positions `indices` [*, *out] of maxima in images of `size` -> i8 places in their windows."""
    n, rest, factor = len(size), indices, 1
    code = torch.zeros_like(indices)
    starts = _starts(indices.shape[-n:], stride, padding, indices.device)
    for i in reversed(range(n)):
        code = code + (rest % size[i] - starts[i]) * factor
        rest, factor = rest // size[i], factor * spans(kernel, stride)[i]
    return code.to(torch.int8)


def _max_pool_gradient(grad: Tensor, places: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                       padding: Sequence[int]) -> Tensor:
    """Each gradient [*, *out] at its maximum's position [*, *size], summed."""
    n, rest = len(size), places.to(torch.int64)
    starts = _starts(grad.shape[-n:], stride, padding, grad.device)
    flat, factor = torch.zeros_like(rest), 1
    for i in reversed(range(n)):
        span = spans(kernel, stride)[i]
        flat = flat + (rest % span + starts[i]) * factor
        rest, factor = rest // span, factor * size[i]
    lead = grad.shape[:-n]
    made = grad.new_zeros((*lead, math.prod(size)))
    return made.scatter_add(-1, flat.reshape(*lead, -1), grad.reshape(*lead, -1)).reshape(*lead, *size)


for _name, _run in (("window_places", _window_places), ("max_pool_gradient", _max_pool_gradient)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")


# -- the rewrite ---------------------------------------------------------------------------------------------------------------


def share_window_places(joint: fx.GraphModule) -> int:
    """See the module docstring."""
    graph, found = joint.graph, dict[Any, fx.Node]()
    rewritten = 0
    for target, n in _BACKWARD.items():
        for node in graph.find_nodes(op="call_function", target=target):
            grad, x, *window, _, indices = node.args
            size = tuple(x.meta["val"].shape[-n:])
            shape = _window(n, *window)
            if shape is None or not all(isinstance(s, int) for s in (*size, *grad.meta["val"].shape[-n:])):
                continue
            key = (indices, *shape)
            if key not in found:
                with graph.inserting_after(indices):
                    found[key] = _call(graph, torch.ops.aicc.window_places.default, (indices, size, *shape), indices)
                found[key].meta["val"] = torch.empty_like(indices.meta["val"], dtype=torch.int8)
            with graph.inserting_before(node):
                made = _call(graph, torch.ops.aicc.max_pool_gradient.default, (grad, found[key], size, *shape), node)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            rewritten += 1
    if rewritten:
        joint.recompile()
    return rewritten


def _window(n: int, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[tuple[int, ...], ...] | None:
    """(kernel, stride, padding) of every dimension; None for windows whose places are not asked for, or do not fit a byte."""
    def every(given: Any) -> tuple[int, ...]:
        given = (given,) if isinstance(given, int) else tuple(given)
        return given * n if len(given) == 1 else given
    size = every(kernel)
    steps = every(stride) or size
    covering = math.prod(-(-k // s) for k, s in zip(size, steps, strict=True))
    if any(d != 1 for d in every(dilation)) or covering > GATHERED or math.prod(spans(size, steps)) > 127:
        return None
    return size, steps, every(padding)


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta = dict(like.meta)
    return made
