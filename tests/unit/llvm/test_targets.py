"""Dense code of every CPU target, cross-compiled and read as assembly: which instruction multiplies, how often, and that sums stay in registers.

The modules go through the whole pipeline, so packing, tiles and blocks are those that the target would get.
"""

from __future__ import annotations

import re

import pytest
import torch
from aicc import passes  # noqa: F401  (registers them)
from aicc.backends.llvm import compile_module
from aicc.backends.llvm.target import make_target
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.ir import Operation, Target
from aicc.ir.interpreter import interpret
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
    "vnni": make_target(X86, "cascadelake", [*AVX512, "avx512vnni"], CACHES),
    "avxvnni": make_target(X86, "alderlake", [*AVX2, "avxvnni"], CACHES),
    "sse": make_target(X86, "x86-64", SSE, CACHES),
    "dotprod": make_target(ARM, "generic", ["neon", "fp-armv8", "dotprod"], CACHES),
    "neon": make_target(ARM, "generic", ["neon", "fp-armv8"], CACHES),
}
MATMUL = """module {{level = "graph"}} {{ func @main {{arg_attrs = [{{kind = "input"}}, {{kind = "param"}}]}} {{ ^(%x: tensor<{m}x{k}x{t}>, %w: tensor<{k}x{n}x{t}>):
  %y = graph.matmul(%x, %w) : tensor<{m}x{n}x{t}>
  return(%y)
}} }}"""


DEPTHWISE = """module {{level = "graph"}} {{ func @main {{arg_attrs = [{{kind = "input"}}, {{kind = "param"}}]}} {{
  ^(%x: tensor<1x{c}x{n}x{n}xf32, strides=[{image}, 1, {row}, {c}]>, %w: tensor<{c}x1x{k}x{k}xf32>):
  %y = graph.conv(%x, %w) {{stride = [1, 1], padding = [{p}, {p}], dilation = [1, 1], groups = {c}}} : tensor<1x{c}x{n}x{n}xf32>
  return(%y)
}} }}"""


INTEGERS = """module {{level = "graph"}} {{ func @main {{arg_attrs = [{{kind = "input"}}, {{kind = "param"}}]}} {{ ^(%x: tensor<{m}x{k}x{t}>, %w: tensor<{k}x{n}xi8>):
  %a = graph.cast(%x) : tensor<{m}x{k}xi32>
  %b = graph.cast(%w) : tensor<{k}x{n}xi32>
  %y = graph.matmul(%a, %b) : tensor<{m}x{n}xi32>
  return(%y)
}} }}"""


def lowered(target: Target, m: int, n: int, k: int, t: str, *stages: str) -> Operation:
    return through((INTEGERS if t in ("i8", "u8") else MATMUL).format(m=m, n=n, k=k, t=t), target, *stages)


def through(text: str, target: Target, *stages: str) -> Operation:
    module = parse_module(text)
    for stage in stages:
        run_pipeline(module, parse_pipeline(pipeline(stage, target, Options())), PassContext(target))
    return module


def assembly(target: Target, m: int, n: int, k: int, t: str = "f32") -> str:
    return compile_module(lowered(target, m, n, k, t, "graph", "tensor", "tile", "host"), target).asm


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


@pytest.mark.parametrize("name,instruction,stack,taps,positions,vectors", [
    # positions of a row x vectors of channels of the register tile
    ("avx2", "vfmadd231ps", "(%rsp)", 3, 7, 1), ("avx2", "vfmadd231ps", "(%rsp)", 7, 7, 1), ("avx512", "vfmadd231ps", "(%rsp)", 3, 5, 3),
    ("neon", "fmla", "[sp", 5, 14, 1),
])
def test_window(name: str, instruction: str, stack: str, taps: int, positions: int, vectors: int) -> None:
    """The loop over a window's rows: one multiply-add per tap and sum, each position of the image loaded once for all its taps, no spill."""
    n = 56
    text = DEPTHWISE.format(c=144, n=n, k=taps, p=taps // 2, image=144 * n * n, row=144 * n)
    asm = compile_module(through(text, TARGETS[name], "graph", "tensor", "tile", "host"), TARGETS[name]).asm
    inner = re.split(r"\n\t(?:j\w+|b\.\w+)\t", inner_loop(asm, instruction))[0]
    assert inner.count(instruction) == taps * positions * vectors and stack not in inner, inner
    if name != "neon":
        loads = sum(("vmovups" in line or instruction in line) and "(%" in line for line in inner.splitlines())
        assert loads == vectors * (taps + positions + taps - 1), inner


@pytest.mark.parametrize("name,t,instruction", [
    ("bf16", "bf16", "vdpbf16ps"), ("amx", "bf16", "tdpbf16ps"), ("avx512", "bf16", "vfmadd"), ("avx2", "f16", "vcvtph2ps"),
    ("neon", "f32", "fmla"), ("avx2", "f64", "vfmadd231pd"),
])
def test_instruction_of_a_target(name: str, t: str, instruction: str) -> None:
    """16-bit floats are multiplied by what the target has for them, else in float32."""
    assert instruction in assembly(TARGETS[name], 64, 96, 128, t)


@pytest.mark.parametrize("name", ["amx", "bf16"])
def test_rounding_of_bf16_products(name: str) -> None:
    """One instruction rounds a vector of sums, not integer arithmetic; a target without it has that."""
    asm = assembly(TARGETS[name], 64, 96, 128, "bf16")
    assert asm.count("vcvtneps2bf16") >= 4 and "vpmovdw" not in asm
    assert "vcvtneps2bf16" not in assembly(TARGETS["avx512"], 64, 96, 128, "bf16")


@pytest.mark.parametrize("name,instruction,per_step", [
    # products of one step of K (of 2 or 4 elements) and how often it is unrolled
    ("avx2", "vpmaddwd", 6 * 2), ("avx512", "vpmaddwd", 6 * 4), ("sse", "pmaddwd", 6 * 2), ("vnni", "vpdpbusd", 4 * 6 * 4), ("avxvnni", "vpdpbusd", 4 * 6 * 2),
    ("dotprod", "sdot", 4 * 4 * 4),
])
def test_integer_microkernel(name: str, instruction: str, per_step: int) -> None:
    """Products of neighbours on registers: no spill, no 32-bit multiplication, and never the one that saturates."""
    asm = assembly(TARGETS[name], 256, 256, 512, "i8")
    inner = re.split(r"\n\t(?:j\w+|b\.\w+)\t", inner_loop(asm, instruction))[0]
    assert inner.count(instruction) >= per_step - 2 * (name == "sse"), inner
    assert "vpmulld" not in asm and "maddubs" not in asm and "(%rsp)" not in inner and "[sp" not in inner, inner


@pytest.mark.parametrize("name", ["avx2", "vnni", "avxvnni", "dotprod", "neon"])
@pytest.mark.parametrize("t", ["i8", "u8"])
def test_integers_on_every_target(name: str, t: str) -> None:
    """What a target computes, by the interpreter: the same as one by one, with the largest numbers of each sign."""
    m, n, k = 21, 37, 68
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    x[0], x[1] = -128, 127
    w = torch.randint(-128, 128, (k, n), dtype=torch.int8)
    w[:, 0], w[:, 1] = -128, 127
    x = x.view(torch.uint8) if t == "u8" else x
    truth = (x.double() @ w.double()).int()
    for stages in (("graph", "tensor"), ("graph", "tensor", "tile")):
        assert torch.equal(interpret(lowered(TARGETS[name], m, n, k, t, *stages), [x, w])[0], truth)


@pytest.mark.parametrize("name", ["avx2", "neon"])
def test_nothing_beyond_the_target(name: str) -> None:
    """No instruction of a wider extension slips in through LLVM's name of the processor."""
    asm = assembly(TARGETS[name], 64, 96, 128, "bf16")
    assert "%zmm" not in asm and "dpbf16" not in asm and "bfdot" not in asm


@pytest.mark.parametrize("name,suffix", [("avx2", "%ymm"), ("avx512", "%zmm")])
def test_spilled_vectors_lie_within_lines(name: str, suffix: str) -> None:
    """On an aligned stack; wherever the caller's happens to be, a vector across two lines may make a kernel several times as slow."""
    text = """module {level = "graph"} { func @main {arg_attrs = [{kind = "input"}]} { ^(%x: tensor<65536xf32>):
  %y = graph.gelu(%x) : tensor<65536xf32>
  return(%y)
} }"""
    asm = compile_module(through(text, TARGETS[name], "graph", "tensor", "tile", "host"), TARGETS[name]).asm
    spills = [line for line in asm.splitlines() if "(%rsp)" in line and suffix in line and "mov" in line]
    assert spills and not any("movup" in line or "movdqu" in line for line in spills)
