"""Tiling: small programs of every kernel family through the whole pipeline, interpreted at tile level with poisoned outputs, race
detection and bounds checks, and compared with eager.

`CASES` is the table. Each runs on four kinds of target, with static and with symbolic sizes, so that every emitter path (vector of
2 to 16 lanes, register tiles of several shapes, GPU blocks) meets ragged edges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.stages import EXACT_CASTS, TARGETS, capture, check_levels

Make = Callable[[], tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]


def R(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape)


CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[torch.Tensor, ...]]]] = {
    # pointwise, views and copies
    "transpose": (lambda x, y: x.t() + y, lambda: (R(33, 20), R(20, 33))),
    "where_tril": (lambda x: torch.where(x > 0, x, x * 0.1).tril(), lambda: (R(14, 61),)),
    "pad": (lambda x: F.pad(x, (1, 2)) + 1, lambda: (R(14, 61),)),
    "pad_crop": (lambda x: F.pad(x, (-1, 2, 3, -2), value=4.0) * 2, lambda: (R(14, 9),)),
    "cat": (lambda x, y: torch.cat([x, y * 2], 1), lambda: (R(3, 5), R(3, 7))),
    "cat_three": (lambda x, y: torch.cat([x, y, x.sin()], 0).relu(), lambda: (R(3, 5), R(4, 5))),
    "flip_slice": (lambda x: x.flip(0)[1:, ::3] * 2, lambda: (R(7, 20),)),
    "expand_permute": (lambda x: x[:, None].expand(4, 5, 6).permute(2, 0, 1) + 1, lambda: (R(4, 6),)),
    "roll": (lambda x: x.roll((2, -1), (0, 1)), lambda: (R(5, 9),)),
    "scalar": (lambda x: x * 2 + 1, lambda: (R(),)),
    "outputs": (lambda x, y: (x + y, x * y, (x + y).t()), lambda: (R(5, 18), R(18))),
    # reductions
    "softmax": (lambda x: torch.softmax(x, -1), lambda: (R(5, 200),)),
    "softmax0": (lambda x: torch.softmax(x, 0), lambda: (R(5, 200),)),
    "softmax1": (lambda x: torch.softmax(x, 1), lambda: (R(3, 17, 20),)),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), lambda: (R(5, 70),)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (70,), w, b), lambda: (R(3, 4, 70), R(70), R(70))),
    "rms_norm": (lambda x, r, w: F.rms_norm(x + r, (70,), w) + x, lambda: (R(3, 70), R(3, 70), R(70))),
    "sum0": (lambda x: (x * 2).sum(0), lambda: (R(37, 70),)),
    "sum1_keep": (lambda x: x - x.sum(1, keepdim=True), lambda: (R(37, 19),)),
    "sum_all": (lambda x: x.exp().sum(), lambda: (R(37, 70),)),
    "sum_middle": (lambda x: x.sum((0, 2)), lambda: (R(4, 5, 18),)),
    "prod": (lambda x: x.prod(1), lambda: (R(5, 9),)),
    "amax_amin": (lambda x: (x.amax(0), x.amin(1)), lambda: (R(9, 21),)),
    "argmax": (lambda x: x.argmax(-1), lambda: (R(37, 70),)),
    "argmin0": (lambda x: x.argmin(0), lambda: (R(37, 21),)),
    "argmax_all": (lambda x: x.argmax(), lambda: (R(7, 70),)),
    "max": (lambda x: x.max(1), lambda: (R(7, 70),)),
    "any_all": (lambda x: ((x > 1).any(1), (x < 1).all(0)), lambda: (R(7, 21),)),
    "var_mean": (lambda x: torch.var_mean(x, (0, 2, 3)), lambda: (R(4, 6, 9, 11),)),
    "group_norm": (lambda x: F.group_norm(x, 2), lambda: (R(4, 6, 9, 11),)),
    "cross_entropy": (F.cross_entropy, lambda: (R(14, 61), ints(61, 14))),
    "logsumexp": (lambda x: x.logsumexp(1), lambda: (R(5, 70),)),
    "norms_of_both": (lambda x: (x / x.sum(0, keepdim=True).abs().clamp(min=1)).sum(1), lambda: (R(9, 17),)),
    # scans, gathers and scatters
    "cumsum": (lambda x: x.cumsum(1), lambda: (R(7, 20),)),
    "cumsum0": (lambda x: x.cumsum(0), lambda: (R(7, 20),)),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), lambda: (R(7, 20),)),
    "embedding": (lambda w, i: F.embedding(i, w), lambda: (R(50, 20), ints(50, 3, 4))),
    "gather": (lambda x, i: x.gather(1, i) + 1, lambda: (R(6, 9), ints(9, 6, 4))),
    "index": (lambda x, i, j: x[i, j] * 2, lambda: (R(6, 9), ints(6, 5), ints(9, 5))),
    "scatter_add": (lambda x, i, s: torch.scatter_add(x, 1, i, s), lambda: (R(6, 9), ints(9, 6, 20), R(6, 20))),
    "index_put": (lambda x, i, s: torch.index_put(x, (i,), s, accumulate=True), lambda: (R(6, 9), ints(6, 20), R(20, 9))),
    "index_add": (lambda x, i, s: x.index_add(1, i, s), lambda: (R(6, 9), ints(9, 20), R(6, 20))),
    # contractions
    "matmul": (lambda x, y: F.gelu(x @ y + 1), lambda: (R(37, 45), R(45, 50))),
    "matmul_t": (lambda x, y: x.t() @ y.t(), lambda: (R(45, 37), R(50, 45))),
    "bmm": (lambda x, y: x @ y.transpose(-1, -2), lambda: (R(2, 3, 17, 24), R(2, 3, 19, 24))),
    "linear": (lambda x, w, b, r: F.linear(x, w, b).relu() + r, lambda: (R(2, 9, 20), R(33, 20), R(33), R(2, 9, 33))),
    "matvec": (lambda x, y: x @ y, lambda: (R(14, 61), R(61))),
    "outer": (lambda x, y: torch.outer(x, y) + 1, lambda: (R(14), R(33))),
    "conv": (lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=1, stride=2)), lambda: (R(2, 3, 9, 11), R(20, 3, 3, 3), R(20))),
    "conv1x1": (lambda x, w: F.conv2d(x, w), lambda: (R(2, 3, 5, 7), R(9, 3, 1, 1))),
    "conv_groups": (lambda x, w: F.conv2d(x, w, groups=2, dilation=2), lambda: (R(1, 4, 9, 8), R(6, 2, 3, 3))),
    "conv_transpose": (lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), lambda: (R(1, 4, 5, 6), R(4, 3, 3, 3))),
    "depthwise": (lambda x, w: F.conv2d(x, w, padding=1, groups=6), lambda: (R(2, 6, 9, 11), R(6, 1, 3, 3))),
    "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), lambda: (R(2, 6, 9, 11),)),
    "avg_pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), lambda: (R(2, 3, 9, 11),)),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), lambda: (R(2, 2, 9, 16), R(2, 2, 9, 16), R(2, 2, 9, 16))),
}
NEEDS_STATIC = {"expand_permute", "layer_norm", "rms_norm"}  # sizes written out in the function


@pytest.mark.product
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, dynamic: bool) -> None:
    if dynamic and name in NEEDS_STATIC:
        return
    torch.manual_seed(0)
    fn, make = CASES[name]
    program = capture(fn, make(), dynamic=dynamic)
    for target in TARGETS.values():
        check_levels(program, target, levels=["tile"])


RAGGED: dict[str, Callable[[torch.Tensor], Any]] = {
    "pointwise": lambda x: x * 2 + x.t().contiguous().t(),
    "rows": lambda x: x.softmax(1) if x.is_floating_point() else x.sum(1),
    "columns": lambda x: x.sum(0),
    "all": lambda x: x.sum(),
    "scan": lambda x: x.cumsum(1),
    "matmul": lambda x: x @ x.t(),
    "best": lambda x: x.amax(1) if 0 not in x.shape else x + 1,
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_sizes(name: str) -> None:
    torch.manual_seed(0)
    for n in (0, 1, 2, 3, 17, 63, 64, 65):
        for shape in ((2, n), (n, 3)):
            program = capture(RAGGED[name], (R(*shape),))
            for target in TARGETS.values():
                check_levels(program, target, levels=["tile"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool, *(
    pytest.param(t, marks=pytest.mark.slow) for t in (torch.float16, torch.int32, torch.uint8))], ids=str)
def test_element_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = ints(2, 5, 37).bool() if dtype == torch.bool else (R(5, 37) * 4).abs().to(dtype)
    functions: dict[str, Callable[..., Any]] = {
        "reductions": lambda x: (x.sum(1), x.amax(0), x.amin(1)),
        "select": lambda x: torch.where(x > 1, x, torch.zeros_like(x)),
        "casts": lambda x: (x.float() * 2, x.bool(), x.to(torch.int32)),
        "views": lambda x: torch.cat([x.t(), x.t().flip(0)], 1),
    }
    if dtype != torch.bool:
        functions |= {"arithmetic": lambda x: (x * x + 3, x.argmax(1), x.cumsum(1), x.max(0))}
    if dtype.is_floating_point:
        functions |= {"softmax": lambda x: (x.softmax(-1), x.softmax(0), x.mean(1))}
    if dtype not in (torch.bool, torch.uint8):
        functions |= {"matmul": lambda x: x @ x.t()}
    for name, fn in functions.items():
        program = capture(fn, (x,))
        for target in TARGETS.values():
            try:
                check_levels(program, target, options=EXACT_CASTS)
            except Exception as e:
                e.add_note(f"case {name}")
                raise


@pytest.mark.parametrize("values", [(float("nan"),), (float("inf"),), (float("-inf"), float("nan"))], ids=str)
def test_special_values(values: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    x = R(6, 37)
    for i, v in enumerate(values):
        x[i::3, (5 * i) % 37::7] = v
    fns = (lambda x: (x.amax(1), x.amin(0), x.argmax(1), x.argmin(0), x.sum(1), x.relu(), x.clamp(-1, 1), x.max(1)),
           lambda x: (x.softmax(1), x.logsumexp(0), x.exp(), x.isnan(), x > 0, x.sign()))
    for fn in fns:
        program = capture(fn, (x,))
        for target in TARGETS.values():
            check_levels(program, target, levels=["tile"])
