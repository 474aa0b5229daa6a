"""Operators on lists of tensors: each as the plain operator on every tensor, and whole optimizer steps without a call into ATen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.compiler import driver
from aicc.compiler.dynamo import aicc as backend
from aicc.frontend.foreach import foreach_table
from support.stages import CUDA, lowered, shaped
from torch import Tensor, nn

TABLE = foreach_table()


def _value(op: Any, argument: Any) -> Any:
    kind = str(argument.type)
    if kind == "List[Tensor]":
        return [torch.rand(3, 4) + 0.3, torch.rand(5) + 0.3]
    if kind in ("List[Scalar]", "List[number]"):
        return [0.5, 1.5]
    return torch.tensor(0.7) if kind == "Tensor" else 0.7


@pytest.mark.parametrize("op", TABLE, ids=str)
def test_as_eager(op: Any) -> None:
    torch.manual_seed(0)
    arguments = [a for a in op._schema.arguments if not a.kwarg_only and not (op is torch.ops.aten._foreach_norm.Scalar and a.name != "self")]
    given = [_value(op, a) for a in arguments]
    got, expected = TABLE[op](*given), op(*copy.deepcopy(given))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_alpha_is_for_all() -> None:
    x, y = [torch.ones(2), torch.ones(3)], [torch.full((2,), 3.0), torch.full((3,), 4.0)]
    got = TABLE[torch.ops.aten._foreach_add.List](x, y, alpha=2)
    assert [t[0].item() for t in got] == [7.0, 9.0]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, maximize=True, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, foreach=True),
}


@pytest.mark.parametrize("name", [n if n == "adamw" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS])
def test_optimizer_steps(name: str) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s)) for s in ((6, 5), (7,))]
    theirs = copy.deepcopy(ours)
    mine, eager = OPTIMIZERS[name](ours), OPTIMIZERS[name](theirs)
    graphs: list[Any] = []
    torch._dynamo.reset()
    with driver.watching(compiled=graphs.append):
        step = torch.compile(mine.step, backend=backend)
        for _ in range(3):
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            step()
            eager.step()
    assert graphs and not any(g.stats["externs"] for g in graphs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_of_adamw_is_native() -> None:
    """Dynamo writes `addcmul_` and `addcdiv_` as a fused multiply-add: nothing is left to ATen, and a parameter's update is one kernel."""
    torch.manual_seed(0)
    expected, found = (torch.nn.Linear(40, 30) for _ in range(2))
    found.load_state_dict(expected.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (expected, found)]
    seen: list[driver.Compilation] = []
    with driver.watching(compiled=seen.append):
        update = torch.compile(optimizers[1].step, backend="aicc")
        for _ in range(3):
            for a, b in zip(expected.parameters(), found.parameters(), strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            optimizers[0].step()
            update()
    assert seen and not any(c.stats["externs"] for c in seen)
    for a, b in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_steps_of_many_parameters_are_one_kernel_each() -> None:
    """Means, squares and parameters come as lists, so that what belongs together is hundreds of ops apart."""
    count = 80

    def step(*given: Tensor) -> list[Tensor]:
        p, g, m, v = (given[k * count:(k + 1) * count] for k in range(4))
        m = [a * 0.9 + b * 0.1 for a, b in zip(m, g, strict=True)]
        v = [a * 0.99 + b * b * 0.01 for a, b in zip(v, g, strict=True)]
        return [*m, *v, *(a - 0.1 * b / (c.sqrt() + 1e-8) for a, b, c in zip(p, m, v, strict=True))]

    program = shaped(step, *[(40 + k % count,) for k in range(4 * count)])
    kernels = [op for op in lowered(program, CUDA, "tensor").walk() if op.name == "tensor.fused"]
    assert len(kernels) == count
