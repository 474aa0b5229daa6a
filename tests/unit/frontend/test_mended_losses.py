"""Losses that torch's own tracing gets wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.product
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [6, None])
def test_multilabel_margin_loss(reduction: str, rows: int | None) -> None:
    """Targets end at the first -1, what stands behind it included."""
    targets = torch.tensor([[3, 0, -1, 1, 2], [-1, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 2, -1, 0, 0], [1, -1, -1, -1, -1], [0, 1, 2, 3, -1]])
    sides = []
    for call in (torch.compile(lambda x, t: F.multilabel_margin_loss(x, t, reduction=reduction), backend="aicc", fullgraph=True),
                 lambda x, t: F.multilabel_margin_loss(x, t, reduction=reduction)):
        torch.manual_seed(0)
        x = torch.randn(6, 5).requires_grad_()
        given = (x, targets) if rows else (x[0], targets[0])
        loss = call(*given)
        (loss * torch.arange(1.0, 1 + loss.numel()).reshape(loss.shape)).sum().backward()
        sides.append((loss.detach(), x.grad))
    torch.testing.assert_close(*sides, rtol=1e-6, atol=1e-6)
    assert sides[0][0].shape == sides[1][0].shape


def test_hardswish_overflows_as_in_eager() -> None:
    x = torch.tensor([torch.finfo(torch.float32).max, 1e38, 3.0, 0.5, -0.5, -3.0, -torch.inf, torch.inf])
    got = torch.compile(F.hardswish, backend="aicc")(x)
    torch.testing.assert_close(got, F.hardswish(x), rtol=2e-7, atol=0, equal_nan=True)
