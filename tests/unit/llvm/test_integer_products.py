"""Products of 8-bit integers onto 32 bits, run in every form that this processor has, against exact sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aicc.backends.llvm import host_target
from aicc.compiler.driver import Compilation, watching
from torch import nn
from torch.nn import functional as F

HOST = frozenset(host_target().features)
VNNI = {"avx512vnni", "avxvnni", "avxvnniint8"}
FORMS = {
    "host": (HOST, "", set()),
    "words": (HOST - VNNI, "pmadd", {"avx2"}),
    "words of 128 bits": (frozenset(f for f in HOST if f in ("sse", "sse2", "fxsr", "mmx", "cx8", "cmov")), "sse2.pmadd", {"sse2"}),
}
Form = tuple[list[str], str]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    features, instruction, needed = FORMS[request.param]
    if not needed <= HOST:
        pytest.skip(f"this processor has no {', '.join(sorted(needed))}")
    return sorted(features), instruction


def compiled(f: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...], form: Form) -> tuple[torch.Tensor, str]:
    torch._dynamo.reset()
    seen: list[Compilation] = []
    with torch.no_grad(), watching(compiled=seen.append):
        result = torch.compile(f, backend="aicc", options={"features": form[0], "cache": False})(*args)
    return result, seen[0].llvm_ir


def integers(*shape: int) -> torch.Tensor:
    """With rows and columns of the extremes."""
    x = torch.randint(-128, 128, shape, dtype=torch.int8)
    x[0], x[-1], x[:, 0], x[:, -1] = -128, 127, -128, 127
    return x


class Quantised(nn.Module):
    """int8 activations and weights, with the scales that a quantised linear layer applies to the sums."""

    def __init__(self, k: int, n: int):
        super().__init__()
        self.register_parameter("weight", nn.Parameter(integers(n, k), requires_grad=False))
        self.register_parameter("scale", nn.Parameter(torch.rand(n), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return torch._int_mm(torch.round(x / step).to(torch.int8), self.weight.t()).to(torch.float32) * step * self.scale


@pytest.mark.product
@pytest.mark.parametrize("m,n,k", [(17, 16, 64), (32, 70, 96), (256, 96, 1028), (64, 33, 4128), (24, 40, 66), (18, 24, 33)])
def test_of_two_inputs(m: int, n: int, k: int, form: Form) -> None:
    """K of 66 has pairs and no groups of four; 33 has neither."""
    x, w = integers(m, k), integers(k, n)
    result, code = compiled(torch._int_mm, (x, w), form)
    assert torch.equal(result, (x.double() @ w.double()).int())
    assert k % 2 or form[1] in code


@pytest.mark.product
@pytest.mark.parametrize("m", [1, 5, 17, 40])
def test_of_a_parameter(m: int, form: Form) -> None:
    torch.manual_seed(m)
    layer, x = Quantised(132, 70), torch.randn(m, 132)
    result, code = compiled(lambda x: layer(x) if m > 16 else (torch.round(x).to(torch.int8).int() @ layer.weight.t().int()), (x,), form)
    assert form[1] in code
    if m > 16:
        torch.testing.assert_close(result, layer(x), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(result, (torch.round(x).double() @ layer.weight.t().double()).int())


@pytest.mark.product
@pytest.mark.parametrize("m", [1, 4, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_weights(m: int, dtype: torch.dtype, form: Form) -> None:
    """int8 weights of float activations: few rows read the packed weights as they are stored."""
    torch.manual_seed(m)
    layer, x = Quantised(128, 96), torch.randn(m, 128).to(dtype)
    result, code = compiled(lambda x: F.linear(x, layer.weight.to(x.dtype)) * layer.scale.to(x.dtype), (x,), form)
    truth = x.double() @ layer.weight.double().t() * layer.scale.to(dtype).double()
    torch.testing.assert_close(result.double(), truth, rtol=1e-4 if dtype is torch.float32 else 2**-6, atol=1e-4 * truth.abs().max().item())
    if m <= 4:
        assert "sext <8 x i8>" in code or "sext <4 x i8>" in code or "sext <16 x i8>" in code or "sitofp" in code


def test_wrapping_sums(form: Form) -> None:
    """Sums past 2^31 wrap around, as in eager: 2^18 times 2^14 is 0."""
    x, w = torch.full((16, 1 << 18), -128, dtype=torch.int8), torch.full((1 << 18, 16), -128, dtype=torch.int8)
    result, _ = compiled(torch._int_mm, (x, w), form)
    assert (result == 0).all()
