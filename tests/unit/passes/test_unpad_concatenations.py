"""Concatenations that are read periodically, against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.stages import CUDA, capture, check_levels, lowered
from torch import Tensor


def _normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


CASES: dict[str, tuple[Callable[..., Any], list[Tensor], int | None]] = {
    "rope": (rope, _normal((2, 3, 20, 32), (20, 32), (20, 32)), 1),
    "rope_bf16": (rope, _normal((2, 3, 20, 32), (20, 32), (20, 32), dtype=torch.bfloat16), 1),
    "first_dim": (lambda a, b: torch.cat([a, b]) * 2, _normal((3, 5), (3, 5)), 1),
    "made_parts": (lambda a, b: torch.cat([a.exp(), b.sin()], 1) + 1, _normal((3, 5), (3, 5)), 3),
    "one_twice": (lambda a: torch.cat([a, a + 1, a], 1), _normal((3, 5)), 1),
    "stack": (lambda a, b: torch.stack([a.exp(), b], 1) + 1, _normal((3, 5), (3, 5)), 1),
    "nested": (lambda a, b: torch.cat([torch.cat([a, b], 1), torch.cat([b, a], 1)], 0), _normal((3, 4), (3, 4)), None),
    "then_reduced": (lambda a, b: torch.cat([a, b], 1).sum(1), _normal((3, 5), (3, 5)), None),
    "then_multiplied": (lambda a, b, c: torch.cat([a, b], 1) @ c, _normal((6, 5), (6, 5), (10, 7)), None),
    "nan_beside": (lambda a, b: torch.cat([a / 0, b], 1), _normal((3, 5), (3, 5)), 1),
    "unequal": (lambda a, b: torch.cat([a, b]) * 2, _normal((3, 5), (4, 5)), None),
    "many": (lambda *xs: torch.cat(xs, 1), _normal(*[(3, 5)] * 6), None),
}


@pytest.mark.parametrize("name", CASES)
def test_concatenation(name: str) -> None:
    function, inputs, kernels = CASES[name]
    program = capture(function, inputs)
    if kernels is not None:
        assert sum(op.name == "tensor.fused" for op in lowered(program, CUDA, "tensor").walk()) == kernels
    check_levels(program, CUDA)


def test_symbols_stay_padded() -> None:
    check_levels(capture(lambda a, b: torch.cat([a, b], 1) * 2, _normal((3, 5), (3, 5)), dynamic=True), CUDA)
