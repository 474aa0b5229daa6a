"""Products of bf16 operands: by a matrix unit, by pairs, or in f32, as the processor has it; all against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aicc.backends.llvm import host_target
from aicc.compiler.driver import Compilation, watching
from aicc.ir import Target
from support.stages import capture, lowered
from torch import nn
from torch.nn import functional as F

HOST = frozenset(host_target().features)
FORMS = {
    "matrices": (HOST, "tdpbf16ps", {"amx-bf16", "amx-tile"}),
    "pairs": (frozenset(f for f in HOST if not f.startswith("amx")), "avx512bf16.dpbf16ps", {"avx512bf16"}),
    "f32": (frozenset(f for f in HOST if not f.startswith("amx") and f != "avx512bf16"), "fmuladd", {"avx2"}),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[list[str], str]:
    features, instruction, needed = FORMS[request.param]
    if not needed <= HOST:
        pytest.skip(f"this processor has no {', '.join(sorted(needed))}")
    return sorted(features), instruction


def compiled(f: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...], form: tuple[list[str], str]) -> tuple[torch.Tensor, str]:
    """The result, and the code before optimisation."""
    torch._dynamo.reset()
    seen: list[Compilation] = []
    with torch.no_grad(), watching(compiled=seen.append):
        result = torch.compile(f, backend="aicc", options={"features": form[0]})(*args)
    return result, seen[0].llvm_ir


def close(result: torch.Tensor, truth: torch.Tensor) -> None:
    """One rounding of the result (half an ulp is 2**-9), and sums in f32."""
    torch.testing.assert_close(result.double(), truth, rtol=2**-8, atol=1e-4 * truth.abs().max().item())


@pytest.mark.product
@pytest.mark.parametrize("m,n,k", [(32, 32, 32), (48, 70, 96), (16, 40, 64), (64, 33, 4128), (480, 96, 2080)])
def test_linear(m: int, n: int, k: int, form: tuple[list[str], str]) -> None:
    torch.manual_seed(m)
    layer, x = nn.Linear(k, n).bfloat16(), torch.randn(m, k).bfloat16()
    result, code = compiled(lambda x: layer(x).relu(), (x,), form)
    assert form[1] in code
    close(result, (x.double() @ layer.weight.double().T + layer.bias.double()).relu())


@pytest.mark.parametrize("m,n,k", [(1, 1000, 334), (37, 100, 50), (7, 64, 1027)])
def test_ragged(m: int, n: int, k: int, form: tuple[list[str], str]) -> None:
    torch.manual_seed(m)
    x, w = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    result, _ = compiled(torch.mm, (x, w), form)
    close(result, x.double() @ w.double())


def test_a_matrix_unit_sums_longer_parts() -> None:
    """What it has summed is added in vectors, by way of memory: every 1024 steps of K, 32 at a time."""
    target = Target(name="sapphirerapids", features=("amx-bf16", "amx-tile", "avx512f"), vector_bits=512, vector_registers=32)
    module = lowered(capture(lambda x, w: x @ w.t(), (torch.randn(64, 2048).bfloat16(), torch.randn(64, 2048).bfloat16())), target, "tile")
    product = next(op for op in module.body if op.name == "tile.kernel" and any(inner.name == "tile.dot" for inner in op.walk()))
    assert 32 in [op["step"] for op in product.walk() if op.name == "tile.for" and op.results]


def test_batched_and_transposed(form: tuple[list[str], str]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 64, 96).bfloat16(), torch.randn(3, 80, 96).bfloat16()
    result, code = compiled(lambda x, y: x @ y.mT, (x, y), form)
    assert form[1] in code
    close(result, x.double() @ y.double().mT)


def test_convolution(form: tuple[list[str], str]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(32, 48, 3, padding=1).bfloat16(), torch.randn(2, 32, 8, 8).bfloat16()
    result, _ = compiled(layer, (x,), form)
    close(result, F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1))
