"""Products of a matrix with a vector on CPUs: which are reductions along the matrix's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.compiler.driver import watching
from support.stages import AVX2, GENERIC, capture, check_levels, lowered
from torch import Tensor


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=g) for s in shapes]


CASES: dict[str, tuple[Callable[..., Any], list[Tensor], bool]] = {
    "one output": (lambda x, w, b: torch.nn.functional.linear(x, w, b), _normal((37, 90), (1, 90), (1,)), True),
    "mv": (torch.mv, _normal((37, 90), (90,)), True),
    "three dimensions": (torch.matmul, _normal((3, 37, 64), (64,)), True),
    "computed": (lambda x, w: (x.tanh() @ w).sigmoid(), _normal((37, 90), (90, 1)), True),
    "half": (torch.mv, [t.bfloat16() for t in _normal((37, 90), (90,))], True),
    "batch": (lambda x, w: torch.bmm(x, w) * 2, _normal((5, 37, 64), (5, 64, 1)), True),
    "few": (torch.mv, _normal((37, 20), (20,)), False),
    "columns": (lambda x, w: x.t() @ w, _normal((90, 37), (90, 1)), False),
    "filter": (lambda x, w: torch.nn.functional.conv1d(x, w), _normal((1, 1, 200), (1, 1, 40)), False),
}


@pytest.mark.parametrize("name", CASES)
def test_which(name: str) -> None:
    function, inputs, expected = CASES[name]
    module = lowered(capture(function, inputs), AVX2, "tile")
    assert any(op.name == "tile.dot" for op in module.walk()) is not expected


def test_attention_of_one_query_keeps_its_products() -> None:
    """A stream may want them."""
    def plain(function: Callable[..., Any], *args: Tensor) -> bool:
        seen: list[Any] = []
        torch._dynamo.reset()

        def observe(_: str, done: Any, module: Any) -> None:
            seen.extend(op.attributes.get("_plain") for op in module.walk() if done is not None and done.name == "plain-reductions")

        with watching(observe=observe):
            torch.testing.assert_close(torch.compile(function, backend="aicc", options={"cache": False})(*args), function(*args))
        assert seen
        return any(seen)

    q, k, v = _normal((5, 1, 64), (5, 37, 64), (5, 37, 64))
    assert not plain(lambda q, k, v: (q @ k.transpose(1, 2)).softmax(-1) @ v, q, k, v)
    assert plain(lambda q, k, v: q @ k.transpose(1, 2), q, k, v)


def test_a_parameter_is_packed_instead() -> None:
    """One row times a layer's weight streams the packed weight."""
    layer, (x,) = torch.nn.Linear(90, 37), _normal((1, 90))
    seen: list[str] = []
    with watching(observe=lambda stage, _, module: seen.extend(op.name for op in module.walk() if stage == "tile")), torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aicc")(x), layer(x))
    assert "tile.dot" in seen


@pytest.mark.parametrize("target", [GENERIC, AVX2], ids=["generic", "avx2"])
@pytest.mark.parametrize("name", [n for n in CASES if CASES[n][2]])
def test_levels(name: str, target: Any) -> None:
    function, inputs, _ = CASES[name]
    check_levels(capture(function, inputs), target)


@pytest.mark.product
@pytest.mark.parametrize(("name", "dynamic"), [(n, d) for n in CASES for d in (False, True) if not (d and n == "filter")])
def test_against_float64(name: str, dynamic: bool) -> None:
    function, inputs, _ = CASES[name]
    result = torch.compile(function, backend="aicc", dynamic=dynamic, options={"strict": True})(*inputs)
    exact = function(*(x.double() for x in inputs))
    eager = (function(*inputs) - exact).abs().max()
    assert (result - exact).abs().max() <= max(2 * eager, 1e-6 * exact.abs().max())
