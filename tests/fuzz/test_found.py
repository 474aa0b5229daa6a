"""What the fuzzers found, kept as tests of their own."""

from __future__ import annotations

import pytest
import torch
from aicc.compiler.dynamo import backend
from aicc.compiler.options import Options


@pytest.mark.parametrize("dynamic", [False, True])
def test_results_that_are_views_of_each_other_share_memory(dynamic: bool) -> None:
    """With symbolic sizes, a view of a returned reshape came in memory of its own."""
    def program(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x @ x.transpose(-1, -2)
        return y, y.flatten(0, 1), y[1:], y.transpose(1, 2)
    torch._dynamo.reset()
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        got, want = torch.compile(program, backend=backend(Options(strict=True, cache=False)), dynamic=dynamic)(x), program(x)
    assert len({t.untyped_storage().data_ptr() for t in got}) == 1
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
        assert (g.stride(), g.storage_offset()) == (w.stride(), w.storage_offset())


def test_an_output_in_place_of_an_input_that_another_output_has_taken() -> None:
    """Memory planning put the second output into the first one's memory, through the input that both may overwrite."""
    def program(v0: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at = v1.cumsum(0).long()
        a = v0.scatter_add(0, at % 5, v0[:5])
        b = v2.cumsum(0).index_select(0, at.reshape(-1) % 5)
        c = b.unflatten(0, (5, 1))
        return a, b, c, c, b
    torch._dynamo.reset()
    inputs = torch.randn(5), torch.tensor([1.0, 2.0, -3.0, 2.0, 1.0]), torch.randn(5)
    with torch.no_grad():
        got, want = torch.compile(program, backend=backend(Options(strict=True, cache=False)))(*inputs), program(*inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
