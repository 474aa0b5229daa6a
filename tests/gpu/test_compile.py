"""Every kernel family becomes a cubin for Ampere and Hopper; no GPU is needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from aicc.backends.triton import CompiledGpu, compile_gpu, may_begin
from aicc.backends.triton.host import build_program
from aicc.backends.triton.printer import print_kernel
from aicc.compiler.manifest import build_manifest
from aicc.ir import IRError, Operation, Target

from .cases import CASES, SM80, SM90, SM100, capture

SLOW = {
    "gated_unit",
    "gemm_maps",
    "fp8_weight",
    "group_norm",
    "softmax_long",
    "conv_backward",
    "mlp_backward",
    "embedding_backward",
    "gemm_f64",
    "attention",
    "sdpa_causal",
    "transcendental",
    "nan",
    "window_softcap",
    "alibi",
    "sdpa_mask",
    "attention_gradients",
    "attention_gradients_bf16",
    "attention_training",
    "attention_training_window",
    "attention_training_bf16",
    "cross_entropy_long",
    "column_sum_long",
}
REPEATED = SLOW | {
    "pointwise_symbolic", "transposed", "softmax", "total", "extremes", "variance", "gemm", "few_rows", "gemm_i64", "int8_weight", "matvec", "bmm",
    "conv_grouped", "conv_depthwise", "scatter_prod", "integers", "bool", "bf16", "copy_out", "decode", "decode_growing", "linear_loss", "equal_parts",
    "norm_columns", "pool_backward_last", "batch_norm_last",
}
"""Kernels of a family that another case stands for here; what they compute is simulated all the same (`test_simulated.py`)."""


def compile_all(function: Any, inputs: Any, target: Target, folder: Path, **options: Any) -> list[CompiledGpu]:
    found: list[CompiledGpu] = []

    def run(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        found.append(compile_gpu(module, target, cache_dir=folder))
        build_manifest(module)
        return gm.forward(*args)

    capture(function, inputs, run, until="host", target=target, **options)
    return found


def check(compiled: list[CompiledGpu], target: Target) -> None:
    assert compiled
    for program in compiled:
        assert program.kernels
        for name, k in program.kernels.items():
            assert k.cubin[:4] == b"\x7fELF", name
            assert 0 < k.registers <= 255 and k.spills <= 512 and k.global_scratch == 0, (name, k.registers, k.spills)
            assert k.parameters >= len(k.signature), name
            assert k.shared <= (227 if target.capability >= 90 else 163) * 1024, name
        for steps in program.program["functions"].values():
            assert all(step[0] != "launch" or step[1] in program.kernels for step in steps)
        assert program.blobs["host"][:4] == b"\x7fELF" and len(program.host.functions) == len(program.program["functions"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in REPEATED else n for n in CASES])
def test_case_compiles_for_hopper(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    function, inputs = case.build()
    check(compile_all(function, inputs, SM90, tmp_path, dynamic=case.dynamic, backward=case.backward), SM90)


@pytest.mark.parametrize(
    "name",
    [
        "pointwise",
        "softmax",
        "gemm_gelu",
        "gemm_bf16",
        "int8_scaled",
        "embedding",
        "sdpa_causal_bf16",
        *[pytest.param(n, marks=pytest.mark.slow) for n in ("causal", "window_softcap", "attention_gradients_bf16", "attention_training_bf16", "split_k", "conv", "attention", "gemm_f64", "integers", "scatter_add")],
    ],
)
def test_case_compiles_for_ampere(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    function, inputs = case.build()
    check(compile_all(function, inputs, SM80, tmp_path, dynamic=case.dynamic, backward=case.backward), SM80)


@pytest.mark.parametrize(
    "name",
    [
        "pointwise",
        "gemm_bf16",
        *[pytest.param(n, marks=pytest.mark.slow) for n in ("softmax", "gemm_gelu", "int4_groups", "group_norm", "fp8_weight", "gated_unit", "sdpa_causal_bf16", "scatter_add", "conv")],
    ],
)
def test_case_compiles_for_blackwell(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    function, inputs = case.build()
    check(compile_all(function, inputs, SM100, tmp_path, dynamic=case.dynamic, backward=case.backward), SM100)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "bert", "llama", "resnet18"])
def test_model_compiles(model: str, tmp_path: Path) -> None:
    from aicc.tests.models.zoo import MODELS

    check(compile_all(*MODELS[model].build(), SM90, tmp_path), SM90)


def test_bfloat16_products_use_the_tensor_cores(tmp_path: Path) -> None:
    """Hopper's wgmma instruction is in the code, and compiling twice gives the same code."""
    case = CASES["gemm_bf16"]
    function, inputs = case.build()
    small = dataclasses.replace(SM90, multiprocessors=2)  # few multiprocessors want large tiles
    (first,) = compile_all(function, inputs, small, tmp_path / "a")
    (second,) = compile_all(function, inputs, small, tmp_path / "b")
    ((name, kernel),) = first.kernels.items()
    ptx = next((tmp_path / "a").rglob("*.ptx")).read_text()
    assert "wgmma.mma_async" in ptx
    assert kernel.shared > 0 and second.kernels[name].cubin == kernel.cubin


def test_a_race_of_python_while_parsing_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """python/cpython#106905; anything else that Triton says is an error at once."""
    real, failures = triton.compile, ["AST constructor recursion depth mismatch (before=39, after=32)"] * 3

    def compile_once_calm(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise SystemError(failures.pop())
        return real(*args, **kwargs)

    monkeypatch.setattr(triton, "compile", compile_once_calm)
    case = CASES["pointwise"]
    check(compile_all(*case.build(), SM90, tmp_path), SM90)
    assert not failures
    failures.append("something else")
    with pytest.raises(IRError, match="something else"):
        compile_all(*case.build(), SM90, tmp_path)


def test_kernels_for_hopper_wait_for_the_kernel_in_front_of_them() -> None:
    """Before they touch memory; those for older devices, and the text that the interpreter runs, do not."""
    found: list[str] = []

    def keep(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        for target in (SM90, SM80):
            compiled = compile_gpu(module, target)
            (source,) = compiled.sources.values()
            found.append(source)
            (row,) = compiled.program["kernels"].values()
            assert row["dependent"] == (target is SM90)
            assert ("cuLaunchKernelEx" if target is SM90 else "cuLaunchKernel") in compiled.program["host"]["imports"]
        return gm.forward(*args)

    capture(lambda a: a * 2, (torch.randn(300),), keep, until="host")
    early, plain = found
    assert early.index("gdc_wait()") < early.index("gdc_launch_dependents()") < early.index("tl.load(") and "gdc" not in plain


def test_products_ask_for_their_weights_before_they_wait() -> None:
    """Along the summed dimension or across it, as the weight lies in memory; not for what a kernel in front of them makes, nor with many rows."""
    found: list[str] = []

    def keep(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        kernels = [op for op in module.body if op.name == "tile.kernel"]
        assert "fetch(" not in "".join(print_kernel(op, (False,) * len(op.body.args), dependent=True).text for op in kernels)
        found.append("\n".join(print_kernel(op, (True,) * len(op.body.args), dependent=True).text for op in kernels))
        return gm.forward(*args)

    def asked(f: Any, *shapes: tuple[int, int]) -> list[str]:
        capture(f, tuple(torch.randn(s, dtype=torch.float16) for s in shapes), keep, until="host", target=SM90)
        lines = [line.strip() for line in found[-1].split("gdc_wait()")[0].splitlines()]
        assert "fetch(" not in found[-1].partition("gdc_wait()")[2]
        return [line for line in lines if line.startswith("fetch(")]

    (along,) = asked(torch.nn.functional.linear, (64, 96), (200, 96))
    assert "< 200" in along and "48" in along  # a quarter of a row at a time
    (across,) = asked(torch.mm, (64, 96), (96, 128))
    assert "< 96" in across and "64" in across
    assert not asked(torch.mm, (512, 96), (96, 128))
    assert not asked(lambda x, y: x @ y.softmax(0), (64, 96), (96, 128))


@pytest.mark.parametrize(("batch", "length", "early"), [(16, 1024, False), (1, 1024, True), (64, 1024, True), (16, 128, True)])
def test_a_long_stream_in_parts_is_launched_when_all_multiprocessors_are_free(batch: int, length: int, early: bool) -> None:
    """Two programs for each come to lie evenly then; few, many, or short ones start early."""
    def run(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        kernel, = (k for k in build_program(module).kernels.values() if any(op.name == "tile.for" and op["part"] for op in k.body))
        assert may_begin(kernel, SM90) == early, kernel["grid"]
        assert not may_begin(kernel, SM80)
        return [torch.zeros(batch, 16, 1, 128, dtype=torch.bfloat16)]

    q, k, v = (torch.zeros(batch, n, s, 128, dtype=torch.bfloat16) for n, s in ((16, 1), (8, length), (8, length)))
    capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), (q, k, v), run, until="host")
