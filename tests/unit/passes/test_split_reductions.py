"""Reductions in two steps, against eager; a small device splits little programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.pipelines import pipeline
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from support.stages import CUDA, OPTIONS, capture, check_levels, lowered
from torch import Tensor

SMALL = replace(CUDA, multiprocessors=8)


def _normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def _with_nan(*shape: int) -> list[Tensor]:
    x, = _normal(shape)
    x[700, 1], x[3, 2], x[5, 3] = float("nan"), float("inf"), float("-inf")
    return [x]


CASES: dict[str, tuple[Callable[..., Any], list[Tensor], int]] = {
    "matmul": (lambda a, b: a @ b, _normal((16, 1024), (1024, 20)), 1),
    "matmul_epilogue": (lambda a, b, c: F.gelu(a @ b + c), _normal((16, 1024), (1024, 20), (20,)), 1),
    "matmul_bf16": (lambda a, b: a @ b, _normal((16, 1024), (1024, 32), dtype=torch.bfloat16), 1),
    "matmul_f64": (lambda a, b: a @ b, _normal((7, 1024), (1024, 5), dtype=torch.float64), 1),
    "batched": (lambda a, b: a @ b, _normal((2, 5, 768), (2, 768, 9)), 1),
    "columns": (lambda a: a.sum(0) * 2, _normal((2048, 16)), 1),
    "columns_of_many": (lambda a: (a.amax(0), a.mean(0)), _normal((2048, 16)), 2),
    "nan": (lambda a: (a.amax(0), a.amin(0), a.sum(0)), _with_nan(2048, 16), 3),
    "bool": (lambda a: ((a > 3).any(0), (a > -3).all(0)), _normal((2048, 16)), 2),
    "integers": (lambda a: a.sum(0), [torch.arange(2048 * 16).reshape(2048, 16)], 1),
    "product": (lambda a: (1 + a / 1000).prod(0), _normal((2048, 16)), 1),
    "position": (lambda a: (a * torch.arange(2048)[:, None]).sum(0), _normal((2048, 16)), 1),
    "variance": (lambda a: torch.var_mean(a + 30, 0), _normal((2048, 16)), 1),
    "batch_norm": (lambda a: F.batch_norm(a.permute(0, 3, 1, 2), None, None, training=True), _normal((16, 32, 8, 5)), 1),
    "images": (lambda a: torch.var_mean(a + 30, (0, 1, 2)), _normal((3, 28, 28, 16)), 1),
    "images_of_many": (lambda a: (a.amax((0, 1, 2)), a.sum((0, 1, 2))), _normal((3, 32, 16, 16)), 2),
    "two_dims": (lambda a: a.sum((0, 2)), _normal((4, 8, 2048)), 0),
    "convolution_like": (lambda a, b: torch.einsum("ksa,skb->ab", a, b), _normal((40, 16, 6), (16, 40, 5)), 1),
    "odd_divisor": (lambda a, b: a @ b, _normal((4, 2187), (2187, 4)), 1),
    # Left alone.
    "prime": (lambda a, b: a @ b, _normal((4, 2203), (2203, 4)), 0),
    "short": (lambda a, b: a @ b, _normal((4, 300), (300, 4)), 0),
    "argmax": (lambda a: a.argmax(0), _normal((2048, 16)), 0),
    "wide": (lambda a: a.sum(0), _normal((512, 2048)), 0),
}


def splits(ctx: PassContext) -> int:
    return sum(r.pass_name == "split-reductions" and r.kind == "done" for r in ctx.remarks)


@pytest.mark.parametrize("name", CASES)
def test_split(name: str) -> None:
    function, inputs, wanted = CASES[name]
    program = capture(function, inputs)
    ctx = PassContext(SMALL)
    module = program.module()
    for stage in ("graph", "tensor"):
        run_pipeline(module, parse_pipeline(pipeline(stage, SMALL, OPTIONS)), ctx)
    assert splits(ctx) == wanted
    check_levels(program, SMALL)


def test_a_row_is_split_where_it_is_very_long() -> None:
    program = capture(lambda a: a.sum(), _normal((40000,)))
    module = lowered(program, SMALL, "tensor")
    dims = [op["dims"] for op in module.walk() if op.name == "tensor.generic" and op["reductions"]]
    assert dims == [(2, 20000), (2,)]
    check_levels(program, SMALL)


def test_symbols_are_not_split() -> None:
    program = capture(lambda a, b: a @ b, _normal((16, 1024), (1024, 20)), dynamic=True)
    module = lowered(program, SMALL, "tensor")
    assert sum(op["reductions"] > 0 for op in module.walk() if op.name == "tensor.generic") == 1


def test_a_variance_is_one_pass_over_memory() -> None:
    """Sums and squares of the parts by one load, in one loop of one kernel (in front of it a first row, for the shift); their merging is small."""
    module = lowered(capture(lambda a: torch.var_mean(a, 0), _normal((65536, 16))), SMALL)
    readers = [k for k in module.body if k.name == "tile.kernel" and any(str(a.type).startswith("buffer<65536x16x") for a in k.body.args)]
    assert len(readers) == 1
    (loop,) = [op for op in readers[0].body if op.name == "tile.for"]
    assert sum(op.name == "tile.load" for op in loop.walk()) == 1


def test_a_small_batch_is_split_along_the_next_dimension_too() -> None:
    """Statistics of channels, channels last: images, and rows of pixels of each; where a part is in memory stays one product."""
    module = lowered(capture(lambda a: torch.var_mean(a, (0, 1, 2)), _normal((8, 30, 30, 16))), SMALL)
    reader = next(k for k in module.body if k.name == "tile.kernel" and any(str(a.type).startswith("buffer<8x30x30x16x") for a in k.body.args))
    assert reader["grid"][0] == 48
    (load,) = [op for op in reader.walk() if op.name == "tile.load"]
    assert "i0*2400" in str(load["offset"]) and "//" not in str(load["offset"])


def _product_of_places(x: Tensor) -> Tensor:
    places = x.min(1)[1].float()
    return places @ places.transpose(-1, -2)


def test_a_product_of_what_no_memory_holds() -> None:
    check_levels(capture(_product_of_places, _normal((2, 129, 1, 99))[0].unbind(0)[:1]), CUDA)


def test_a_reader_of_a_reduction_of_symbolic_size() -> None:
    check_levels(capture(lambda x: x.amax(1).select(0, 1) * 2, [_normal((2049, 5))[0].t()], dynamic=True), CUDA)
