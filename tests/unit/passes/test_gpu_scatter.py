"""Scatters on GPUs: all points in parallel, into a result that starts as a copy of what is scattered into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from support.stages import CUDA, capture, check_levels, lowered
from torch import Tensor


def _rows(n: int, rows: int) -> Tensor:
    return torch.randint(0, rows, (n,), generator=torch.Generator().manual_seed(n))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "scatter_add": (lambda a, i, s: a.scatter_add(0, i, s), (_normal(10, 37), _rows(70 * 37, 10).view(70, 37), _normal(70, 37))),
    "into_zeros": (lambda i, s: torch.zeros(10, 37).index_add(0, i, s) * 2, (_rows(70, 10), _normal(70, 37))),
    "embedding": (lambda g, i: torch.ops.aten.embedding_dense_backward(g, i, 50, -1, False), (_normal(70, 33), _rows(70, 50))),
    "embedding_bf16": (lambda g, i: torch.ops.aten.embedding_dense_backward(g, i, 50, -1, False), (_normal(70, 33).bfloat16(), _rows(70, 50))),
    "cache": (lambda c, i, s: c.index_copy(2, i, s) * 2, (_normal(1, 2, 30, 16), torch.tensor([7]), _normal(1, 2, 1, 16))),
    "two_caches": (lambda a, b, i, s: (a.index_copy(1, i, s), b.index_copy(1, i, s + 1)),
                   (_normal(2, 300, 16), _normal(2, 300, 17)[..., :16].clone(), torch.tensor([7, 299]), _normal(2, 2, 16))),
    "integers": (lambda i: torch.zeros(9, dtype=torch.int64).index_add(0, i, i + 1), (_rows(300, 9),)),
    "largest": (lambda i: torch.zeros(9, dtype=torch.int64).scatter_reduce(0, i, i * 3, "amax"), (_rows(300, 9),)),
    "half": (lambda a, i, s: a.index_add(0, i, s), (_normal(10, 37).half(), _rows(70, 10), _normal(70, 37).half())),
    "products": (lambda a, i, s: a.scatter_reduce(0, i, s, "prod"), (_normal(10), _rows(70, 10), _normal(70))),
    "one_place": (lambda i: torch.zeros(1, dtype=torch.int64).index_add(0, i % 1, torch.ones_like(i)), (_rows(300, 9),)),
    "one_place_short": (lambda i: torch.zeros(1, dtype=torch.int64).index_add(0, i % 1, torch.ones_like(i)), (_rows(2, 9),)),
    "twice": (lambda a, i, s: (a.index_add(0, i, s), a + 1), (_normal(10, 37), _rows(70, 10), _normal(70, 37))),
}
ATOMIC = {"scatter_add", "into_zeros", "embedding", "embedding_bf16", "integers", "largest", "half", "one_place", "one_place_short", "twice"}


@pytest.mark.parametrize("name", CASES)
def test_levels(name: str) -> None:
    check_levels(capture(*CASES[name]), CUDA)


@pytest.mark.parametrize("name", CASES)
def test_what_is_atomic(name: str) -> None:
    module = lowered(capture(*CASES[name]), CUDA)
    assert any(op.name == "tile.store" and op["atomic"] for op in module.walk()) == (name in ATOMIC)


def test_deterministic_algorithms_run_in_order() -> None:
    target = dataclasses.replace(CUDA, features=("deterministic",))
    program = capture(*CASES["scatter_add"])
    check_levels(program, target)
    assert not any(op.name == "tile.store" and op["atomic"] for op in lowered(program, target).walk())


def _host(name: str) -> list[str]:
    module = lowered(capture(*CASES[name]), CUDA)
    run_pipeline(module, parse_pipeline(pipeline("host", CUDA, Options())), PassContext(CUDA))
    return [op.name for f in module.body if f.name == "func" for op in f.body]


def test_zeros_are_made_where_the_result_goes() -> None:
    assert [n for n in _host("embedding") if n != "host.alloc"] == ["host.launch", "host.launch", "return"]


def test_an_argument_is_copied_first() -> None:
    assert _host("scatter_add") == ["host.copy", "host.launch", "return"]
