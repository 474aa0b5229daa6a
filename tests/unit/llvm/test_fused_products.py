"""What CPU products take into their kernel: what makes the rows of the left operand, and what follows the sums. Kernels are counted, results compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from torch import Tensor, nn
from torch.nn import functional as F

R = torch.randn


def run(f: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[Tensor, Compilation]:
    torch._dynamo.reset()
    seen: list[Compilation] = []
    with torch.no_grad(), watching(compiled=seen.append):
        result = torch.compile(f, backend="aicc", options={"cache": False})(*args)
    return result, seen[0]


def launches(c: Compilation) -> int:
    """Kernels of a call; packing is done once, by one more."""
    return c.stats["kernels"] - 1


def quantised(rows: int, k: int) -> Tensor:
    return torch.randint(-128, 128, (rows, k), dtype=torch.int8)


def rows_of(t: Tensor, i: Tensor) -> Tensor:
    return t[i]


# what makes the left operand -> function of the inputs, and the inputs, for m rows of k
PROLOGUES: dict[str, tuple[Callable[..., Tensor], Callable[[int, int], tuple[Tensor, ...]]]] = {
    "scale of a norm": (lambda x, r, g: x * r * g, lambda m, k: (R(m, k), R(m, 1), R(k))),
    "cast": (lambda x: x.float(), lambda m, k: (R(m, k).bfloat16(),)),
    "dequantise": (lambda q, s, z: (q.float() - z) * s, lambda m, k: (quantised(m, k), torch.rand(m, 1), R(m, 1))),
    "rows of a table": (rows_of, lambda m, k: (R(50, k), torch.randint(-50, 50, (m,)))),
    "embedding": (lambda t, i: F.embedding(i, t), lambda m, k: (R(50, k), torch.randint(0, 50, (m,)))),
    "residual": (lambda x, y: x + y, lambda m, k: (R(m, k), R(m, k))),
}
SHAPES = [(1, 64, 200), (130, 100, 96), (250, 72, 250), (16, 1600, 48)]


@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("m,k,n", SHAPES)
def test_prologue(name: str, m: int, k: int, n: int) -> None:
    """One launch, where few columns or rows make it pay."""
    torch.manual_seed(m)
    make, inputs = PROLOGUES[name]
    layer, args = nn.Linear(k, n), inputs(m, k)
    result, c = run(lambda *a: layer(make(*a)), args)
    assert launches(c) == 1
    torch.testing.assert_close(result, layer(make(*args)), rtol=1e-4, atol=1e-4 * result.abs().max().item())


def test_made_once_for_many_columns() -> None:
    """Where several programs would make the same rows, a kernel makes them once."""
    layer, x, y = nn.Linear(96, 1200), R(300, 96), R(300, 96)
    result, c = run(lambda x, y: layer(x + y), (x, y))
    assert launches(c) == 2
    torch.testing.assert_close(result, layer(x + y), rtol=1e-4, atol=1e-4)


def test_rows_of_a_table_are_checked() -> None:
    layer = nn.Linear(32, 48)
    with pytest.raises((RuntimeError, IndexError), match="out of range|out of bounds"):
        run(lambda t, i: layer(t[i]), (R(50, 32), torch.tensor([1, 50, 3])))


def test_batches_of_rows() -> None:
    """Rows in two dimensions, and a scale for each of the outer ones."""
    layer, x, s = nn.Linear(40, 64), R(3, 5, 40), R(3, 1, 1)
    result, c = run(lambda x, s: layer(x * s).relu(), (x, s))
    assert launches(c) == 1
    torch.testing.assert_close(result, layer(x * s).relu(), rtol=1e-4, atol=1e-5)


EPILOGUES: dict[str, Callable[..., Any]] = {
    "bias": lambda y, r: y,
    "activation": lambda y, r: F.gelu(y),
    "bias, activation, residual": lambda y, r: r + torch.tanh(y),
    "cast": lambda y, r: y.bfloat16(),
    "quantise": lambda y, r: torch.clamp(torch.round(y * 9), -128, 127).to(torch.int8),
    "gate": lambda y, r: F.silu(y) * r,
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("m,k,n", [(1, 64, 200), (130, 100, 96)])
def test_epilogue(name: str, m: int, k: int, n: int) -> None:
    torch.manual_seed(m)
    layer, x, r = nn.Linear(k, n), R(m, k), R(m, n)
    result, c = run(lambda x, r: EPILOGUES[name](layer(x), r), (x, r))
    assert launches(c) == 1
    expected = EPILOGUES[name](layer(x), r)
    tolerance = 1 if name == "quantise" else 1e-2 if name == "cast" else 1e-4
    torch.testing.assert_close(result.float(), expected.float(), rtol=1e-4 if name != "cast" else 1e-2, atol=tolerance)


def test_prologue_and_epilogue_at_once() -> None:
    layer, t, i, r = nn.Linear(64, 96), R(50, 64), torch.randint(0, 50, (33,)), R(33, 96)
    result, c = run(lambda t, i, r: r + F.relu(layer(t[i] * 2)), (t, i, r))
    assert launches(c) == 1
    torch.testing.assert_close(result, r + F.relu(layer(t[i] * 2)), rtol=1e-4, atol=1e-4)
