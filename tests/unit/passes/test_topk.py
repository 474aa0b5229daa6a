"""Top-k: the levels agree with each other and with eager, the order of equal elements and of NaN, and when it is left to the library."""

from __future__ import annotations

import math

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from support.stages import AVX2, GENERIC, capture, check_levels
from torch import Tensor

INFINITY = math.inf


def compiled(function, *args: Tensor, **options) -> tuple[object, list[str]]:  # type: ignore[no-untyped-def]
    """(result, operators that are ATen's)."""
    found: list[Compilation] = []
    torch._dynamo.reset()
    f = torch.compile(function, backend="aicc", dynamic=options.pop("dynamic", False), options={"strict": True, "cache": False})
    with watching(compiled=found.append):
        result = f(*args)
    return result, [str(e) for c in found for e in c.stats["externs"]]


@pytest.mark.parametrize("target", [GENERIC, AVX2], ids=["generic", "avx2"])
def test_levels(target) -> None:  # type: ignore[no-untyped-def]
    check_levels(capture(lambda x: torch.topk(x.exp(), 4)[0], (torch.randn(3, 70),)), target)
    check_levels(capture(lambda x: torch.topk(x, 3, largest=False), (torch.randperm(140).reshape(2, 70),)), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8])
@pytest.mark.parametrize("largest", [True, False])
def test_stable_order(dtype: torch.dtype, largest: bool) -> None:
    """Values bit for bit as eager's; of equal ones the first; NaN is the largest, infinities are ordinary, even where all of a row are the worst."""
    for n, k in ((64, 2), (300, 16), (1103, 64)):
        x = (torch.randn(6, n) * 50).to(dtype)
        if dtype.is_floating_point:
            x[0, 3], x[1], x[2], x[3, 1:n - 3] = math.nan, math.nan, -INFINITY, math.nan
            x[4, ::2] = INFINITY
        (values, places), externs = compiled(lambda x, k=k: torch.topk(x, k, -1, largest), x)
        best = torch.sort(x, dim=-1, descending=largest, stable=True)
        torch.testing.assert_close(values, torch.topk(x, k, -1, largest).values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(places, best.indices[:, :k])
        assert not externs


@pytest.mark.parametrize("order", ["ascending", "descending", "constant"])
def test_rows_in_order(order: str) -> None:
    x = {"ascending": torch.arange(4000.0), "descending": -torch.arange(4000.0), "constant": torch.zeros(4000)}[order].expand(3, 4000)
    (values, places), _ = compiled(lambda x: torch.topk(x, 10), x)
    assert torch.equal(values, torch.sort(x, dim=-1, descending=True, stable=True).values[:, :10])
    assert torch.equal(places, torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :10])


def test_one_program_for_all_sizes_and_views() -> None:
    f = torch.compile(lambda x: torch.topk(x, 4), backend="aicc", dynamic=True, options={"strict": True})
    for shape in ((3, 50), (7, 333), (1, 16), (40, 17)):
        x = torch.randn(*shape)
        assert all(torch.equal(a, b) for a, b in zip(f(x), torch.topk(x, 4), strict=True))
    x = torch.randn(80, 60)
    (values, places), externs = compiled(lambda x: torch.topk(x.t(), 3), x)
    assert torch.equal(values, torch.topk(x.t(), 3).values) and torch.equal(places, torch.topk(x.t(), 3).indices) and not externs


def test_gradient() -> None:
    x = torch.randn(5, 200, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.topk(x, 6).values.square().sum().backward()
    compiled(lambda x: torch.topk(x, 6).values.square().sum(), y)[0].backward()
    torch.testing.assert_close(y.grad, x.grad)


@pytest.mark.parametrize("function", [
    lambda x: torch.topk(x, 65), lambda x: torch.topk(x, 20), lambda x: torch.topk(x, 3, dim=0)])
def test_the_rest_is_the_library(function) -> None:  # type: ignore[no-untyped-def]
    """More than 64, more than 1/16 of the row, other dimensions."""
    x = torch.randn(64, 79) if function(torch.randn(64, 79)).values.shape[-1] < 60 else torch.randn(4, 1000)
    (values, _), externs = compiled(function, x)
    assert torch.equal(values, function(x).values)
    assert any("topk" in e for e in externs)
