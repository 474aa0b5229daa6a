"""Parts and other shapes of tensors of symbolic sizes: what is computed, and where views of inputs lie, whatever the input's own offset is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

W = torch.arange(80.0).view(20, 4) / 64

PARTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "half of a pointwise op": lambda x: x.trunc().chunk(2)[0],
    "first rows": lambda x: x.trunc()[:x.shape[0] // 2],
    "half of a sum": lambda x: x.sum(1).chunk(2)[0],
    "half of a product": lambda x: (x @ W)[:x.shape[0] // 2],
    "half of a softmax": lambda x: x.softmax(-1).chunk(2)[0],
    "flattened half": lambda x: x.trunc().chunk(2)[0].flatten(),
}


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_parts(name: str) -> None:
    """The first part of a tensor lies where the tensor does, and is not it: its kernel wrote the whole, behind the part's memory."""
    compiled = torch.compile(PARTS[name], backend="aicc", dynamic=True)
    for n in (129, 64, 301):
        x = torch.randn(n, 20)
        torch.testing.assert_close(compiled(x), PARTS[name](x))


def _written(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x.flatten()


def _written_then_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.reshape(-1)
    x.mul_(2)
    return y, x[1:]


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "flat": lambda x: x.flatten(),
    "flat and more": lambda x: (x.flatten(), x + 1),
    "part": lambda x: x[2:].flatten(),
    "column and transpose": lambda x: (x.select(1, 1), x.t()),
    "written, then flat": _written,
    "written, then parts": _written_then_parts,
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("offset", [0, 1, 8])
@torch.no_grad()
def test_views_of_an_input_that_begins_inside_of_its_memory(name: str, offset: int) -> None:
    compiled = torch.compile(VIEWS[name], backend="aicc", dynamic=True)
    whole = torch.randn(29 * 40 + offset)
    other = whole.clone()
    x, y = whole[offset:].view(29, 40), other[offset:].view(29, 40)
    got, true = compiled(x), VIEWS[name](y)
    torch.testing.assert_close(got, true, rtol=0, atol=0)
    torch.testing.assert_close(whole, other, rtol=0, atol=0)
    for a, b in zip(got if isinstance(got, tuple) else [got], true if isinstance(true, tuple) else [true], strict=True):
        assert a.storage_offset() == b.storage_offset() and a.stride() == b.stride()


@torch.no_grad()
def test_a_computed_size_that_a_guard_says_is_one_is_broadcast() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = F.avg_pool1d(x, 2)
        return y <= F.pad(y, (2, -1)).tril(-1)

    compiled = torch.compile(f, backend="aicc", dynamic=True)
    for shape in ((8, 7, 3), (5, 6, 2), (4, 9, 3)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), f(x))


@pytest.mark.parametrize("kind", ["amin", "amax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_of_an_extreme_of_numbers_computed_again(kind: str, dtype: torch.dtype) -> None:
    """Computed again in float32, none of them is the extreme that was stored rounded, and the gradient was 0 / 0."""
    def f(x: torch.Tensor) -> torch.Tensor:
        return getattr(F.layer_norm(x, x.shape[-1:]), kind)(0)

    x = torch.randn(9, 5, 100).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    weights = torch.randn(5, 100).to(dtype)
    torch.compile(f, backend="aicc")(x).backward(weights)
    f(y).backward(weights)
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=0.05 if dtype != torch.float32 else 1e-4, atol=0.05 if dtype != torch.float32 else 1e-5)
