"""Products with operands that are unpacked on the way to the matrix units (GPUs)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.pipelines import pipeline
from aicc.frontend.importer import import_graph
from aicc.ir import DTYPES
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.passes.exact import holds
from gpu.cases import CASES, _int4_linear, _packed_weight
from support.stages import CUDA, OPTIONS, capture, check_levels, lowered
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

PACKED = ("int8_weight", "int8_scaled", "int4_groups", "fp8_weight")


def _dots(module: Any) -> list[str]:
    return [str(op.operands[1].type.dtype) for op in module.walk() if op.name == "tile.dot"]


@pytest.mark.parametrize("name", PACKED)
def test_unpacked_in_the_kernel_of_the_product(name: str) -> None:
    function, inputs = CASES[name].build()
    program = capture(function, inputs)
    check_levels(program, CUDA)
    module = lowered(program, CUDA)
    assert [op.name for op in module.body] == ["tile.kernel", "func"]
    assert set(_dots(module)) == {"bf16"}


def test_pairs_of_a_byte_are_loaded_once() -> None:
    """Two products per step, of the low and of the high numbers, from one load; the choice between them is made while compiling."""
    function, inputs = CASES["int4_groups"].build()
    module = lowered(capture(function, inputs), CUDA)
    assert len(_dots(module)) == 2
    assert sum(op.name == "tile.load" and str(op.result.type).endswith("u8>") for op in module.walk()) == 1
    assert not any(op.name == "arith.mod" for op in module.walk())


def test_many_rows_unpack_once_for_all() -> None:
    inputs = _packed_weight(torch.uint8, lambda n, k: (n, k // 64), 2048, 256, 512)(torch.Generator().manual_seed(0))
    module = lowered(capture(_int4_linear, inputs), CUDA)
    assert not any(op.name == "tile.load" and str(op.result.type).endswith("u8>") and any(o.name == "tile.dot" for o in kernel.walk())
                   for kernel in module.body if kernel.name == "tile.kernel" for op in kernel.walk())


@pytest.mark.parametrize(("rows", "library"), [(64, 0), (4096, 1)])
def test_the_library_pays_for_unpacking(rows: int, library: int) -> None:
    """With few rows the product is generated, and unpacks; with many the library's speed is worth a pass over the weight."""
    def f(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return F.linear(x, w.to(x.dtype) * s)

    empty = torch.empty(rows, 4096, dtype=torch.bfloat16), torch.empty(11008, 4096, dtype=torch.int8), torch.empty(11008, 1, dtype=torch.bfloat16)
    gm = make_fx(f, tracing_mode="fake")(*empty)
    module = import_graph(gm)
    for stage in ("graph", "tensor"):
        run_pipeline(module, parse_pipeline(pipeline(stage, CUDA, OPTIONS)), PassContext(CUDA))
    assert sum(op.name == "tensor.library" for op in module.walk()) == library
    assert sum(op.name == "tensor.fused" for op in module.walk()) == 1


def test_a_rounding_cast_keeps_float32_products() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x.float(), w.to(torch.float32))

    x = torch.randn(5, 64, dtype=torch.float32).half()
    module = lowered(capture(f, (x, torch.randint(-9000, 9000, (40, 64), dtype=torch.int16))), CUDA)
    assert _dots(module) == ["f32"]


@pytest.mark.parametrize(("wide", "narrow", "expected"), [
    ("bf16", "i8", True), ("bf16", "u8", True), ("bf16", "i16", False), ("f16", "f8e5m2", True), ("bf16", "f8e4m3fn", True), ("bf16", "f16", False),
    ("f16", "bf16", False), ("f32", "i16", True), ("f32", "i32", False), ("f64", "i32", True), ("i16", "u8", True), ("u8", "i8", False), ("f16", "i1", True),
    ("f8e5m2", "f8e4m3fn", False), ("f16", "i16", False)])
def test_holds(wide: str, narrow: str, expected: bool) -> None:
    assert holds(DTYPES[wide], DTYPES[narrow]) == expected
