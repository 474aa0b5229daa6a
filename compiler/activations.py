"""Forward and backward graphs of a joint one, with a bound on what is kept between them.

    forward, backward = within_budget(joint, inputs, num_fwd_outputs, budget, split)

`split` is torch's min-cut, which takes a share of the memory that its own choice would need, and computes again what costs least time until that
share is met (by a knapsack over estimated operations). The bytes that are kept depend on it in steps, so shares are bisected: the largest whose saved
tensors fit in the budget is taken, so that no more than needed is computed twice.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.fx as fx
from torch._functorch import config as functorch_config

__all__ = ["kept_bytes", "within_budget"]

STEPS = 5
"""Halvings of the interval of shares."""
Graphs = tuple[fx.GraphModule, fx.GraphModule]


def kept_bytes(forward: fx.GraphModule, num_fwd_outputs: int) -> int:
    """Bytes of the tensors that the forward graph makes for the backward graph alone (arguments are there anyway)."""
    outputs, = forward.graph.output_node().args
    kept = {n for n in outputs[num_fwd_outputs:] if isinstance(n, fx.Node) and n.op != "placeholder"}  # type: ignore[index, union-attr]
    values = [n.meta.get("val") for n in kept - set(outputs[:num_fwd_outputs])]  # type: ignore[index, arg-type]
    return sum(int(v.numel()) * v.element_size() for v in values if isinstance(v, torch.Tensor) and all(isinstance(s, int) for s in v.shape))


def _draws_again(backward: fx.GraphModule) -> bool:
    """A random number that the forward pass has drawn would be drawn anew."""
    return any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in backward.graph.nodes)


def within_budget(joint: fx.GraphModule, num_fwd_outputs: int, budget: int, split: Callable[[fx.GraphModule], Graphs]) -> Graphs:
    """`split(joint)` with at most `budget` bytes kept (0: as many as min-cut likes). A warning says so where that cannot be reached."""
    first = split(copy.deepcopy(joint) if budget else joint)
    if not budget or kept_bytes(first[0], num_fwd_outputs) <= budget:
        return first
    random = _draws_again(first[1])
    best, least, fits = first, kept_bytes(first[0], num_fwd_outputs), False
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        share = (low + high) / 2
        with functorch_config.patch(activation_memory_budget=share):
            made = split(copy.deepcopy(joint))
        kept = kept_bytes(made[0], num_fwd_outputs)
        if _draws_again(made[1]) and not random:
            low = share  # too little: it would not even keep a seed
        elif kept <= budget:
            best, least, fits, low = made, kept, True, share
        else:
            high = share
            if kept < least:
                best, least = made, kept
    if not fits:
        warnings.warn(f"the backward pass is given {least} bytes of the forward pass, the least that was found: activation_bytes={budget} "
                      "is exceeded", RuntimeWarning, stacklevel=2)
    return best
