"""Norms of rows that outgrow the caches: one loop does the last pass of a row and the earlier ones of the next rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.ir import Operation
from support.stages import AVX2, capture, check_levels, lowered
from torch import Tensor

SMALL = replace(AVX2, l2=1 << 20, l3=1 << 14)
"""A target whose last cache holds a few rows."""


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=g) for s in shapes]


def _layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, w.shape, w, b)


def _residual(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + y
    return h, F.layer_norm(h, w.shape, w)


def _statistics(x: Tensor) -> tuple[Tensor, ...]:
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + 1e-5), mean, variance


CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "layer_norm": (_layer_norm, _normal((512, 256), (256,), (256,))),
    "ragged_rows": (_layer_norm, _normal((523, 256), (256,), (256,))),
    "one_row_left": (_layer_norm, _normal((513, 256), (256,), (256,))),
    "rms_norm": (lambda x, w: F.rms_norm(x, w.shape, w), _normal((530, 256), (256,))),
    "half_steps": (lambda x: F.rms_norm(x, x.shape[-1:]), _normal((520, 288))),
    "spans": (lambda x: x - x.mean(-1, keepdim=True), _normal((515, 32 * 513))),
    "kept_through_two_stages": (_residual, _normal((515, 256), (515, 256), (256,))),
    "numbers_of_rows": (_statistics, _normal((517, 256))),
    "scaled_rows": (lambda x, s: F.rms_norm(x, x.shape[-1:]) * s + x.amax(-1, keepdim=True), _normal((521, 256), (521, 1))),
    "batches": (_layer_norm, _normal((3, 257, 256), (256,), (256,))),
    "heads": (lambda x: F.rms_norm(x.transpose(0, 1), (256,)), _normal((200, 5, 256))),
    "bf16": (lambda x: F.layer_norm(x, (256,)), [x.bfloat16() for x in _normal((519, 256))]),
    "minimum": (lambda x: (x - x.amin(-1, keepdim=True)) / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)), _normal((516, 256))),
    "f64": (lambda x: F.layer_norm(x, (256,)), [x.double() for x in _normal((518, 256))]),
}


def kernels(function: Callable[..., Any], inputs: list[Tensor], target: Any = SMALL) -> list[Operation]:
    return [op for op in lowered(capture(function, inputs), target, "tile").body if op.name == "tile.kernel"]


def in_pipeline(kernel: Operation) -> bool:
    """A loop over rows around one loop over columns."""
    return any(op.name == "tile.for" and any(x.name == "tile.for" for x in op.body) and op["step"] == 1 for op in kernel.body)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "spans" else name for name in CASES])
def test_levels(name: str) -> None:
    function, inputs = CASES[name]
    program = capture(function, inputs)
    check_levels(program, SMALL)
    found = [op for op in lowered(program, SMALL, "tile").body if op.name == "tile.kernel"]
    assert any(in_pipeline(k) for k in found)


@pytest.mark.parametrize("function,shape,target", [
    (lambda x: x.softmax(-1), (512, 256), SMALL),                                       # exponentials take longer than memory
    (lambda x: F.rms_norm(x, x.shape[-1:]), (512, 250), SMALL),                         # rows that begin anywhere
    (lambda x: F.rms_norm(x, x.shape[-1:]), (100, 256), SMALL),                         # too few rows for several threads
    (lambda x: x.sum(-1), (512, 256), SMALL),                                           # one pass
    (lambda x: F.rms_norm(x, x.shape[-1:]), (512, 256), replace(SMALL, l2=1 << 12)),    # rows that outgrow the second cache
    (lambda x: F.rms_norm(x, x.shape[-1:]), (512, 256), replace(SMALL, l3=1 << 21)),    # all lies in the last cache
])
def test_pass_by_pass(function: Callable[..., Any], shape: tuple[int, ...], target: Any) -> None:
    assert not any(in_pipeline(k) for k in kernels(function, _normal(shape), target))


def test_all_memory_moves_in_one_loop() -> None:
    """The loop over columns of the loop over rows stores the result and reads each of three rows once, and asks for all lines of the next."""
    function, inputs = CASES["layer_norm"]
    kernel, = kernels(function, inputs)
    rows, = (op for op in kernel.body if op.name == "tile.for" and op["step"] == 1)
    columns, = (op for op in rows.body if op.name == "tile.for")
    names = [op.name for op in columns.body]
    assert names.count("tile.store") == 1 and names.count("tile.prefetch") == 4
    assert [op.operands[0].index for op in columns.body if op.name == "tile.load"].count(0) == 3  # type: ignore[attr-defined]
    assert kernel["grid"] == (512 // 8,)


def test_native_rows_are_the_same_bits_anywhere() -> None:
    """More than any last cache that counts; each row alone gives the bits that it has among others, whatever the number of threads."""
    x, = _normal((4 * 1024 + 13, 2112))
    w = torch.randn(2112)
    threads, results = torch.get_num_threads(), []
    compiled = torch.compile(lambda x, w: F.rms_norm(x, w.shape, w), backend="aicc", dynamic=False, options={"strict": True, "cache": False})
    try:
        with torch.no_grad():
            for n in (1, 2):
                torch.set_num_threads(n)
                results.append(compiled(x, w).clone())
            torch.testing.assert_close(results[0], F.rms_norm(x, w.shape, w))
            assert torch.equal(*results)
            x[:] = x[5].clone()
            same = compiled(x, w)
            assert torch.equal(same, results[0][5].expand_as(same))
    finally:
        torch.set_num_threads(threads)
