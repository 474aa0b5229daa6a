"""The next program's rows are asked for in the later passes over a row, and chains of math on several vectors are woven into each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc import passes  # noqa: F401  (registers them)
from aicc.compiler.driver import Compilation, watching
from aicc.ir import Operation
from torch import Tensor

F = torch.nn.functional


def kernels(function: Callable[..., Any], *args: Tensor) -> tuple[list[Operation], str]:
    """The kernels of a function (compared with eager), and its LLVM IR."""
    found: list[Operation] = []
    made: list[Compilation] = []

    def observe(stage: str, p: Any, module: Operation) -> None:
        if stage == "tile" and p is None:
            found[:] = [op.clone() for op in module.body if op.name == "tile.kernel"]
    torch._dynamo.reset()
    with watching(observe, made.append), torch.no_grad():
        compiled = torch.compile(function, backend="aicc", options={"strict": True, "cache": False})
        torch.testing.assert_close(compiled(*args), function(*args))
    return found, made[0].llvm_ir


def asked(kernel: Operation) -> list[tuple[int, int, str]]:
    """(number of the program's loop, buffer, offset) of each prefetch."""
    loops = [op for op in kernel.body if op.name == "tile.for"]
    return [(n, op.operands[0].index, str(op["offset"])) for n, loop in enumerate(loops)  # type: ignore[attr-defined]
            for op in loop.walk() if op.name == "tile.prefetch"]


def test_layer_norm_asks_for_its_next_row() -> None:
    """Every line of each step of the last of its three passes; its weights, the same for each row, are not asked for."""
    (kernel,), code = kernels(lambda x, w, b: F.layer_norm(x, (1024,), w, b), torch.randn(8, 1024), torch.randn(1024), torch.randn(1024))
    lines = asked(kernel)
    assert lines == [(2, 0, f"i0*1024 + i1 + {1024 + 16 * n}") for n in range(len(lines))] and len(lines) >= 2
    assert code.count("call void @\"llvm.prefetch") == len(lines)


def test_softmax_asks_where_it_reads_last() -> None:
    """The third pass reads what the second one kept, so that the second asks."""
    (kernel,), _ = kernels(lambda x: x.softmax(-1), torch.randn(8, 1024))
    assert {(n, buffer) for n, buffer, _ in asked(kernel)} == {(1, 0)}


@pytest.mark.parametrize("function,shape", [
    (lambda x: x.sum(-1), (8, 4096)),                 # one pass: memory is never idle
    (lambda x: x.softmax(-1), (64, 32)),              # a row is one step: nothing is passed over again
    (lambda x: x.softmax(-1), (2, 1 << 20)),          # a row that outgrows the caches
    (lambda x: x.softmax(0), (1024, 64)),             # columns
    (lambda x: x.relu() + 1, (64, 4096)),
])
def test_where_nobody_asks(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    found, _ = kernels(function, torch.rand(shape))  # all of one sign: a sum near zero would be compared by what rounding leaves of it
    assert found and all(asked(k) == [] for k in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 1001), (3, 4, 333), (2, 7, 2048)])
def test_rows_of_any_length(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Where rows end within a step, and within a line."""
    x = torch.randn(shape).to(dtype)
    found, _ = kernels(lambda x: (x.softmax(-1), F.rms_norm(x, x.shape[-1:]), x.var(-1)), x)
    assert any(asked(k) for k in found)


def test_chains_side_by_side() -> None:
    """Math on four vectors at a time gives bit for bit what it gives on one, or on the odd ones at the end."""
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.exp(), x.tanh(), x.erf(), x.sigmoid(), x.log1p(), x.abs().log()
    x = torch.randn(4096) * 20
    torch._dynamo.reset()
    made: list[Compilation] = []
    with watching(compiled=made.append), torch.no_grad():
        compiled = torch.compile(function, backend="aicc", dynamic=False, options={"strict": True, "cache": False})
        whole = [y.clone() for y in compiled(x)]
        for n in (1, 3, 8, 16, 24, 40, 100):
            for y, part in zip(whole, compiled(x[:n].clone()), strict=True):
                torch.testing.assert_close(part, y[:n], rtol=0, atol=0, equal_nan=True)
    widths = {int(n) for n in re.findall(r"call <(\d+) x float> @.?llvm\.fma", made[0].llvm_ir)}
    assert max(widths) >= 16, widths
