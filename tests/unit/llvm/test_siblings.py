"""Products of one input on CPUs: gate and up in one kernel, query, key and value as one product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from support.stages import AVX2, capture, lowered
from torch import nn
from torch.nn import functional as F


def compiled(f: Callable[..., torch.Tensor], *args: torch.Tensor) -> tuple[torch.Tensor, Compilation]:
    torch._dynamo.reset()
    seen: list[Compilation] = []
    with torch.no_grad(), watching(compiled=seen.append):
        result = torch.compile(f, backend="aicc", options={"cache": False})(*args)
    return result, seen[0]


def merged(c: Compilation) -> str:
    return [r.message for r in c.remarks if r.pass_name == "merge-products"][-1]


def close(f: nn.Module, x: torch.Tensor, result: torch.Tensor) -> None:
    with torch.no_grad():
        truth, expected = f.double()(x.double()), f.float()(x)
    error = (expected.double() - truth).abs().max()
    assert (result.double() - truth).abs().max() <= 3 * error + 1e-6 * truth.abs().max()


class Gated(nn.Module):
    def __init__(self, k: int, n: int, bias: bool):
        super().__init__()
        self.gate, self.up = nn.Linear(k, n, bias), nn.Linear(k, n, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.gate(x)) * self.up(x)


@pytest.mark.parametrize("m,n,k,bias", [(1, 96, 64, False), (5, 100, 33, True), (130, 70, 64, False), (12, 48, 3000, False), (300, 40, 1700, True)])
def test_gate_and_up_are_one_kernel(m: int, n: int, k: int, bias: bool) -> None:
    """K of 3000 is summed in blocks, each product's in memory of its own."""
    torch.manual_seed(m)
    f, x = Gated(k, n, bias), torch.randn(m, k)
    result, c = compiled(f, x)
    assert c.llvm_ir.count("define internal void @\"kernel.matmul") == 1
    close(f, x, result)


def test_the_work_of_both_counts() -> None:
    def gated_unit(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ gate) * (x @ up)
    module = lowered(capture(gated_unit, (torch.randn(40, 64), torch.randn(64, 96), torch.randn(64, 96))), AVX2, "tile")
    gated = [op for op in module.body if op.name == "tile.kernel" and sum(inner.name == "tile.dot" for inner in op.walk()) > 1]
    assert [op["flops"] for op in gated] == [2 * 2 * 40 * 96 * 64]


class Attention(nn.Module):
    """Grouped keys and values, with rotated queries and keys."""

    def __init__(self, width: int, heads: int, groups: int, bias: bool, rotary: bool):
        super().__init__()
        self.heads, self.head, self.rotary = heads, width // heads, rotary
        self.q, self.k, self.v = (nn.Linear(width, n * self.head, bias) for n in (heads, groups, groups))
        self.out = nn.Linear(width, width, bias)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rotary:
            return x
        a, b = x.chunk(2, -1)
        at = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 7
        return x * at.cos() + torch.cat([-b, a], -1) * at.sin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, -1, self.head).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(self.heads // y.shape[1], 1) for y in (self._turned(k), v))
        return self.out(F.scaled_dot_product_attention(self._turned(q), k, v).transpose(1, 2).reshape(b, t, d))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("length", [1, 9, 70])
def test_query_key_and_value_are_one_product(bias: bool, rotary: bool, length: int) -> None:
    torch.manual_seed(length)
    f, x = Attention(96, 4, 2, bias, rotary), torch.randn(2, length, 96)
    result, c = compiled(f, x)
    assert merged(c) == "3 products merged into fewer"
    close(f, x, result)


def test_what_stays_apart() -> None:
    """A result that is returned, one with an activation of its own, and a product of another input."""
    torch.manual_seed(0)
    a, b, other = nn.Linear(32, 24), nn.Linear(32, 40), nn.Linear(32, 24)
    x, y = torch.randn(6, 32), torch.randn(6, 32)
    for f in (lambda: (a(x), b(x)), lambda: (F.gelu(a(x)).sum(), F.relu(b(x)).sum()), lambda: (a(x).mT @ b(y), other(y).tanh())):
        result, c = compiled(f)
        assert merged(c) == "0 products merged into fewer"
        torch.testing.assert_close(result, f(), rtol=1e-4, atol=1e-5)


def test_changed_parameters_are_joined_anew() -> None:
    f, x = Attention(96, 4, 2, True, False), torch.randn(1, 9, 96)
    torch._dynamo.reset()
    with torch.no_grad():
        g = torch.compile(f, backend="aicc")
        g(x)
        f.k.weight.mul_(3)
        f.v.bias.add_(1)
        torch.testing.assert_close(g(x), f(x), rtol=1e-4, atol=1e-5)
