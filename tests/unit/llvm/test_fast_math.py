"""`fast_math`: within its stated errors, another code than the default, and NaN and infinities as documented (docs/fast-math.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from aicc import passes  # noqa: F401  (registers them)
from aicc.backends.llvm.vecmath_fast import FAST, FAST_MAX_ULP
from aicc.backends.triton.printer import print_kernel
from aicc.benchmarks.elementwise import REFERENCES, compile_elementwise
from aicc.benchmarks.ulp_fast import fast_error
from aicc.compiler.driver import Compilation, watching
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from support.stages import CUDA

ROOT = Path(__file__).parents[3]
F = torch.nn.functional


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=generator).to(torch.int32).view(torch.float32)
    spread = torch.exp2(torch.linspace(-12, 7, 1 << 16, dtype=torch.float64)).float()
    return torch.cat([bits, spread, -spread, torch.linspace(-90, 90, 1 << 16)])


@pytest.mark.parametrize("name", sorted(FAST))
def test_bound(name: str) -> None:
    error, at, nan = fast_error(name, inputs())
    assert error <= FAST_MAX_ULP[name], (error, at)
    assert nan == 0


@pytest.mark.parametrize("name", sorted(FAST))
def test_special_values(name: str) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e30, -1e30, 89.0, -104.0, -90.0, 2.0**-149, 2.0**-149, -1.0, 1.0, 0.5])
    got, exact = compile_elementwise(name, fast=True)(x), REFERENCES[name](x.double()).float()
    for value, found, wanted in zip(x.tolist(), got.tolist(), exact.tolist(), strict=True):
        if name == "log" and value == 2.0**-149:
            wanted = -math.inf
        if 0 < abs(wanted) < 2.0**-126 and name in ("exp", "exp2", "sigmoid"):
            wanted = 0.0
        same = math.isclose(found, wanted, rel_tol=1e-6) and math.copysign(1, found) == math.copysign(1, wanted)
        assert same or (math.isnan(found) and math.isnan(wanted)), (value, found, wanted)


@pytest.mark.parametrize("function,most", [
    (F.gelu, 2.5e-6), (lambda x: F.gelu(x, approximate="tanh"), 2.5e-6), (lambda x: x.softmax(-1), 1e-6), (torch.sigmoid, 1e-6), (lambda x: x.abs().log(), 2e-6)])
def test_option_changes_the_code(function, most: float) -> None:  # type: ignore[no-untyped-def]
    """Fewer instructions, other bits, nearly the same values."""
    x = torch.randn(64, 1024) * 3
    found: list[Compilation] = []
    results = []
    for fast in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aicc", options={"strict": True, "cache": False, "fast_math": fast})
        with watching(compiled=found.append):
            results.append(compiled(x))
    assert not torch.equal(*results)
    assert found[1].llvm_ir.count("\n") < found[0].llvm_ir.count("\n")
    torch.testing.assert_close(results[1], function(x.double()).float(), rtol=most, atol=most)


def gpu_text(**options: bool) -> str:
    module = parse_module("""module {level = "graph"} { func @main { ^(%x: tensor<4096x64xf32>):
  %y = graph.exp(%x) : tensor<4096x64xf32>
  return(%y)
} }""")
    for stage in ("graph", "tensor", "tile"):
        run_pipeline(module, parse_pipeline(pipeline(stage, CUDA, Options(**options))), PassContext(CUDA))
    return print_kernel(next(op for op in module.body if op.name == "tile.kernel")).text


def test_option_changes_gpu_code() -> None:
    assert "exp_approx(" in gpu_text(fast_math=True) and "exp_approx(" not in gpu_text()


def test_page_has_what_was_measured() -> None:
    rows = json.loads((ROOT / "docs" / "fast-math.json").read_text())
    page = (ROOT / "docs" / "fast-math.md").read_text()
    assert sorted(r["name"] for r in rows) == sorted(FAST)
    for r in rows:
        assert f"| `{r['name']}` | {r['inputs']:,} | {r['worst']:.2f} |" in page
        assert r["worst"] <= FAST_MAX_ULP[r["name"]] == r["bound"] and r["nan"] == 0
