"""The bound on what is kept between the passes holds, gradients stay right, and what cannot be reached is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.activations import kept_bytes
from aicc.compiler.dynamo import aot_backend
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func

ROWS, WIDTH, LAYERS = 64, 32, 6


def model_rows(x: Tensor, *weights: Tensor) -> Tensor:
    for w in weights:
        x = x + F.gelu(x @ w) * torch.sin(x)
    return x.square()


def model(x: Tensor, *weights: Tensor) -> Tensor:
    return model_rows(x, *weights).sum()


def dropping(x: Tensor, *weights: Tensor) -> Tensor:
    """The seed of its mask has to be kept."""
    return F.dropout(model_rows(x, *weights), 0.5).sum()


def given() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, WIDTH, generator=g).requires_grad_(), *(0.2 * torch.randn(WIDTH, WIDTH, generator=g) for _ in range(LAYERS))]


def run(budget: int, f: Any = model) -> tuple[int, list[Tensor]]:
    kept: list[int] = []

    def compiler(role: str) -> Any:
        def compile_one(gm: torch.fx.GraphModule, _: Any) -> Any:
            if role == "forward":
                kept.append(kept_bytes(gm, 1))
            return make_boxed_func(gm.forward)
        return compile_one

    leaves = [t.detach().requires_grad_() for t in given()]
    torch._dynamo.reset()
    torch.compile(f, backend=aot_backend(compiler, activation_bytes=budget), dynamic=False)(*leaves).backward()
    return kept[0], [t.grad for t in leaves]  # type: ignore[misc]


def test_the_bound_holds_and_gradients_stay() -> None:
    free, true = run(0)
    assert free >= 2 * LAYERS * ROWS * WIDTH * 4 - ROWS * WIDTH * 8
    for budget in (free * 3 // 4, free // 2):
        kept, got = run(budget)
        assert free // 4 <= kept <= budget
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.warns(RuntimeWarning, match="activation_bytes=1 is exceeded"):
        run(1, dropping)


@pytest.mark.parametrize("budget", [1 << 40])
def test_a_large_budget_changes_nothing(budget: int) -> None:
    assert run(budget)[0] == run(0)[0]
