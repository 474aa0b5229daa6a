"""What tests rely on without saying so."""

from __future__ import annotations

import itertools

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from support.products import cover


@pytest.mark.parametrize("part", [0, 1])
def test_layers_are_compiled_as_if_no_test_had_come_before(part: int) -> None:
    """Dynamo would take the sizes of the second part for symbols, and run its layers eagerly from the ninth compilation on."""
    seen: list[Compilation] = []
    rows = 2 + part
    with watching(compiled=seen.append), torch.no_grad():
        torch.compile(torch.nn.Linear(16 + part, 4), backend="aicc")(torch.randn(rows, 16 + part))
        for i in range(6):
            torch.compile(torch.nn.Linear(2 + i, 4 + part), backend="aicc", dynamic=False)(torch.randn(rows, 2 + i))
    assert len(seen) == 7 and seen[0].graph is not None and not seen[0].graph.manifest["symbols"]


def test_the_default_part_of_a_product_has_every_value() -> None:
    """And no more cases than the longest list of values, each value of the others as often as any."""
    axes = {"name": [f"n{i}" for i in range(7)], "type": [1, 2, 3], "dynamic": [False, True]}
    cases = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    chosen = [cases[i] for i in cover(cases)]
    assert len(chosen) == 7 and cover(cases) == cover(cases)
    for axis, values in axes.items():
        times = [sum(case[axis] == v for case in chosen) for v in values]
        assert min(times) >= 1 and max(times) - min(times) <= 1, (axis, times)
    assert cover([{"m": m} for m in (1, 1, 2)]) == [0, 2] and cover([{}]) == [] and cover([]) == []


@pytest.mark.product
@pytest.mark.parametrize("a", [torch.int8, [1], lambda: 2], ids=["0", "1", "2"])
@pytest.mark.parametrize("b", ["x", "y"])
def test_the_rest_of_a_product_is_slow(request: pytest.FixtureRequest, a: object, b: str) -> None:
    chosen = {"x-0", "y-1", "x-2"}
    if request.session.testscollected > 5:  # of a case that is asked for by name, nothing is left out
        assert (request.node.callspec.id in chosen) == (request.node.get_closest_marker("slow") is None)
