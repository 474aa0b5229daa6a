"""What a program writes to its arguments on a GPU is written in place: no copies behind small kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from aicc.ir import Operation
from torch import Tensor

from gpu.cases import capture


def steps(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[str], Operation]:
    """The launches and copies of the program, and its module."""
    seen: list[Operation] = []

    def run(module: Operation, graph: torch.fx.GraphModule, args: list[Any]) -> Any:
        seen.append(module)
        return graph(*args)
    capture(function, inputs, run, until="host")
    func = next(op for op in seen[0].body if op.name == "func")
    return [op.name for op in func.body if op.name in ("host.launch", "host.copy")], seen[0]


def optimizer(count: Tensor, p: Tensor, g: Tensor, m: Tensor) -> None:
    """A step of one parameter."""
    count.add_(1)
    m.lerp_(g, 0.1)
    p.addcdiv_(m, 1 - 0.9**count + m.abs(), value=-0.1)


def test_the_step_of_an_optimizer_is_counted_in_place() -> None:
    """In a kernel of its own: all threads of the other read the number."""
    names, _ = steps(optimizer, [torch.tensor(3.0), *(torch.randn(1024) for _ in range(3))])
    assert names == ["host.launch", "host.launch"]


def norm(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """A batch norm's in training."""
    return torch.nn.functional.batch_norm(x, mean, deviation, training=True)


@pytest.mark.parametrize("shape", [(64, 16, 8, 8), (64, 16, 56, 56)])
def test_running_statistics_are_written_in_place(shape: tuple[int, ...]) -> None:
    names, _ = steps(norm, [torch.randn(shape).to(memory_format=torch.channels_last), torch.randn(16), torch.rand(16)])
    assert "host.copy" not in names


def also_read(x: Tensor, mean: Tensor) -> Tensor:
    new = x.mean(0) * 0.1 + mean * 0.9
    out = x - mean  # the old one, in a later loop
    mean.copy_(new)
    return out


def test_what_a_later_loop_reads_is_not_overwritten() -> None:
    _, module = steps(also_read, [torch.randn(64, 16), torch.randn(16)])
    for kernel in [op for op in module.body if op.name == "tile.kernel"]:
        for given, _ in kernel["inplace"]:
            assert sum(op.name == "tile.load" and op.operands[0] is kernel.body.args[given] for op in kernel.walk()) == 1
