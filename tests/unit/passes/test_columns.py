"""Reductions over rows on CPUs: many columns at once, several rows at a time, and in parts for several threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.stages import AVX2, GENERIC, capture, check_levels, lowered
from torch import Tensor


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=g) for s in shapes]


CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "sum": (lambda x: x.sum(0), _normal((100, 200))),
    "ragged": (lambda x: x.sum(0), _normal((101, 131))),
    "wider_than_a_program": (lambda x: x.sum(0), _normal((9, 4200))),
    "spans": (lambda x: x.sum(0), _normal((1100, 70))),
    "two_inner": (lambda x: x.sum((0, 1)), _normal((5, 19, 140))),
    "outer_and_inner": (lambda x: x.sum(1), _normal((3, 50, 140))),
    "computed": (lambda x, y: (x * y).exp().mean(0) * 2 + 1, _normal((33, 90), (33, 90))),
    "several": (lambda x: (x.amax(0), x.sum(0), (x > 1).any(0)), _normal((40, 90))),
    "shifted": (lambda x, m: (x - m).abs().sum(0) + m, _normal((40, 90), (90,))),
    "integers": (lambda x: x.sum(0), [torch.arange(50 * 80).reshape(50, 80)]),
}


@pytest.mark.product
@pytest.mark.parametrize("target", [GENERIC, AVX2], ids=["generic", "avx2"])
@pytest.mark.parametrize("name", CASES)
def test_levels(name: str, target: Any) -> None:
    function, inputs = CASES[name]
    check_levels(capture(function, inputs), target)


@pytest.mark.product
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_against_eager(name: str, dynamic: bool) -> None:
    function, inputs = CASES[name]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend="aicc", dynamic=dynamic, options={"strict": True})(*inputs), function(*inputs))


def test_a_program_covers_many_columns() -> None:
    module = lowered(capture(lambda x: x.sum(0), _normal((100, 4000))), AVX2, "tile")
    kernel, = [op for op in module.body if op.name == "tile.kernel"]
    assert kernel["grid"] == (1,)


def test_long_reductions_are_parts_for_threads() -> None:
    """The parts depend on sizes alone, so results are the same bits on any number of threads."""
    x, = _normal((4096, 1024))
    for f, programs in ((lambda x: x.sum(0), 16), (lambda x: x.sum(), 16), (lambda x: x.sum(1), 4096)):
        module = lowered(capture(f, [x]), AVX2, "tile")
        kernel, *_ = [op for op in module.body if op.name == "tile.kernel"]
        assert kernel["grid"][0] == programs or kernel["grid"] == (programs,)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            found.append(torch.compile(lambda x: (x.sum(0), x.sum()), backend="aicc")(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_parts_do_not_cost_another_pass() -> None:
    """A gradient that is stored and summed is read once: the sum stays with the code that makes it."""
    def f(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        made = g * x
        return made, made.sum(0)

    x, y = _normal((4096, 1024), (4096, 1024))
    module = lowered(capture(f, [x, y]), AVX2, "tile")
    assert len([op for op in module.body if op.name == "tile.kernel"]) == 1
