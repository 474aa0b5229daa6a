"""Products whose right operand is the larger and no parameter: it is read as it lies, and tiles of the transpose are turned (`passes/pack.py`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aicc.backends.llvm import host_target
from aicc.ir import Operation, Target
from support.stages import AVX2, AVX512, capture, check_levels, lowered
from torch.nn import functional as F

Function = Callable[..., torch.Tensor]


def _inputs(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(m + n + k)
    return torch.randn(m, k), torch.randn(n, k), torch.randn(n)


def _is_exchanged(f: Function, args: tuple[torch.Tensor, ...], target: Target = AVX512) -> bool:
    module: Operation = lowered(capture(f, args), target, "tile")
    return any(op.name == "tile.transpose" for op in module.walk())


def _activated(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w, b)) + x[:, :1]


@pytest.mark.parametrize("m,n,k", [(16, 32, 24), (31, 100, 40), (64, 150, 1700), (16, 530, 300)])
def test_levels(m: int, n: int, k: int) -> None:
    program = capture(_activated, _inputs(m, n, k))
    assert any(op.name == "tile.transpose" for op in lowered(program, AVX512, "tile").walk())
    check_levels(program, AVX512)


@pytest.mark.product
@pytest.mark.parametrize("m,n,k", [(16, 32, 24), (31, 100, 40), (48, 515, 1700), (256, 600, 768)])
def test_compiled(m: int, n: int, k: int) -> None:
    if host_target().vector_bits < 512:
        pytest.skip("this processor has no vectors of 16 elements")
    torch._dynamo.reset()
    args = _inputs(m, n, k)
    result, exact = torch.compile(_activated, backend="aicc")(*args), _activated(*(x.double() for x in args))
    distance, eager = ((x.double() - exact).abs().max().item() for x in (result, _activated(*args)))
    assert distance <= 2 * eager + 1e-6


def test_two_with_one_larger_operand() -> None:
    """Each is a kernel of its own."""
    def gated(x: torch.Tensor, other: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.silu(F.linear(x, w)) * F.linear(other, w)

    x, w, _ = _inputs(16, 100, 40)
    program = capture(gated, (x, x.flip(0), w))
    assert sum(op.name == "tile.transpose" for op in lowered(program, AVX512, "tile").walk()) == 2
    check_levels(program, AVX512)


@pytest.mark.parametrize("what,f,args", [
    ("few rows", _activated, _inputs(8, 64, 40)),
    ("idle lanes", _activated, _inputs(17, 64, 40)),
    ("as large a left operand", _activated, _inputs(64, 64, 40)),
    ("rows in two sets of the first-level cache", _activated, _inputs(16, 64, 512)),
    ("a reduction behind it", lambda x, w, b: F.linear(x, w, b).relu().softmax(-1), _inputs(16, 64, 40)),
    ("columns that lie side by side", lambda x, w, b: x @ w.reshape(40, 64) + b, _inputs(16, 64, 40)),
])
def test_not_exchanged(what: str, f: Function, args: tuple[torch.Tensor, ...]) -> None:
    assert not _is_exchanged(f, args), what


def test_needs_wide_vectors() -> None:
    assert _is_exchanged(_activated, _inputs(16, 64, 40))
    assert not _is_exchanged(_activated, _inputs(16, 64, 40), AVX2)
