"""Concatenations on GPUs: each part is read only where it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.ir import Operation
from support.stages import CUDA, capture, check_levels, lowered
from torch import Tensor


def _heads(*xs: Tensor) -> Tensor:
    return torch.stack(xs, 0).permute(1, 3, 0, 2, 4).contiguous()


def _rotated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * 2 + torch.cat([-b, a], -1).sin()


def _both(x: Tensor) -> Tensor:
    """One load serves both sides: nothing is masked."""
    return torch.where(torch.arange(x.shape[-1]) < 40, x, x * 2)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


CASES: dict[str, tuple[Callable[..., Any], list[Tensor], int]] = {
    "stack": (_heads, [_normal(2, 3, 70, 64), _normal(2, 3, 70, 64), _normal(2, 3, 70, 64)], 3),
    "columns": (lambda a, b, c: torch.cat([a, b, c], -1).float() * 3, [_normal(40, 64), _normal(40, 96), _normal(40, 30)], 3),
    "rows": (lambda a, b: torch.cat([a.t(), b.t()]).relu(), [_normal(40, 64), _normal(40, 96)], 2),
    "rotated": (_rotated, [_normal(2, 50, 64)], 2),
    "both": (_both, [_normal(3, 70)], 0),
}


def _masked(kernel: Operation) -> int:
    """Loads with a mask of which a choice by position is the only reader, by way of conversions."""
    count = 0
    for op in kernel.walk():
        if op.name == "tile.load" and len(op.result.uses) == 1 and (op["mask"] or op["mask_low"]):
            v = op.result
            while v.users[0].name in ("arith.cast", "arith.neg") and len(v.uses) == 1:
                v = v.users[0].result
            count += v.users[0].name == "arith.select"
    return count


@pytest.mark.parametrize("name", CASES)
def test_parts_are_read_where_they_are_wanted(name: str) -> None:
    function, inputs, wanted = CASES[name]
    program = capture(function, inputs)
    assert sum(_masked(op) for op in lowered(program, CUDA).body if op.name == "tile.kernel") == wanted
    check_levels(program, CUDA, levels=("tile",))
