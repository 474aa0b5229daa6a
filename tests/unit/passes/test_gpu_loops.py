"""Kernels of loops on GPUs: softmax in one pass over long rows, transposing tiles, and identities of constants of 16 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.stages import CUDA, capture, check_levels, lowered, shaped
from torch import Tensor

NEVER = float("-inf")


def _normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [(torch.randn(s, generator=g) * 3).to(dtype) for s in shapes]


def _odd() -> list[Tensor]:
    x, = _normal((6, 9000))
    x[1] = NEVER
    x[2, 5000], x[3, 8999], x[4, :8000] = float("nan"), float("inf"), NEVER
    return [x]


def _infinite() -> list[Tensor]:
    """Rows with an infinity: in a lane's first element, behind it, in the last lane; with both, or a NaN, in one lane or in several."""
    x, = _normal((8, 40000))
    inf = float("inf")
    x[0, 39000], x[1, 39999], x[2, 0], x[3, 5] = inf, -inf, inf, -inf
    x[4, 0], x[4, 8192], x[5, 7], x[5, 39000], x[6, 3], x[6, 38007] = inf, inf, inf, -inf, float("nan"), -inf
    return [x]


def shifted_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a row of -inf, eager's sum of exp(-inf + inf) is NaN."""
    m = x.amax(-1, keepdim=True)
    return torch.exp(x - m).sum(-1), m


def guarded_sum(x: Tensor) -> Tensor:
    return torch.where(x == NEVER, 0.0, torch.exp(x - x.amax(-1, keepdim=True))).sum(-1)


LONG: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "softmax": (lambda x: x.softmax(-1), _normal((3, 9000))),
    "softmax_bf16": (lambda x: x.softmax(-1), _normal((3, 20000), dtype=torch.bfloat16)),
    "unaligned_bf16": (lambda x: x.softmax(-1), _normal((3, 20001), dtype=torch.bfloat16)),
    "quotients_bf16": (lambda x: x / x.abs().amax(-1, keepdim=True), _normal((3, 700), dtype=torch.bfloat16)),
    "log_softmax": (lambda x: x.log_softmax(-1), _normal((3, 20000))),
    "logsumexp": (lambda x: x.logsumexp(-1), _normal((3, 9000))),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.arange(3)), _normal((3, 9000))),
    "masked": (lambda x: torch.where(x > 1, x, NEVER).softmax(-1), _normal((3, 9000))),
    "odd": (lambda x: x.softmax(-1), _odd()),
    "shifted_sum": (shifted_sum, _odd()),
    "guarded_sum": (guarded_sum, _odd()),
    "column": (lambda x: x.softmax(1), _normal((2, 300, 40))),
    "column_odd": (lambda x: x.t().softmax(0), _odd()),
    "scaled": (lambda x: (x / 7).softmax(-1) * x, _normal((3, 9000))),
}


@pytest.mark.parametrize("name", LONG)
def test_long_rows(name: str) -> None:
    check_levels(capture(*LONG[name]), CUDA)


def test_softmax_reads_a_long_row_twice() -> None:
    module = lowered(capture(lambda x: x.softmax(-1), _normal((3, 9000))), CUDA)
    assert sum(op.name == "tile.for" for op in module.walk()) == 2


@pytest.mark.parametrize(("dtype", "neighbours"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_no_step_of_a_long_row_waits_for_other_threads(dtype: torch.dtype, neighbours: int) -> None:
    module = lowered(shaped(lambda x: x.softmax(-1), (300, 40000), dtype=dtype), CUDA)
    loop = next(op for op in module.walk() if op.name == "tile.for")
    assert [op.operands[0].type.shape[1] for op in loop.walk() if op.name == "tile.reduce"] == [neighbours, neighbours]


TRANSPOSED: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "add": (lambda a, b: a.t() + b, _normal((100, 130), (130, 100))),
    "copy": (lambda a: a.permute(0, 2, 1).contiguous() * 2, _normal((3, 65, 70))),
    "four": (lambda a, b: a.permute(0, 2, 1, 3).contiguous() + b.transpose(1, 3), _normal((2, 3, 64, 64), (2, 64, 3, 64))),
    "narrow": (lambda a, b: a.t() + b, _normal((5, 130), (130, 5))),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name: str, dynamic: bool) -> None:
    check_levels(capture(*TRANSPOSED[name], dynamic=dynamic), CUDA)


def test_a_transposing_kernel_has_square_tiles() -> None:
    module = lowered(capture(*TRANSPOSED["add"]), CUDA)
    assert {tuple(op["shape"]) for op in module.walk() if op.name == "tile.load"} == {(64, 64)}


HALF = torch.float16
CONSTANTS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "power_of_two": (lambda x: (x / 8, x / -0.25, x / 2**20, x / 3), _normal((70,))),
    "power_of_two_small": (lambda x: (x * 2e-38 / 8, x / float("inf"), x / 2**-14), _normal((70,))),
    "power_of_two_f16": (lambda x: (x / 8, x * 1e-6 / 4), _normal((70,), dtype=HALF)),
    # In f16, -1e9 is -inf: a row of it has no softmax.
    "mask_too_large": (lambda x: torch.where(torch.arange(4)[:, None] < 2, -1e9, x).softmax(-1), _normal((4, 70), dtype=HALF)),
    "mask_bf16": (lambda x: torch.where(torch.arange(4)[:, None] < 2, -3e38, x * 2).softmax(-1), _normal((4, 70), dtype=torch.bfloat16)),
    "fraction_bf16": (lambda x: torch.where(x > 0, 0.1, x * 2).float() * 1000, _normal((70,), dtype=torch.bfloat16)),
    "choice": (lambda x: torch.where(x > 0, True, False), _normal((70,))),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name: str) -> None:
    check_levels(capture(*CONSTANTS[name]), CUDA)


FEW = dataclasses.replace(CUDA, multiprocessors=4)
MOMENTS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "ragged": (lambda x: torch.var_mean(x + 50, 1), _normal((3, 9000))),
    "whole_tiles": (lambda x: (x + 50).var(1, correction=0), _normal((3, 12288))),
    "bf16": (lambda x: x.float().var(1), _normal((3, 9000), dtype=torch.bfloat16)),
    "layer_norm": (lambda x: F.layer_norm(x, (9000,)), _normal((3, 9000))),
    "channels": (lambda x: torch.var_mean(x, (0, 2)), _normal((40, 7, 300))),
    "nan": (lambda x: x.var(1), _odd()),
    "infinite": (lambda x: (x.var(1), x.mean(1)), _infinite()),
    "infinite_bf16": (lambda x: (x.var(1), x.mean(1)), [x.bfloat16() for x in _infinite()]),
    "infinite_channels": (lambda x: (x.var((0, 2)), x.mean((0, 2))), [_infinite()[0].reshape(8, 4, 10000).transpose(0, 1)]),
    "another_mean": (lambda x: (x - (x * 2).mean(1, keepdim=True)).square().sum(1), _normal((3, 9000))),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments(name: str) -> None:
    check_levels(capture(*MOMENTS[name]), FEW)


@pytest.mark.parametrize(("name", "loops"), [("ragged", 1), ("layer_norm", 2), ("another_mean", 2)])
def test_mean_and_squares_are_one_pass(name: str, loops: int) -> None:
    module = lowered(capture(*MOMENTS[name]), FEW)
    assert sum(op.name == "tile.for" for op in module.walk()) == loops


def _group_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 8, w, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_one_kernel(dtype: torch.dtype) -> None:
    program = capture(_group_norm, _normal((8, 16, 20, 33), (16,), (16,), dtype=dtype))
    check_levels(program, FEW)
    assert [op.name for op in lowered(program, FEW).body] == ["tile.kernel", "func"]


def test_few_groups_are_normalised_by_all_multiprocessors() -> None:
    program = capture(_group_norm, _normal((1, 16, 20, 33), (16,), (16,)))
    check_levels(program, CUDA)
    assert [op.name for op in lowered(program, CUDA).body].count("tile.kernel") == 2


H100 = dataclasses.replace(CUDA, l2=50 << 20)


def tiles(f: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> set[Any]:
    """Shapes of the tiles that are read, and warps, of f's one kernel."""
    (kernel,) = [op for op in lowered(shaped(f, *shapes, dtype=dtype), H100).walk() if op.name == "tile.kernel"]
    return {(*op["shape"], kernel["num_warps"]) for op in kernel.walk() if op.name == "tile.load" and op["shape"]}


F32 = torch.float32
ROWS: dict[str, tuple[tuple[int, int], torch.dtype, set[Any]]] = {
    "two loads of 16 bytes for each of 128 threads": ((4096, 1024), torch.bfloat16, {(2, 1024, 4)}),
    "of 4 bytes": ((4096, 1024), F32, {(1, 1024, 4)}),
    "short": ((4096, 256), torch.bfloat16, {(8, 256, 4)}),
    "few rows": ((64, 256), torch.bfloat16, {(1, 256, 1)}),
    "long, in registers": ((4096, 8192), torch.bfloat16, {(1, 8192, 8)}),
    "longer, which is read twice": ((4096, 30000), torch.bfloat16, {(1, 4096, 16)}),
    "so long that few rows stay in the cache": ((4096, 40000), F32, {(1, 16384, 8)}),
}


@pytest.mark.parametrize("name", ROWS)
def test_tiles_of_rows(name: str) -> None:
    shape, dtype, wanted = ROWS[name]
    assert tiles(lambda x: x.softmax(-1), shape, dtype=dtype) == wanted


def test_rows_that_are_read_once_are_walked_in_long_steps() -> None:
    program = shaped(lambda x: x.float().exp().sum(-1), (4096, 40000), dtype=torch.bfloat16)
    assert {op["shape"] for op in lowered(program, CUDA).walk() if op.name == "tile.load"} == {(1, 8192)}
    assert tiles(lambda x: x.float().sum(-1), (4096, 40000)) == {(1, 4096, 16)}
    assert tiles(lambda x: x.sum(-1), (4096, 40000), dtype=F32) == {(1, 8192, 16)}


@pytest.mark.parametrize(("f", "wanted"), [(lambda x: x.relu(), (1, 2048, 4)), (lambda x: F.gelu(x), (1, 4096, 4))])
def test_functions_have_more_under_way(f: Callable[..., Any], wanted: Any) -> None:
    assert tiles(f, (1 << 24,)) == {wanted}


def test_steps_of_moments_are_under_way_together() -> None:
    module = lowered(shaped(lambda x: F.layer_norm(x, (40000,)), (600, 40000), dtype=torch.bfloat16), CUDA)
    assert [op["unroll"] for op in module.walk() if op.name == "tile.for"] == [4, 4]
