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


@pytest.mark.product
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


def _bytes_weight(n: int, k: int) -> tuple[Any, list[Tensor]]:
    return lambda q, s: q.float() * s, [quantised(n, k), torch.rand(n, 1)]


def _zero_points(n: int, k: int) -> tuple[Any, list[Tensor]]:
    return lambda q, z, s: (q.float() - z.float()) * s, [quantised(n, k), quantised(n, 1), torch.rand(n, 1)]


def _groups(n: int, k: int) -> tuple[Any, list[Tensor]]:
    return lambda q, s: (q.float() * s).reshape(n, k), [quantised(n, k).view(n, k // 32, 32), torch.rand(n, k // 32, 1)]


def _stacked_nibbles(n: int, k: int) -> tuple[Any, list[Tensor]]:
    def weight(q: Tensor, s: Tensor) -> Tensor:
        numbers = torch.stack([(q & 15).to(torch.int8) - 8, (q >> 4).to(torch.int8) - 8], -1).reshape(n, k // 32, 32)
        return (numbers.float() * s).reshape(n, k)
    return weight, [torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.rand(n, k // 32, 1)]


def _shifted_nibbles(n: int, k: int) -> tuple[Any, list[Tensor]]:
    def weight(q: Tensor, shifts: Tensor, s: Tensor) -> Tensor:
        return (((q[:, :, None] >> shifts) & 15).float().reshape(n, k) - 8) * s
    return weight, [torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.tensor([0, 4], dtype=torch.uint8), torch.rand(n, 1)]


# how a parameter is dequantised -> the function and its inputs; and bits that are kept for each element, scales included
WEIGHTS = {"bytes": (_bytes_weight, 8.5), "zero points": (_zero_points, 9), "groups": (_groups, 9.5), "nibbles, stacked": (_stacked_nibbles, 5.5),
           "nibbles, shifted": (_shifted_nibbles, 5)}


class Dequantised(nn.Module):
    def __init__(self, name: str, n: int, k: int):
        super().__init__()
        self.weight, tensors = WEIGHTS[name][0](n, k)
        self.stored = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(*self.stored)).relu()


@pytest.mark.product
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("m,n", [(1, 448), (1, 300), (4, 320)])
def test_few_rows_read_the_weight_as_it_is_stored(name: str, m: int, n: int) -> None:
    """Its bytes are packed and kept, and dequantised in the product's kernel."""
    torch.manual_seed(m)
    k = 256
    model, x = Dequantised(name, n, k), R(m, k)
    result, c = run(model, (x,))
    assert c.stats["launches"] == 1 and c.graph is not None
    assert c.graph.memory["persistent"] <= (n + 40) * k * WEIGHTS[name][1] / 8
    torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-4 * result.abs().max().item())


def test_more_rows_keep_it_dequantised() -> None:
    model, x = Dequantised("bytes", 320, 256), R(40, 256)
    result, c = run(model, (x,))
    assert c.graph is not None and c.graph.memory["persistent"] == 320 * 256 * 4
    torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-4 * result.abs().max().item())


def test_a_weight_that_is_written_to_is_packed_again() -> None:
    model, x = Dequantised("groups", 96, 64), R(2, 64)
    compiled = torch.compile(model, backend="aicc", options={"cache": False})
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-2)
            model.stored[0].copy_(quantised(96, 64).view(96, 2, 32))
            model.stored[1].mul_(3)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-2)


EPILOGUES: dict[str, Callable[..., Any]] = {
    "bias": lambda y, r: y,
    "activation": lambda y, r: F.gelu(y),
    "bias, activation, residual": lambda y, r: r + torch.tanh(y),
    "cast": lambda y, r: y.bfloat16(),
    "quantise": lambda y, r: torch.clamp(torch.round(y * 9), -128, 127).to(torch.int8),
    "gate": lambda y, r: F.silu(y) * r,
}


@pytest.mark.product
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


TURNED = [(250, 100, 130), (96, 64, 64), (240, 513, 300), (7, 200, 128), (66, 1600, 70)]


@pytest.mark.product
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m,k,n", TURNED)
def test_turned_left_operand(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    """Rows side by side in memory, as in the gradient of a weight: right whatever the remainders, plain and in a batch."""
    torch.manual_seed(k)
    for a, b in ((R(k, m), R(k, n)), (R(3, k, m), R(3, k, n))):
        a, b = a.to(dtype), b.to(dtype)
        result, _ = run(lambda a, b: a.mT @ b + 1, (a, b))
        wide = a.double().mT @ b.double() + 1
        limit = {torch.float32: 1e-6, torch.float64: 1e-15, torch.bfloat16: 8e-3}[dtype] * wide.abs().max().item() * (k / 16) ** 0.5
        assert (result.double() - wide).abs().max().item() <= limit


def test_turned_left_operand_is_copied_by_its_program() -> None:
    """The tiles then read six rows of each step from one piece, not from a line and page of each step; where little is read it is not worth it."""
    for (m, k, n), copied in (((240, 512, 256), True), ((240, 512, 16), False), ((240, 32, 256), False)):
        kernels: list[str] = []

        def observe(stage: str, p: Any, module: Any, kernels: list[str] = kernels) -> None:
            if stage == "tile" and p is None:
                kernels.append(str(module))
        torch._dynamo.reset()
        with torch.no_grad(), watching(observe=observe):
            torch.compile(lambda a, b: a.t() @ b, backend="aicc", options={"cache": False})(R(k, m), R(k, n))
        assert ("tile.alloca" in kernels[-1]) == copied, (m, k, n)
