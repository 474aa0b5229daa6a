"""Sizes that change: batch, sequence, both; sizes that depend on data; few compilations, and the small sizes right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.driver import Compilation, watching
from torch import Tensor, nn

from .harness import Row, check, close


@pytest.fixture
def graphs() -> Iterator[list[Compilation]]:
    seen: list[Compilation] = []
    with watching(compiled=seen.append):
        yield seen


class _Block(nn.Module):
    """A transformer block over [B, S, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, 16))
        return x + self.down(F.gelu(self.up(x)))


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


_PROGRAMS: dict[str, tuple[Callable[[], Any], Callable[[int], tuple[Tensor, ...]]]] = {
    "batch": (_Block, lambda n: (torch.randn(n, 5, 16),)),
    "sequence": (_Block, lambda n: (torch.randn(3, n, 16),)),
    "batch and sequence": (_Block, lambda n: (torch.randn(n, n + 2, 16),)),
    "batch of images": (_convolution, lambda n: (torch.randn(n + 14, 3, 8, 8),)),  # torch's convolution guards on 16
    "reductions and views": (lambda: lambda x: (x.softmax(0).sum(1), x.t().reshape(-1), x.amax() * x.shape[0] if x.numel() else x.sum()),
                             lambda n: (torch.randn(n, 6),)),
    "several sizes": (lambda: lambda x, y: torch.cat([x, y]).cumsum(0) * x.shape[0], lambda n: (torch.randn(n, 3), torch.randn(2 * n + 1, 3))),
}


def test_views_that_have_no_size_for_small_symbols() -> None:
    """Gradients of a view of 2n rows as [2, n] divide sizes by each other: plans are not checked for n where there is nothing to divide by."""
    def f(x: Tensor, y: Tensor) -> Any:
        z = torch.cat([x, y])
        return z.cumsum(0), torch.stack([x, y], 1).flatten(1), x.unsqueeze(1) - y.unsqueeze(0), z.view(2, -1, 3).mean(0)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aicc", dynamic=True)
    for n in (5, 1, 2, 0, 64):
        sides = []
        for run in (compiled, f):
            torch.manual_seed(n)
            x, y = (torch.randn(n, 3, requires_grad=True) for _ in range(2))
            results = run(x, y)
            torch.autograd.backward(results, [torch.ones_like(r) for r in results])
            sides.append([*(r.detach() for r in results), x.grad, y.grad])
        torch.testing.assert_close(*sides)


@pytest.mark.parametrize("sign", [-1, 1], ids=["none", "all"])
def test_gradients_of_what_a_mask_selects(sign: int) -> None:
    """The gradient spreads a tensor that may have no elements, from which nothing may be read then."""
    def f(x: Tensor) -> Tensor:
        return torch.masked_select(x, x > 0).square().sum()

    torch._dynamo.reset()
    x = (sign * (torch.rand(20) + 0.1)).requires_grad_()
    with _SHAPES():
        torch.compile(f, backend="aicc")(x).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach().clamp(min=0))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("batch", "sequence", "batch of images"))) for n in _PROGRAMS])
def test_fifty_sizes_compile_at_most_twice(name: str, graphs: list[Compilation]) -> None:
    """The first size alone, and then symbols: sizes from 2 to 51, in no order."""
    make_program, make = _PROGRAMS[name]
    torch.manual_seed(0)
    program = make_program()
    compiled = torch.compile(program, backend="aicc")
    with torch.no_grad():
        for i in range(50):
            args = make(2 + (i * 37) % 50)
            close(compiled(*args), program(*args), 1e-4)
    assert 1 <= len(graphs) <= 2


@pytest.mark.parametrize(("name", "dynamic"), [("batch", None), ("reductions and views", None), ("several sizes", True), *(
    pytest.param(n, True, marks=pytest.mark.slow) for n in ("sequence", "batch and sequence", "batch of images"))])
def test_small_sizes(name: str, dynamic: bool | None) -> None:
    """0, 1 and 2 before and after others. torch compiles 0 and 1 apart, for broadcasting means another thing there."""
    make_program, make = _PROGRAMS[name]
    torch.manual_seed(0)
    program = make_program()
    compiled = torch.compile(program, backend="aicc", dynamic=dynamic)
    with torch.no_grad():
        for n in (2, 1, 7, 0, 2, 1, 33, 0):
            args = make(n)
            try:
                want = program(*args)
            except (RuntimeError, IndexError) as e:  # some have no meaning on nothing
                with pytest.raises(type(e)):
                    compiled(*args)
                continue
            close(compiled(*args), want, 1e-4)


def test_training_with_changing_sizes(graphs: list[Compilation]) -> None:
    torch.manual_seed(0)
    model = _Block()
    compiled = torch.compile(model, backend="aicc")
    for n in (3, 5, 8, 13, 4):
        x = torch.randn(n, n + 1, 16)
        grads = []
        for call in (compiled, model):
            model.zero_grad()
            call(x).square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        close(grads[0], grads[1], 1e-4)
    assert len(graphs) <= 4


# -- sizes that depend on data

def _capture(**flags: bool) -> Callable[[], Any]:
    return lambda: torch._dynamo.config.patch(**flags)


_SHAPES = _capture(capture_dynamic_output_shape_ops=True)
_SCALARS = _capture(capture_scalar_outputs=True)


def _sized_by_data(x: Tensor) -> Tensor:
    n = (x.abs() * 10).long().sum().item()
    torch._check(n >= 0)
    torch._check(n < 1000)
    return torch.ones(n + 1, 3) * n


def _sized_by_a_float(x: Tensor) -> Tensor:
    n = int(x.abs().sum().item()) + 1
    torch._check(n < 1000)
    return torch.ones(n, 3) * n


def _sliced_by_data(x: Tensor) -> Tensor:
    n = x.argmax().item()
    torch._check(n >= 0)
    torch._check(n <= x.shape[0])
    return x.narrow(0, 0, n) * 2


ROWS: dict[str, Row] = {
    "nonzero": Row(lambda x: x.nonzero() * 2, lambda: (torch.randn(20).relu(),), around=_SHAPES, aten=("nonzero",)),
    "masked_select": Row(lambda x: torch.masked_select(x, x > 0).exp() + 1, lambda: (torch.randn(20),), around=_SHAPES, aten=("masked_select",)),
    "index by a mask": Row(lambda x: x[x > 0].sum() * 2, lambda: (torch.randn(20),), around=_SHAPES, aten=("index.Tensor",)),
    "unique": Row(lambda x: x.unique() + 1, lambda: (torch.randint(0, 5, (20,)),), around=_SHAPES, aten=("_unique2",)),
    "item, a float": Row(lambda x: x / x.abs().max().item() + 1, lambda: (torch.randn(20),), around=_SCALARS),
    "item, a bool": Row(lambda x: x * x.amax().ge(0).item(), lambda: (torch.randn(20),), around=_SCALARS, aten=("_assert_scalar",),
                         newer=("_assert_scalar",)),
    "item, an int": Row(lambda x: x * x.sum().item(), lambda: (torch.arange(5),), around=_SCALARS),
    "a size read from data": Row(_sized_by_data, lambda: (torch.rand(9),), around=_SCALARS, aten=("_local_scalar_dense",)),
    "a size read from data as a float": Row(_sized_by_a_float, lambda: (torch.rand(9),), around=_SCALARS,
                                            aten=("_assert_scalar", "_local_scalar_dense"), newer=("_assert_scalar",)),
    "a slice up to a number read from data": Row(_sliced_by_data, lambda: (torch.rand(9),), around=_SCALARS, aten=("_local_scalar_dense",)),
    "a part that begins at a number read from data": Row(lambda x, i: torch.narrow(x, 1, i, 2), lambda: (torch.rand(3, 5), torch.tensor(2)),
                                                         around=_SCALARS, aten=("slice.Tensor",)),
    "tensor_split at places read from data": Row(lambda x, i: torch.tensor_split(x * 2, i), lambda: (torch.rand(6, 2), torch.tensor([1, 2, 4])),
                                                 around=_SCALARS, aten=("slice.Tensor",)),
    "tolist": Row(lambda x, i: torch.cat(x.split(i.tolist())) * 2, lambda: (torch.randn(6, 3), torch.tensor([2, 3, 1])), around=_SCALARS,
                  aten=("_assert_scalar", "_local_scalar_dense")),
    "item without capture": Row(lambda x: x / x.abs().max().item() + 1, lambda: (torch.randn(20),), breaks=True,
                                note="Dynamo parts the function there; capture_scalar_outputs does not"),
    "repeat_interleave": Row(lambda x, n: x.repeat_interleave(n) + 1, lambda: (torch.randn(4), torch.tensor([1, 0, 3, 2])), around=_SHAPES,
                             aten=("repeat_interleave.Tensor",)),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    check(ROWS[name])


def test_data_dependent_sizes_compile_once(graphs: list[Compilation]) -> None:
    """Any number of results, none included."""
    f = torch.compile(lambda x: (x.nonzero().float() * 2).sum(0), backend="aicc")
    with _SHAPES():
        for k in (0, 1, 2, 5, 20):
            x = torch.zeros(20)
            x[:k] = 1
            torch.testing.assert_close(f(x), (x.nonzero().float() * 2).sum(0))
    assert len(graphs) == 1


def test_sizes_computed_from_floats_in_the_data(graphs: list[Compilation]) -> None:
    """One graph for every size, none included; a negative one fails as in eager."""
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        n = int(x.sum().item() * 2)
        return torch.ones(n, 3).cumsum(0) + x[0], torch.zeros(3, n + 2) + n

    compiled = torch.compile(program, backend="aicc")
    with _SCALARS():
        for total in (3.0, 0.0, 0.6, 20.0):
            x = torch.tensor([total, 0.0])
            close(compiled(x), program(x), 1e-6)
        for call in (program, compiled):
            with pytest.raises(RuntimeError):
                call(torch.tensor([-3.0, 0.0]))
    assert len(graphs) == 1


def _checked(check: Callable[[Any, Any], bool]) -> Callable[[Tensor], Tensor]:
    def program(x: Tensor) -> Tensor:
        n, m = x[0].item(), x[1].item()
        torch._check(check(n, m))
        return x * n + m
    return program


def _rows(x: Tensor) -> Tensor:
    n = x.sum().item()
    torch._check(n < 10)
    return torch.ones(n, 3)


def _tail(x: Tensor) -> Tensor:
    n = x[0].item()
    torch._check(n >= 0)
    torch._check(n <= 4)
    return torch.arange(4.0)[n:] * 2


@pytest.mark.parametrize(("program", "good", "bad"), [
    (_checked(lambda n, m: n < m), ([1, 2],), ([2, 1],)), (_checked(lambda n, m: n != 3), ([1, 2],), ([3, 1],)),
    (_checked(lambda n, m: n + m >= 0), ([1, 2], [-1, 1]), ([-3, 1],)), (_checked(lambda n, m: n < 2.5), ([1.5, 2.0],), ([3.0, 1.0],)),
    (_rows, ([1, 2], [0, 0]), ([-3, 1], [9, 9])), (_tail, ([1, 0], [4, 0], [0, 0]), ([5, 0], [-1, 0]))])
def test_what_the_program_asserts_about_data(program: Callable[[Tensor], Tensor], good: Any, bad: Any, graphs: list[Compilation]) -> None:
    """torch._check of numbers in the data, and sizes that cannot be: an error as in eager. A negative size once ended the process."""
    compiled = torch.compile(program, backend="aicc")
    with _SCALARS():
        for given in good:
            close(compiled(torch.tensor(given)), program(torch.tensor(given)), 1e-6)
        for given in bad:
            for call in (program, compiled):
                with pytest.raises(RuntimeError):
                    call(torch.tensor(given))
    assert len(graphs) == 1
