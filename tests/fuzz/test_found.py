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
