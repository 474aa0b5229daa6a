"""When a bound of the scores stands for the running maximum of a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from aicc.ir import Operation
from aicc.passes.score_bound import bound_of
from aicc.passes.stream import analyse
from torch import Tensor

from ...gpu.cases import SM90, capture


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / 8


def attention(change: Callable[[Tensor], Tensor], finish: Callable[[Tensor, Tensor], Tensor] = lambda s, v: s.softmax(-1) @ v) -> Callable[..., Tensor]:
    return lambda q, k, v: finish(change(scores(q, k)), v)


def bounds(f: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16) -> list[float | None]:
    """Of the maxima of the one stream of `f`."""
    found: list[float | None] = []

    def run(module: Operation, gm: torch.fx.GraphModule, args: list[object]) -> object:
        for op in module.walk():
            stream = analyse([m for m in op.body if m.name != "tensor.yield"]) if op.name == "tensor.fused" else None
            if stream is not None:
                found.extend(bound_of(stream, r) for r in stream.reductions if r.result in stream.shifts.values())
        return gm.forward(*args)

    capture(f, [torch.randn(4, 2, 256, 64).to(dtype) for _ in range(3)], run, until="tensor", target=SM90)
    return found


def masked(s: Tensor) -> Tensor:
    return s.masked_fill(torch.ones(256, 256, dtype=torch.bool).triu(1), -math.inf)


def unnormalised(s: Tensor, v: Tensor) -> Tensor:
    return (s - s.amax(-1, keepdim=True)).exp() @ v


@pytest.mark.parametrize(("change", "least", "most"), [
    (lambda s: 30 * torch.tanh(s / 30), 30, 31), (lambda s: 5 * torch.sigmoid(s) - 1, 6, 6.2), (lambda s: masked(20 * torch.tanh(s)), 20, 20.5)])
def test_bounded_scores(change: Callable[[Tensor], Tensor], least: float, most: float) -> None:
    bound, = bounds(attention(change))
    assert bound is not None and least <= bound <= most


@pytest.mark.parametrize("f", [
    attention(lambda s: s), attention(masked), attention(lambda s: 100 * torch.tanh(s)), attention(lambda s: torch.tanh(s) * s),
    attention(lambda s: -masked(torch.tanh(s))), attention(lambda s: 30 * torch.tanh(s), unnormalised)],
    ids=["any", "masked", "too large", "times the score", "plus infinity", "not a quotient"])
def test_the_maximum_is_needed(f: Callable[..., Tensor]) -> None:
    assert bounds(f) in ([None], [])


def test_half_precision_keeps_the_maximum() -> None:
    assert bounds(attention(lambda s: 30 * torch.tanh(s / 30)), torch.float16) == [None]
