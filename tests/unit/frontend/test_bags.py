"""Bags of one length: one kernel that reads each row once, the values and gradients of eager, and the operator wherever that would not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from torch import Tensor

F = torch.nn.functional


def both(function: Any, *args: Tensor) -> Compilation:
    """Compares result and gradients with eager; the compilation of the inference graph."""
    found: list[Compilation] = []
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aicc", options={"strict": True, "cache": False})
    with watching(compiled=found.append), torch.no_grad():
        torch.testing.assert_close(compiled(*args), function(*args))
    theirs, ours = ([a.clone().requires_grad_() if a.is_floating_point() else a for a in args] for _ in range(2))
    function(*theirs).square().sum().backward()
    compiled(*ours).square().sum().backward()
    for a, b in zip(theirs, ours, strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(b.grad, a.grad)
    return found[0]


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_matrix_of_indices(mode: str) -> None:
    found = both(lambda t, i: F.embedding_bag(i, t, mode=mode), torch.randn(50, 24), torch.randint(0, 50, (7, 5)))
    assert found.stats["kernels"] == 1 and not found.stats["externs"]
    both(lambda t, i, w: F.embedding_bag(i, t, mode="sum", per_sample_weights=w), torch.randn(50, 24), torch.randint(0, 50, (7, 5)), torch.randn(7, 5))


@pytest.mark.parametrize("function", [
    lambda t, i: F.embedding_bag(i, t, mode="max"), lambda t, i: F.embedding_bag(i, t, mode="sum", padding_idx=3),
    lambda t, i: F.embedding_bag(i.flatten(), t, torch.tensor([0, 4, 4, 20]), mode="mean")])
def test_others_are_the_operator(function: Any) -> None:
    both(function, torch.randn(50, 24), torch.randint(0, 50, (7, 5)))


def test_module_and_bad_index() -> None:
    module = torch.nn.EmbeddingBag(30, 8, mode="sum")
    compiled = torch.compile(module, backend="aicc", options={"strict": True})
    i = torch.randint(0, 30, (4, 6))
    torch.testing.assert_close(compiled(i), module(i))
    with pytest.raises((IndexError, RuntimeError)):
        compiled(torch.full((4, 6), 30))


@pytest.mark.parametrize(("columns", "length"), [(16, 30), (64, 100)])
def test_rows_are_read_side_by_side(columns: int, length: int) -> None:
    """The columns of a row are the vector, even where there are fewer of them than a bag has rows: nothing is gathered element by element."""
    def summed(t: Tensor, i: Tensor) -> Tensor:
        return F.embedding_bag(i, t, mode="sum")
    found: list[Compilation] = []
    torch._dynamo.reset()
    t, i = torch.randn(500, columns), torch.randint(0, 500, (7, length))
    with watching(compiled=found.append):
        result = torch.compile(summed, backend="aicc", options={"strict": True, "cache": False}, dynamic=False)(t, i)
    torch.testing.assert_close(result, summed(t, i))
    assert "gather" not in "".join(c.llvm_ir for c in found)
