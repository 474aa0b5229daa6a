"""Dense code of every CPU target, cross-compiled and read as assembly: which instruction multiplies, how often, and that sums stay in registers.

The modules go through the whole pipeline, so packing, tiles and blocks are those that the target would get.
"""

from __future__ import annotations

import re

import pytest
from aicc import passes  # noqa: F401  (registers them)
from aicc.backends.llvm import compile_module
from aicc.backends.llvm.target import make_target
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.ir import Target
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline

SSE = ["cx8", "cmov", "mmx", "fxsr", "sse", "sse2", "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"]
AVX2 = [*SSE, "avx", "avx2", "fma", "f16c", "bmi", "bmi2"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"]
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
CACHES = (32 << 10, 1 << 20, 32 << 20)
TARGETS = {
    "avx2": make_target(X86, "haswell", AVX2, CACHES),
    "avx512": make_target(X86, "skylake-avx512", AVX512, CACHES),
    "bf16": make_target(X86, "cooperlake", [*AVX512, "avx512vnni", "avx512bf16"], CACHES),
    "amx": make_target(X86, "sapphirerapids", [*AVX512, "avx512vnni", "avx512bf16", "amx-tile", "amx-bf16"], CACHES),
    "neon": make_target(ARM, "generic", ["neon", "fp-armv8"], CACHES),
}
MATMUL = """module {{level = "graph"}} {{ func @main {{arg_attrs = [{{kind = "input"}}, {{kind = "param"}}]}} {{ ^(%x: tensor<{m}x{k}x{t}>, %w: tensor<{k}x{n}x{t}>):
  %y = graph.matmul(%x, %w) : tensor<{m}x{n}x{t}>
  return(%y)
}} }}"""


def assembly(target: Target, m: int, n: int, k: int, t: str = "f32") -> str:
    module = parse_module(MATMUL.format(m=m, n=n, k=k, t=t))
    for stage in ("graph", "tensor", "tile", "host"):
        run_pipeline(module, parse_pipeline(pipeline(stage, target, Options())), PassContext(target))
    return compile_module(module, target).asm


def inner_loop(asm: str, instruction: str) -> str:
    """The basic block with the most such instructions."""
    return max(re.split(r"^\.LBB.*:", asm, flags=re.M), key=lambda text: text.count(instruction))


@pytest.mark.parametrize("name,instruction,register,tile,stack", [
    # rows x vectors of the register tile, unrolled four times along K
    ("avx2", "vfmadd231ps", "%ymm", 6 * 2, "(%rsp)"),
    ("avx512", "vfmadd231ps", "%zmm", 6 * 4, "(%rsp)"),
    ("neon", "fmla", ".4s", 5 * 4, "[sp"),
])
def test_float32_microkernel(name: str, instruction: str, register: str, tile: int, stack: str) -> None:
    """One multiply-add per accumulator and step; no spill and no copy of a register between them."""
    inner = inner_loop(assembly(TARGETS[name], 240, 960, 512), instruction)
    lines = [line for line in inner.splitlines() if instruction in line and register in line]
    assert len(lines) == 4 * tile, inner
    assert stack not in inner and "vmovaps" not in inner, inner


@pytest.mark.parametrize("name,t,instruction", [
    ("bf16", "bf16", "vdpbf16ps"), ("amx", "bf16", "tdpbf16ps"), ("avx512", "bf16", "vfmadd"), ("avx2", "f16", "vcvtph2ps"),
    ("neon", "f32", "fmla"), ("avx2", "f64", "vfmadd231pd"),
])
def test_instruction_of_a_target(name: str, t: str, instruction: str) -> None:
    """16-bit floats are multiplied by what the target has for them, else in float32."""
    assert instruction in assembly(TARGETS[name], 64, 96, 128, t)


@pytest.mark.parametrize("name", ["avx2", "neon"])
def test_nothing_beyond_the_target(name: str) -> None:
    """No instruction of a wider extension slips in through LLVM's name of the processor."""
    asm = assembly(TARGETS[name], 64, 96, 128, "bf16")
    assert "%zmm" not in asm and "dpbf16" not in asm and "bfdot" not in asm
