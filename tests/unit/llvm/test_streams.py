"""What is read once from memory: in half vectors where a vector is a cache line, and asked for a little before on AMD's processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc import passes  # noqa: F401  (registers them)
from aicc.backends.llvm.layout import Layouts, kernel_lanes
from aicc.backends.llvm.target import make_target
from aicc.ir import Operation
from support.stages import capture, lowered
from torch import Tensor

F = torch.nn.functional
CACHES = (1 << 12, 1 << 14, 1 << 16)
WIDE = make_target("x86_64-unknown-linux-gnu", features=["avx512f", "avx2", "fma", "sse4a"], caches=CACHES)
NO_HINTS = make_target("x86_64-unknown-linux-gnu", features=["avx512f", "avx2", "fma"], caches=CACHES)
NARROW = make_target("x86_64-unknown-linux-gnu", features=["avx2", "fma", "sse4a"], caches=CACHES)


def kernels(function: Callable[..., Any], *inputs: Tensor, target: Any = WIDE) -> list[Operation]:
    return [op for op in lowered(capture(function, list(inputs)), target, "tile").body if op.name == "tile.kernel"]


def widths(kernel: Operation, target: Any = WIDE) -> list[int]:
    """Of the first chunk of each tile that is loaded."""
    layouts = Layouts(kernel, kernel_lanes(kernel, target))
    return [layouts.widths(op.result)[0] for op in kernel.walk() if op.name == "tile.load" and op["shape"]]


def asked(kernel: Operation) -> list[str]:
    return [str(op["offset"]) for op in kernel.walk() if op.name == "tile.prefetch" and op["once"]]


@pytest.mark.parametrize("function", [lambda x: x.sum(-1), lambda x: x.amax(-1), lambda x: x.mean(-1), lambda x: x.argmax(-1)])
def test_rows_read_once(function: Callable[..., Any]) -> None:
    (kernel, *_) = kernels(function, torch.randn(64, 1024))
    assert set(widths(kernel)) == {8}
    lines = asked(kernel)
    assert len(lines) >= 2 and lines == [f"i0*1024 + i1 + {64 + 16 * n}" for n in range(len(lines))]


@pytest.mark.parametrize("target,width,hints", [(NO_HINTS, 8, 0), (NARROW, 8, 2)])
def test_other_processors(target: Any, width: int, hints: int) -> None:
    (kernel,) = kernels(lambda x: x.sum(-1), torch.randn(64, 1024), target=target)
    assert set(widths(kernel, target)) == {width} and len(asked(kernel)) == hints


@pytest.mark.parametrize("function,inputs", [
    (lambda x: x.sum(-1), (torch.randn(8, 1024),)),                    # lies in the caches
    (lambda x: x.exp().sum(-1), (torch.randn(64, 1024),)),             # takes longer to compute than to read
    (lambda x: x.bfloat16().sum(-1), (torch.randn(8, 1024),)),
    (lambda x: x.sum(0), (torch.randn(256, 1024),)),                   # many rows side by side
])
def test_whole_vectors(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    for kernel in kernels(function, *inputs):
        assert set(widths(kernel)) <= {16} and asked(kernel) == []


def test_rows_far_apart() -> None:
    """The lines past the end of a short row are not what is read next."""
    (kernel, *_) = kernels(lambda x: x.sum((0, 2)), torch.randn(16, 8, 1024))
    assert asked(kernel) == [] and set(widths(kernel)) == {8}


def test_only_the_first_pass_over_a_row() -> None:
    """The second pass of a norm finds the row in the caches."""
    (kernel,) = kernels(lambda x: F.rms_norm(x, (256,)), torch.randn(512, 256), target=make_target(
        WIDE.triple, features=WIDE.features, caches=(1 << 15, 1 << 18, 1 << 16)))
    found = widths(kernel)
    assert 8 in found and 16 in found


@pytest.mark.parametrize("function", [lambda x: x.sum(-1), lambda x: x.sum(), lambda x: x.amax(-1), lambda x: x.mean((0, 2)), lambda x: x + 1])
def test_values(function: Callable[..., Any]) -> None:
    """More than any last cache counts for, in rows that end within a line."""
    x = torch.rand(4, 2050, 2051)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aicc", options={"strict": True})
    torch.testing.assert_close(compiled(x).double(), function(x.double()), rtol=1e-6, atol=1e-6)
