"""Reductions of a product's result in the product's kernel: no pass over the result, which is not stored where nothing else reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from aicc.ir import Operation
from torch import Tensor, nn
from torch.nn import functional as F

R = torch.randn


class Seen:
    """What a compilation made: the module after fusion, and the statistics."""

    def __init__(self) -> None:
        self.compilation: Compilation | None = None
        self.fused: list[Operation] = []

    def __call__(self, stage: str, after: Any, module: Operation) -> None:
        if stage == "tensor" and after is None:
            self.fused = [op for op in module.walk() if op.name == "tensor.fused"]

    @property
    def stored(self) -> int:
        """Elements of the largest result of a product's kernel."""
        made = [op for op in self.fused if "matmul" in op["kernel"]]
        return max(r.type.numel for op in made for r in op.results)  # type: ignore[attr-defined]


def run(f: Callable[..., Any], *args: Tensor, **options: Any) -> tuple[Any, Seen]:
    torch._dynamo.reset()
    seen = Seen()
    with torch.no_grad(), watching(observe=seen, compiled=lambda c: setattr(seen, "compilation", c)):
        result = torch.compile(f, backend="aicc", options={"cache": False, **options})(*args)
    return result, seen


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum of columns": lambda y: y.sum(-1),
    "sum of gelu": lambda y: F.gelu(y).sum(-1),
    "maximum": lambda y: y.amax(-1),
    "minimum and sum": lambda y: y.amin(-1) * y.exp().sum(-1),
    "log-sum-exp": lambda y: torch.logsumexp(y, -1),
    "mean of squares": lambda y: y.square().mean(-1, keepdim=True).rsqrt(),
    "sum of rows": lambda y: y.relu().sum(0),
    "maximum of rows": lambda y: y.amax(0),
    "log-sum-exp of rows": lambda y: torch.logsumexp(y, 0),
    "rows and columns": lambda y: y.sum(0).sum() + y.abs().sum(-1),
}
SHAPES = [(1, 64, 40000), (130, 100, 300), (40, 1600, 1300)]


@pytest.mark.product
@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("m,k,n", SHAPES)
def test_nothing_but_parts_is_stored(name: str, m: int, k: int, n: int) -> None:
    torch.manual_seed(m)
    layer, x, f = nn.Linear(k, n), R(m, k), REDUCTIONS[name]
    result, seen = run(lambda x: f(layer(x)), x)
    expected = f(layer(x).double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))
    if m > 1:
        assert seen.stored < m * n // 4


def test_cross_entropy_by_reductions() -> None:
    """The log-sum-exp, and the target's logit as a sum of one term: no logits in memory."""
    layer, x, target = nn.Linear(64, 2000), R(100, 64), torch.randint(0, 2000, (100,))

    def loss(x: Tensor, target: Tensor) -> Tensor:
        logits = layer(x)
        chosen = torch.where(torch.arange(2000) == target[:, None], logits, 0).sum(-1)
        return (torch.logsumexp(logits, -1) - chosen).mean()

    result, seen = run(loss, x, target)
    torch.testing.assert_close(result, F.cross_entropy(layer(x), target))
    assert seen.stored <= 100 * (2000 // 200)


def test_the_result_may_be_stored_too() -> None:
    layer, x = nn.Linear(64, 1000), R(100, 64)
    (y, top), seen = run(lambda x: (y := layer(x).relu(), y.amax(-1)), x)
    torch.testing.assert_close(y, layer(x).relu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top, y.amax(-1), rtol=0, atol=0)
    assert len(seen.fused) == 3  # packing, the product with partial maxima, their merging


def test_softmax_keeps_a_kernel_of_rows() -> None:
    """It reads the result again: a row's statistics are computed from the cache then."""
    layer, x = nn.Linear(64, 1000), R(100, 64)
    result, seen = run(lambda x: layer(x).softmax(-1), x)
    torch.testing.assert_close(result, layer(x).softmax(-1), rtol=1e-5, atol=1e-6)
    assert len(seen.fused) == 3 and seen.stored == 100 * 1000


@pytest.mark.parametrize("masked", ["a part", "a row", "all"])
def test_infinite_terms(masked: str) -> None:
    """-inf in whole parts, rows of nothing but -inf, and what logsumexp makes of them in eager."""
    layer, x, bias = nn.Linear(64, 1000), R(60, 64), torch.zeros(60, 1000)
    if masked == "a part":
        bias[:, :500] = float("-inf")
    elif masked == "a row":
        bias[7] = float("-inf")
    else:
        bias[:] = float("-inf")
    bias = bias - 2000  # exp of less than the smallest number: the merging must not multiply 0 by an overflow
    result, _ = run(lambda x, b: torch.logsumexp(layer(x) + b, -1), x, bias)
    torch.testing.assert_close(result, torch.logsumexp(layer(x) + bias, -1), rtol=1e-5, atol=1e-3)


def test_batches_and_sizes_as_symbols() -> None:
    layer = nn.Linear(64, 700)
    f = torch.compile(lambda x: torch.logsumexp(layer(x), -1), backend="aicc", options={"cache": False}, dynamic=True)
    with torch.no_grad():
        for shape in ((3, 50, 64), (5, 17, 64), (1, 200, 64)):
            x = R(*shape)
            torch.testing.assert_close(f(x), torch.logsumexp(layer(x), -1), rtol=1e-5, atol=1e-5)


def test_products_of_batches() -> None:
    a, b = R(3, 150, 64), R(3, 64, 260)
    result, seen = run(lambda a, b: (a @ b).amax(-1) + (a @ b).sum(-1), a, b)
    torch.testing.assert_close(result, (a @ b).amax(-1) + (a @ b).sum(-1), rtol=1e-4, atol=1e-4)
    assert seen.stored <= 3 * 150 * 2


def test_bias_gradient() -> None:
    """The gradient of a hidden layer's bias is summed where its terms are made."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 100))
    x = R(300, 64)
    torch._dynamo.reset()
    torch.compile(model, backend="aicc", options={"cache": False})(x).square().mean().backward()
    got = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    model(x).square().mean().backward()
    for p, g in zip(model.parameters(), got, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)
