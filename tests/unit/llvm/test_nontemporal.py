"""Stores past the caches: in the code of what exceeds them and nowhere else, and right wherever rows begin."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc import passes  # noqa: F401  (registers them)
from aicc.backends.llvm import compile_module
from aicc.backends.llvm import nontemporal as stores
from aicc.backends.llvm.target import make_target
from aicc.compiler.driver import Compilation, watching
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.passes import nontemporal
from torch import Tensor

F = torch.nn.functional
SSE = ["cx8", "cmov", "mmx", "fxsr", "sse", "sse2", "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"]
AVX2 = [*SSE, "avx", "avx2", "fma", "f16c", "bmi", "bmi2"]
CACHES = (32 << 10, 1 << 20, 32 << 20)
TARGETS = {
    "avx2": make_target("x86_64-unknown-linux-gnu", "haswell", AVX2, CACHES),
    "avx512": make_target("x86_64-unknown-linux-gnu", "skylake-avx512", [*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"], CACHES),
    "neon": make_target("aarch64-unknown-linux-gnu", "generic", ["neon", "fp-armv8"], CACHES),
}
ADD = """module {{level = "graph"}} {{ func @main {{symbols = {{s0 = [2, none]}}}} {{ ^(%x: tensor<{n}xf32>, %y: tensor<{n}xf32>):
  %z = graph.add(%x, %y) : tensor<{n}xf32>
  return(%z)
}} }}"""


def assembly(name: str, n: int | str, **options: Any) -> str:
    module = parse_module(ADD.format(n=n))
    for stage in ("graph", "tensor", "tile", "host"):
        run_pipeline(module, parse_pipeline(pipeline(stage, TARGETS[name], Options(**options))), PassContext(TARGETS[name]))
    return compile_module(module, TARGETS[name]).asm


@pytest.mark.parametrize("name,streamed,store,fence", [
    ("avx2", r"vmovntps\s+%ymm", r"vmovntps\s+%ymm", "sfence"),
    ("avx512", r"vmovntps\s+%ymm", r"vmovntps\s+%zmm", "sfence"),
    ("neon", r"stnp\s+[dq]", r"stnp\s+[dq]", ""),
])
def test_instructions(name: str, streamed: str, store: str, fence: str) -> None:
    """Present for a sum of 8M elements (96 MiB), absent for one of 64K and where the option is off; both versions where the size is symbolic. What is
    known to come from memory comes and goes in half lines (`layout.py`)."""
    large = assembly(name, 8 << 20)
    assert re.search(streamed, large) and fence in large
    assert not re.search(r"movnt|stnp\s+[dq]|sfence", assembly(name, 1 << 16))
    assert not re.search(r"movnt|stnp\s+[dq]|sfence", assembly(name, 8 << 20, nontemporal=False))
    symbolic = assembly(name, "s0")
    assert re.search(store, symbolic) and re.search(r"kernel\.add:", symbolic) and re.search(r"kernel\.add\.nontemporal[.\d]+:", symbolic)


def run(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> str:
    """Compares with eager, as if there were 4 KiB of cache; gives the LLVM IR."""
    monkeypatch.setattr(nontemporal, "cache_bytes", lambda target: 1 << 12)
    found: list[Compilation] = []
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aicc", dynamic=dynamic, options={"strict": True, "cache": False})
    with watching(compiled=found.append), torch.no_grad():
        torch.testing.assert_close(compiled(*args), function(*args))
        torch.testing.assert_close(compiled(*args), function(*args))  # also where the result's memory is used again
    return found[0].llvm_ir


@pytest.mark.parametrize("width", [256, 250, 251, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_any_length(monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype) -> None:
    """Softmax keeps exponentials in the program's memory and writes each row once, wherever it begins: aligned, even, odd."""
    monkeypatch.setattr(stores, "SHORTEST", 512)
    assert "nontemporal !" in run(monkeypatch, lambda x: x.softmax(-1), torch.randn(37, width, dtype=dtype))


@pytest.mark.parametrize("function", [
    lambda x: x.clone(), lambda x: torch.cat([x, x[:, :100]], 1), lambda x: x.t().contiguous(), lambda x: x[:, 1:].contiguous(),
    lambda x: F.layer_norm(x, x.shape[1:]), lambda x: (x + 1, (x + 1).square().mean(1, keepdim=True) * x), lambda x: x.cumsum(1),
    lambda x: x.view(-1)[3:] * 2,
])
def test_kernels(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    for width in (160, 161):
        run(monkeypatch, function, torch.randn(64, width))


@pytest.mark.parametrize("width", [2049, 2050, 2055, 3001, 5003])
def test_long_rows_that_begin_anywhere(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Their ends are stored as usual, what is between past the caches; the rows before and after stay whole."""
    text = run(monkeypatch, lambda x: x.softmax(-1), torch.randn(19, width))
    assert "nontemporal !" in text and "run.head" in text


def test_shorter_rows_that_begin_anywhere_are_stored_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ends would take as long as the rest gains."""
    assert "run.head" not in run(monkeypatch, lambda x: x.softmax(-1), torch.randn(19, 1001))


def test_sizes_known_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for small and large, each with the stores that suit it."""
    text = run(monkeypatch, lambda x: x * 2 + 1, torch.randn(70, 33), dynamic=True)
    names = set(re.findall(r'define internal void @"(kernel[.\w]*)"', text))
    assert any(n.partition(".nontemporal")[0] in names for n in names if ".nontemporal" in n), names
    compiled = torch.compile(lambda x: (x * 2 + 1).softmax(-1), backend="aicc", dynamic=True, options={"strict": True})
    for rows, width in ((3, 5), (100, 77), (77, 1000), (9, 128)):
        x = torch.randn(rows, width)
        torch.testing.assert_close(compiled(x), (x * 2 + 1).softmax(-1))


def test_what_is_updated_in_place_is_not_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines are in the cache already, and belong to the caller, so their address may be odd."""
    monkeypatch.setattr(nontemporal, "cache_bytes", lambda target: 1 << 12)
    found: list[Compilation] = []
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.mul_(2), backend="aicc", options={"strict": True, "cache": False})
    whole = torch.randn(100001)
    x, expected = whole[1:], whole[1:] * 2
    with watching(compiled=found.append):
        compiled(x)
    torch.testing.assert_close(x, expected)
    assert "nontemporal !" not in found[0].llvm_ir


def test_packed_parameters_are_streamed_if_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are packed before any is read: together they leave the caches, although each would stay."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(4)))
    x, size = torch.randn(32, 64), 64 * 64 * 4
    for cache, streamed in ((2 * size, True), (8 * size, False)):
        monkeypatch.setattr(nontemporal, "cache_bytes", lambda target, cache=cache: cache)
        found: list[Compilation] = []
        torch._dynamo.reset()
        with torch.no_grad(), watching(compiled=found.append):
            result = torch.compile(layers, backend="aicc", options={"strict": True, "cache": False})(x)
        torch.testing.assert_close(result, layers(x))
        assert ("nontemporal !" in found[0].llvm_ir) == streamed


def test_private_memory_holds_what_a_later_stage_needs() -> None:
    """The result of a softmax is written once: its exponentials wait in a buffer of the program's own while the row fits."""
    text = """module {{level = "graph"}} {{ func @main {{ ^(%x: tensor<{rows}x{n}xf32>):
  %y = graph.softmax(%x) {{dim = 1}} : tensor<{rows}x{n}xf32>
  return(%y)
}} }}"""
    for rows, n, private in ((512, 4096, 1), (512, 1 << 18, 0)):
        module = parse_module(text.format(rows=rows, n=n))
        target = TARGETS["avx2"]
        for stage in ("graph", "tensor", "tile"):
            run_pipeline(module, parse_pipeline(pipeline(stage, target, Options())), PassContext(target))
        kernel = next(op for op in module.body if op.name == "tile.kernel")
        out = kernel.body.args[-1]
        assert sum(op.name == "tile.alloca" for op in kernel.walk()) == private
        assert sum(op.name == "tile.load" and op.operands[0] is out for op in kernel.walk()) == 1 - private
