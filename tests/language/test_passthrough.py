"""Which programs are called without AOTAutograd's wrapper, and that nothing is lost by it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.compiler import dynamo
from aicc.compiler.driver import Compilation, watching
from aicc.compiler.passthrough import without_wrapper


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each captured inference graph, whether its wrapper was left out."""
    seen: list[bool] = []

    def spy(wrapped: Callable[..., Any], made: Any, inputs: Any) -> Callable[..., Any]:
        chosen = without_wrapper(wrapped, made, inputs)
        seen.append(chosen is not wrapped)
        return chosen

    monkeypatch.setattr(dynamo, "without_wrapper", spy)
    return seen


def _write(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.add_(y)
    return x * 2


CASES: dict[str, tuple[Callable[..., Any], bool]] = {
    "plain": (lambda x, y: (x @ y).relu(), True),
    "two results": (lambda x, y: (x + y, x * y), True),
    "equal results": (lambda x, y: [x + y] * 2, True),
    "a number and none": (lambda x, y: (x + y, 3, None), True),
    "view of an input": (lambda x, y: (x + y, x.t()), False),
    "an input": (lambda x, y: (x + y, y), True),  # Dynamo returns it by itself
    "two views": (lambda x, y: (x + y).unbind(), False),
    "written": (_write, False),
    "an operator of torch's": (lambda x, y: (x + y, torch.linalg.inv(x)), False),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_wrapper_is_left_out_where_it_does_nothing(name: str, bare: list[bool]) -> None:
    function, expected = CASES[name]
    x, y = torch.randn(4, 4) + 4 * torch.eye(4), torch.randn(4, 4)
    compiled = torch.compile(function, backend="aicc")
    for _ in range(3):
        a, b = x.clone(), x.clone()
        torch.testing.assert_close(compiled(a, y), function(b, y))
        assert torch.equal(a, b)
    assert bare == [expected]


@torch.no_grad()
def test_one_tensor_given_twice(bare: list[bool]) -> None:
    compiled = torch.compile(lambda x, y: x @ y, backend="aicc")
    x = torch.randn(4, 4)
    torch.testing.assert_close(compiled(x, x), x @ x)
    torch.testing.assert_close(compiled(x, x + 1), x @ (x + 1))


@torch.no_grad()
def test_sizes_as_arguments(bare: list[bool]) -> None:
    compiled = torch.compile(lambda x, n: x * n + x.shape[0], backend="aicc", dynamic=True)
    for n in (3, 5, 8):
        x = torch.randn(n, 4)
        torch.testing.assert_close(compiled(x, n), x * n + n)
    assert len(bare) == 1


def test_gradients_and_grad_mode(bare: list[bool]) -> None:
    """With a gradient there is no inference graph; without, results carry none, whatever the mode."""
    w, x = torch.nn.Parameter(torch.randn(4, 4)), torch.randn(4, 4)
    compiled = torch.compile(lambda a, b: a @ b, backend="aicc")
    compiled(x, w).sum().backward()
    assert w.grad is not None and not any(bare)
    plain = compiled(x, x)
    assert bare[-1] and not plain.requires_grad
    with torch.no_grad():
        assert not compiled(x, w).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x, x), x @ x)


def test_packed_memory_of_inference_tensors_is_used_again() -> None:
    """They are packed in every call, into the same memory."""
    found: list[Compilation] = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        layer, x = torch.nn.Linear(64, 64), torch.randn(8, 64)
        compiled = torch.compile(layer, backend="aicc")
        with watching(compiled=found.append):
            compiled(x)
        assert found[0].graph is not None
        memory = found[0].graph._packed
        assert memory is not None
        places = []
        for _ in range(4):
            torch.testing.assert_close(compiled(x), layer(x))
            assert memory.current is not None
            places.append(memory.current.pointers)
    assert all(p == places[0] for p in places)
