"""Masks that no argument reaches are told to attention; others are left as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.distributed.joint import export_model, make_joint

from .programs import Function

Tensor = torch.Tensor
SHAPE = (2, 4, 6, 8)


def _causal(x: Tensor) -> Tensor:
    """As transformers builds it: from positions, per sequence of the batch."""
    rows, columns = torch.arange(6, device=x.device).view(1, 1, 6, 1), torch.arange(6, device=x.device).view(1, 1, 1, 6)
    return (columns <= rows).expand(2, -1, 6, 6)


MASKS = {
    "causal": (_causal, True, 0),
    "causal, to be added": (lambda x: torch.where(_causal(x), 0.0, -torch.inf), True, 0),
    "causal, lowest number": (lambda x: torch.where(_causal(x), 0.0, torch.finfo(torch.float32).min), True, 0),
    "nothing": (lambda x: torch.ones(6, 6, dtype=torch.bool, device=x.device), None, 0),
    "before it alone": (lambda x: _causal(x).logical_not() | torch.eye(6, dtype=torch.bool, device=x.device), None, 1),
    "a bias": (lambda x: torch.where(_causal(x), 0.5, -torch.inf), None, 1),
    "data": (lambda x: x[:, :1, :, :6] > 0, None, 1),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    mask, causal, left = MASKS[name]
    exported = export_model(Function(lambda x, w: F.scaled_dot_product_attention(x, x * w, x + w, mask(x)), (8,)), (torch.zeros(SHAPE),), {})
    (op,) = [op for op in make_joint(exported, whole=True).module.walk() if op.name == "graph.attention"]
    assert len(op.operands) == 3 + left
    assert bool(op["causal"]) == bool(causal)
