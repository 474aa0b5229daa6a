"""Norms of rows that outgrow the caches: one loop does the last pass of a row and the earlier ones of the next rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.ir import Operation
from aicc.ir.interpreter import interpret
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
    "deviations": (lambda x: x - (x - x.mean(-1, keepdim=True)).abs().mean(-1, keepdim=True), _normal((514, 256))),
    "mean_and_variance": (lambda x: torch.var_mean(F.layer_norm(x, (256,)), -1), _normal((522, 256))),
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


def _rows_side_by_side(kernel: Operation) -> bool:
    return any(op.name == "tile.for" and any(x.name == "tile.for" for x in op.body) and op["step"] == 2 for op in kernel.body)


@pytest.mark.parametrize("name", ["layer_norm", "ragged_rows", "one_row_left", "kept_through_two_stages", "batches", "bf16", "f64"])
def test_two_rows_side_by_side(name: str) -> None:
    """Where the weights do not stay in the first cache."""
    function, inputs = CASES[name]
    target = replace(SMALL, l1=1 << 10)
    program = capture(function, inputs)
    check_levels(program, target, levels=("tile",))
    found = [op for op in lowered(program, target, "tile").body if op.name == "tile.kernel"]
    assert any(_rows_side_by_side(k) for k in found) == (len(inputs) > 1)  # the others have no weights


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


@pytest.mark.parametrize("name,passes", [("layer_norm", 2), ("rms_norm", 2), ("minimum", 2), ("deviations", 3)])
def test_all_memory_moves_in_one_loop(name: str, passes: int) -> None:
    """The loop over columns of the loop over rows stores the result and reads each of the rows under way once, and asks for all lines of the next."""
    function, inputs = CASES[name]
    kernel, = kernels(function, inputs)
    rows, = (op for op in kernel.body if op.name == "tile.for" and op["step"] == 1)
    columns, = (op for op in rows.body if op.name == "tile.for")
    names = [op.name for op in columns.body]
    assert names.count("tile.store") == 1 and names.count("tile.prefetch") == 4
    assert [op.operands[0].index for op in columns.body if op.name == "tile.load"].count(0) == passes  # type: ignore[attr-defined]
    assert kernel["grid"] == (-(-inputs[0].shape[0] // 8),)


def _odd_rows(width: int) -> Tensor:
    """Rows whose mean is far from zero, from their spread, or from their first elements."""
    x, = _normal((520, width))
    x[::8] += 1e4
    x[1::8, 0] = 1e3
    x[2::8, :64] += 1e3
    x[3::8] = 7.7
    x[4::8, -1] = 1e4
    x[5::8] *= 1e-6
    x[6::8, :64] = -3e4
    return x


@pytest.mark.parametrize("width", [256, 288, 2048])
def test_variances_of_odd_rows(width: int) -> None:
    """The error of the row's sum of squares is a few roundings of it, and grows with what is summed about the wrong number by at most the bound of
    `moments.py`; equal elements have none."""
    x = _odd_rows(width)
    program = capture(lambda x: (*torch.var_mean(x, -1, correction=0), F.layer_norm(x, x.shape[-1:])), [x])
    module = lowered(program, SMALL, "tile")
    assert any(in_pipeline(op) for op in module.body if op.name == "tile.kernel")
    *_, normal = interpret(module, [x])
    exact = F.layer_norm(x.double(), x.shape[-1:])
    largest = exact.abs().amax(-1).clamp(min=1)
    error = (normal.double() - exact).abs().amax(-1) / largest
    eager = (F.layer_norm(x, x.shape[-1:]).double() - exact).abs().amax(-1) / largest
    blocks = torch.zeros(520, dtype=torch.bool)
    blocks[2::8] = blocks[6::8] = True
    assert bool((error <= 4 * eager + 5e-7)[~blocks].all()), error
    assert bool((error <= 4 * eager + 1.2e-7 * (width / 32 + 1))[blocks].all()), error[blocks]
    assert bool((normal[3::8] == 0).all())


def test_what_is_no_number_stays_in_its_row() -> None:
    x, = _normal((520, 256))
    x[3, 5], x[9, 200], x[11, 0], x[-1, 255] = float("nan"), float("inf"), float("-inf"), float("nan")
    program = capture(lambda x: F.layer_norm(x, (256,)), [x])
    check_levels(program, SMALL)


@pytest.mark.parametrize("function,rows,width", [
    (lambda x, w: F.rms_norm(x, w.shape, w), 4 * 1024 + 13, 2112),
    (lambda x, w: F.layer_norm(x, w.shape, w, w + 1), 2 * 1024 + 13, 8256),  # two rows side by side
])
def test_native_rows_are_the_same_bits_anywhere(function: Callable[..., Any], rows: int, width: int) -> None:
    """More than any last cache that counts; each row alone gives the bits that it has among others, whatever the number of threads."""
    x, = _normal((rows, width))
    w = torch.randn(width)
    threads, results = torch.get_num_threads(), []
    compiled = torch.compile(function, backend="aicc", dynamic=False, options={"strict": True, "cache": False})
    try:
        with torch.no_grad():
            for n in (1, 2):
                torch.set_num_threads(n)
                results.append(compiled(x, w).clone())
            torch.testing.assert_close(results[0], function(x, w))
            assert torch.equal(*results)
            x[:] = x[5].clone()
            same = compiled(x, w)
            assert torch.equal(same, results[0][5].expand_as(same))
    finally:
        torch.set_num_threads(threads)
