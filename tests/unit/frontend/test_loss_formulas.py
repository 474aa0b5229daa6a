"""Log-softmax of large vocabularies and the gradient of the negative log-likelihood, as formulas, against ATen."""

from __future__ import annotations

import pytest
import torch
from aicc.frontend.formulas import LARGE_VOCABULARY, log_softmax, nll_loss_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_softmax(dtype: torch.dtype) -> None:
    x = (torch.randn(3, LARGE_VOCABULARY) * 5).to(dtype)
    x[1, 7] = float("-inf")
    got = log_softmax(x, 1, False)
    torch.testing.assert_close(got, torch.log_softmax(x, 1))


def test_log_softmax_of_infinities_is_atens() -> None:
    x = torch.randn(3, LARGE_VOCABULARY)
    x[0], x[1, 5] = float("-inf"), float("inf")
    torch.testing.assert_close(log_softmax(x, 1, False), torch.log_softmax(x, 1), equal_nan=True)


def test_few_classes_stay_whole() -> None:
    assert log_softmax(torch.randn(3, 10), 1, False) is NotImplemented
    assert log_softmax(torch.randn(3, LARGE_VOCABULARY, dtype=torch.float64), 1, False) is NotImplemented


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nll_loss_backward(reduction: str, weighted: bool) -> None:
    x = torch.randn(6, 9, requires_grad=True)
    target = torch.tensor([0, 3, -100, 8, 3, -100])
    weight = torch.rand(9) if weighted else None
    loss, total = torch.ops.aten.nll_loss_forward(x.detach(), target, weight, ["none", "mean", "sum"].index(reduction), -100)
    grad = torch.randn(loss.shape)
    args = (grad, x.detach(), target, weight, ["none", "mean", "sum"].index(reduction), -100, total)
    torch.testing.assert_close(nll_loss_backward(*args), torch.ops.aten.nll_loss_backward(*args))


def test_nll_loss_backward_of_one_sample() -> None:
    x, target, total = torch.randn(9), torch.tensor(4), torch.tensor(1.0)
    args = (torch.tensor(2.0), x, target, None, 1, -100, total)
    torch.testing.assert_close(nll_loss_backward(*args), torch.ops.aten.nll_loss_backward(*args))
