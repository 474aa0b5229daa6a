"""Mixture-of-experts layers in a form that can be sharded: static shapes, one batched product for all experts.

`dispatch_experts(model)` replaces, in a copy of a transformers model, the forward of every experts module (stacked `gate_up_proj` and
`down_proj`, [experts, ...]) by `dispatched`, which gives the same values. Each expert is sent all tokens, those of others as zeros
(capacity is never exceeded, no token is dropped), so arithmetic grows with experts / experts per token.

Under expert parallelism the tensor [experts, tokens, width] is what moves: cut by tokens before, by experts after, one all-to-all.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

__all__ = ["dispatch_experts", "dispatched"]


def dispatched(experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """hidden [T, H]; index, weights [T, k]: the experts of each token. Gives [T, H]."""
    places = torch.arange(experts.num_experts, device=hidden.device)
    chosen = (index[..., None] == places).to(hidden.dtype)  # [T, k, E]
    routing = (chosen * weights[..., None].to(hidden.dtype)).sum(1)  # [T, E]
    sent = hidden[None] * chosen.sum(1).t()[..., None]  # [E, T, H]
    inner = experts._apply_gate(torch.bmm(sent, experts.gate_up_proj.transpose(1, 2)))
    out = torch.bmm(inner, experts.down_proj.transpose(1, 2))
    return (out * routing.t()[..., None]).sum(0)


def dispatch_experts(model: torch.nn.Module, always: bool) -> None:
    """See the module docstring; in place. Unless `always`, modules whose configured form has static shapes already are left alone."""
    for module in model.modules():
        if not all(hasattr(module, name) for name in ("gate_up_proj", "down_proj", "num_experts", "_apply_gate", "has_bias", "is_transposed")):
            continue
        implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if (always or implementation != "batched_mm") and not module.has_bias and not module.is_transposed:
            module.forward = partial(dispatched, module)
