"""Sums of columns in the kernel that walks the same rows: gradients of norms, and of the bias before one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.ir import Operation
from support.stages import CUDA, capture, check_levels, lowered
from torch import Tensor

aten = torch.ops.aten
SMALL = dataclasses.replace(CUDA, multiprocessors=4)
"""So that few rows are enough."""


def layer_norm(dy: Tensor, x: Tensor, w: Tensor, b: Tensor, residual: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a LayerNorm beside a residual, and of the bias of the layer before it."""
    dx, dw, db = aten.native_layer_norm_backward(dy, x, [x.shape[-1]], mean, rstd, w, b, [True, True, True])
    out = dx + residual
    return out, dw, db, out.sum(list(range(out.dim() - 1)))


def rms_norm(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    g = dy * w
    dx = scale * (g - x * scale.square() * (g * x).mean(-1, keepdim=True))
    return dx, (dy * x * scale).sum(0)


def activation(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The gradient of an activation, for a product and for a bias; and the activation itself, made again."""
    d = aten.gelu_backward(dy, x)
    return torch.nn.functional.gelu(x), d, d.sum(list(range(d.dim() - 1))), d * w


def concatenation(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    d = torch.cat([q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2)], -1)
    return d, d.sum([0, 1])


def circle(dy: Tensor, x: Tensor) -> Tensor:
    """What is made of the rows needs the columns' sums of the same space: two kernels."""
    return (x - x.sum(-1, keepdim=True)) * (dy * x.sum(-1, keepdim=True)).sum(0)


def _normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def _norm(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    dy, x, w, b, residual = _normal(shape, shape, shape[-1:], shape[-1:], shape, dtype=dtype)
    _, mean, rstd = aten.native_layer_norm(x, [shape[-1]], w, b, 1e-5)
    return [dy, x, w, b, residual, mean, rstd]


def with_statistics(dy: Tensor, x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    """The statistics come from the same kernel."""
    _, mean, rstd = aten.native_layer_norm(x, [x.shape[-1]], w, b, 1e-5)
    return layer_norm(dy, x, w, b, residual, mean, rstd)


CASES: dict[str, tuple[Callable[..., Any], list[Tensor], int]] = {
    "layer_norm": (layer_norm, _norm(128, 256), 3),
    "layer_norm of batches": (layer_norm, _norm(3, 64, 300), 3),
    "layer_norm bf16": (layer_norm, _norm(2, 64, 1024, dtype=torch.bfloat16), 3),
    "layer_norm of long rows": (layer_norm, _norm(128, 3000), 3),
    "with_statistics": (with_statistics, _norm(128, 256)[:5], 3),
    "rms_norm": (rms_norm, _normal((160, 512), (160, 512), (512,)), 1),
    "in parts of 16": (layer_norm, _norm(80, 256), 3),
    "activation": (activation, _normal((1024, 512), (1024, 512), (512,)), 1),
    "ragged activation": (activation, _normal((2, 1024, 300), (2, 1024, 300), (300,), dtype=torch.bfloat16), 1),
    "concatenation": (concatenation, _normal((2, 3, 512, 64), (2, 3, 512, 64), (2, 3, 512, 64)), 1),
}


def _joined(module: Operation) -> list[Operation]:
    return [op for op in module.walk() if op.name == "tensor.fused" and op["part"]]


@pytest.mark.parametrize("name", CASES)
def test_sums_of_columns_join_their_rows(name: str) -> None:
    function, inputs, sums = CASES[name]
    program = capture(function, inputs)
    (group,) = _joined(lowered(program, SMALL, "tensor"))
    rows = sum(r.type.rank == 2 and r.type.shape[0] * group["part"] == _rows(function, inputs) for r in group.results)  # type: ignore[attr-defined]
    assert rows == sums
    check_levels(program, SMALL)


def _rows(function: Callable[..., Any], inputs: list[Tensor]) -> int:
    first = inputs[0] if function is not concatenation else inputs[0].flatten(0, 1)[0].new_empty(inputs[0].shape[0] * inputs[0].shape[2], 1)
    return first.numel() // first.shape[-1]


def test_large_operands_are_read_once() -> None:
    """Of the gradient of a LayerNorm: five tensors in, and none of what the sums need a second time."""
    program = capture(layer_norm, _norm(128, 1024))
    module = lowered(program, SMALL)
    (kernel,) = [op for op in module.walk() if op.name == "tile.kernel" and op["grid"] == (4,)]
    reads = [op.operands[0] for op in kernel.walk() if op.name == "tile.load" and op.operands[0].type.shape[-2:] == (128, 1024)]  # type: ignore[attr-defined]
    assert len(reads) == len(set(reads)) == 3


@pytest.mark.parametrize("inputs", [_norm(48, 256), _norm(130, 256), _norm(128, 128), _norm(128, 8192)], ids=["few", "ragged", "narrow", "wide"])
def test_left_alone(inputs: list[Tensor]) -> None:
    program = capture(layer_norm, inputs)
    assert not _joined(lowered(program, SMALL, "tensor"))
    check_levels(program, SMALL, levels=("tile",))


def test_no_circle() -> None:
    program = capture(circle, _normal((128, 256), (128, 256)))
    check_levels(program, SMALL)
