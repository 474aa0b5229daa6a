"""What the fuzzers found, kept as tests of their own."""

from __future__ import annotations

from collections.abc import Callable

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


ALIASES: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "expanded": lambda x: (lambda y: (y.expand(5), y.expand(5).reshape(-1)))(x.exp()[0, 0, 0]),
    "expanded once": lambda x: (lambda y: (y.expand(7, 3, 4, 2), y.expand(7, 3, 4, 2)[1:]))(x.exp()),
    "slices": lambda x: (lambda y: (y[1:], y[:2], y * 2, y[..., 1]))(x.exp()),
    "chunks": lambda x: (x + 1).chunk(2, -1),
    "slices of an extern": lambda x: (lambda y: (y[1:], y[:2]))(torch.sort(x).values),
    "slices of a clone": lambda x: (lambda y: (y[1:], y[:2], y[2:]))(x.clone()),
    "two bases": lambda x: (lambda y, z: (y[1:], z[:2], z[1:], y[:2]))(x.exp(), x + 1),
    "other type": lambda x: (lambda y: (y, y.view(torch.int32), y.view(torch.int16)[..., 1:]))(x * 2),
    "other type only": lambda x: (lambda y: (y[1:], y.view(torch.int32)[1:]))(x * 2),
    "parts of complex": lambda x: (lambda y: (y.real, y.imag))(torch.complex(x, x + 1)),
}


@pytest.mark.product
@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_results_that_share_memory_which_is_not_returned(name: str, dynamic: bool) -> None:
    """Each view came in memory of its own when no result had all of the memory, as with two expanded ones (without gradients, AOTAutograd
    leaves sharing to the compiler)."""
    program = ALIASES[name]
    torch._dynamo.reset()
    x = torch.randn(3, 4, 2)
    with torch.no_grad():
        got, want = torch.compile(program, backend=backend(Options(strict=True, cache=False)), dynamic=dynamic)(x), program(x)

    def shared(ts: tuple[torch.Tensor, ...]) -> list[int]:
        places = [t.untyped_storage().data_ptr() for t in ts]
        return [places.index(p) for p in places]
    assert len(got) == len(want) and shared(got) == shared(want)
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
