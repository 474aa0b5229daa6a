"""Whole programs through torch.compile, seen from the executor: native calls, packed parameters, memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from aicc.compiler import driver
from aicc.compiler.dynamo import backend
from aicc.compiler.options import Options
from aicc.runtime.executor import CompiledGraph
from torch import nn

Compile = Callable[..., tuple[Callable[..., Any], list[CompiledGraph]]]


@pytest.fixture
def compiled() -> Iterator[Compile]:
    """f -> (the compiled f, its graphs as they are made)."""
    graphs: list[CompiledGraph] = []

    def listen(compilation: driver.Compilation) -> None:
        assert compilation.graph is not None
        graphs.append(compilation.graph)

    def make(f: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], list[CompiledGraph]]:
        return torch.compile(f, backend=backend(Options(strict=True, cache=False)), **options), graphs

    torch._dynamo.reset()
    with warnings.catch_warnings(), driver.watching(compiled=listen):
        warnings.simplefilter("error", RuntimeWarning)
        yield make
    torch._dynamo.reset()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 10))


def test_a_model_is_one_native_call(compiled: Compile) -> None:
    m = model()
    f, graphs = compiled(m)
    x = torch.randn(16, 48)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(f(x), m(x), rtol=1e-4, atol=1e-5)
    graph, = graphs
    assert graph.calls == 3 and graph.extern_calls == 0
    assert graph.memory["outputs"] == 16 * 10 * 4 and 0 < graph.memory["arena"] <= 2 * 16 * 96 * 4


def test_changed_parameters_are_seen(compiled: Compile) -> None:
    m = model()
    f, graphs = compiled(m)
    x = torch.randn(16, 48)
    with torch.no_grad():
        for change in (lambda: None, lambda: m[0].weight.mul_(1.5),
                       lambda: m.load_state_dict(nn.Sequential(*model()).state_dict()),
                       lambda: setattr(m[3].weight, "data", torch.randn(10, 96))):
            change()
            torch.testing.assert_close(f(x), m(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_training(compiled: Compile) -> None:
    m, reference = model(), model()
    f, graphs = compiled(m)
    optimizers = [torch.optim.SGD(k.parameters(), lr=0.1) for k in (m, reference)]
    for _ in range(4):
        x = torch.randn(16, 48)
        losses = []
        for function, optimizer in zip((f, reference), optimizers, strict=True):
            optimizer.zero_grad()
            loss = function(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for a, b in zip(m.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert [g.calls for g in graphs] == [4, 4]


def test_arguments_that_are_written_to(compiled: Compile) -> None:
    def step(state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        old = state * 2
        state.mul_(0.5).add_(x)
        return old

    f, _ = compiled(step)
    state, want = torch.ones(4, 8), torch.ones(4, 8)
    x = torch.randn(4, 8)
    for _ in range(3):
        version = state._version
        torch.testing.assert_close(f(state, x), step(want, x))
        torch.testing.assert_close(state, want)
        assert state._version > version


def test_results_that_are_inputs_views_or_one_value_twice(compiled: Compile) -> None:
    def many(x: torch.Tensor) -> Any:
        y = x + 1
        return x, y, y, x.t(), y[1:], 3, None

    f, _ = compiled(many)
    x = torch.randn(6, 4)
    got, want = f(x), many(x)
    for a, b in zip(got, want, strict=True):
        assert a is b if not isinstance(b, torch.Tensor) else a.stride() == b.stride() and torch.equal(a, b)
    assert got[0] is x and got[3].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_operators_without_lowering(compiled: Compile) -> None:
    def mixed(x: torch.Tensor) -> Any:
        u, s, v = torch.linalg.svd(x * 2, full_matrices=False)
        return (u * s) @ v + 1, s.sort()[1]

    f, graphs = compiled(mixed)
    x = torch.randn(6, 4)
    got, want = f(x), mixed(x)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[1], want[1]) and graphs[0].extern_calls >= 1


def test_dynamic_sizes(compiled: Compile) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.softmax(-1) * x.shape[0], y]).sum(1)

    g, graphs = compiled(f, dynamic=True)
    for n, m, k in ((3, 5, 7), (64, 2, 33), (2, 9, 2)):
        x, y = torch.randn(n, k), torch.randn(m, k)
        torch.testing.assert_close(g(x, y), f(x, y), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1 and graphs[0].calls == 3


def test_an_index_out_of_range(compiled: Compile) -> None:
    f, _ = compiled(lambda table, rows: table[rows] * 2)
    table = torch.randn(5, 3)
    torch.testing.assert_close(f(table, torch.tensor([0, -1, 4])), table[[0, -1, 4]] * 2)
    for _ in range(2):
        with pytest.raises(IndexError, match="out of range"):
            f(table, torch.tensor([0, 5, 1]))
    torch.testing.assert_close(f(table, torch.tensor([3, 3, 0])), table[[3, 3, 0]] * 2)


def test_packed_weights_follow_writes_that_torch_does_not_count(compiled: Compile) -> None:
    torch.manual_seed(0)
    target, source = nn.Linear(64, 64), nn.Linear(64, 64)
    x = torch.randn(32, 64)
    f, _ = compiled(target)
    with torch.no_grad():
        torch.testing.assert_close(f(x), target(x))
        for a, b in zip(target.parameters(), source.parameters(), strict=True):
            a.data.copy_(0.5 * a.data + 0.5 * b.data)  # the soft update of a target network
        torch.testing.assert_close(f(x), target(x))


_STRIDES_UNSEEN = torch.__version__ < "2.13"
"""Dynamo compiles nothing anew for a parameter whose data lies otherwise."""


def _own_memory(p: torch.Tensor) -> None:
    p.set_(torch.randn(p.numel() + 8) / 10, 8, p.shape, p.stride())


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "in place": lambda m: m.weight.mul_(-1), "through data": lambda m: m.weight.data[-1].mul_(-1), "through numpy": lambda m: m.bias.numpy().fill(0.3),
    "data set": lambda m: setattr(m.weight, "data", torch.randn(96, 96) / 10), "moved": lambda m: _own_memory(m.weight),
    "other strides": lambda m: setattr(m.weight, "data", (torch.randn(96, 96) / 10).t()), "loaded": lambda m: m.load_state_dict(nn.Linear(96, 96).state_dict()),
    "assigned": lambda m: m.load_state_dict(nn.Linear(96, 96).state_dict(), assign=True),
    "replaced": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(96, 96) / 10)),
}


@pytest.mark.parametrize("threads", [1, 2])
def test_changes_of_any_of_many_parameters(compiled: Compile, threads: int) -> None:
    """As many as the threads of a call look at together."""
    torch.manual_seed(0)
    m = nn.Sequential(*(layer for _ in range(14) for layer in (nn.Linear(96, 96), nn.Tanh())))
    x = torch.randn(64, 96)
    f, graphs = compiled(m)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for i, change in enumerate([*CHANGES.values()] * 2):
                result = m(x)
                for _ in range(2):
                    torch.testing.assert_close(f(x), result, rtol=1e-4, atol=1e-5)
                layer = m[2 * (i * 5 % 14)]
                change(layer)
                assert not torch.equal(m(x), result)
                if not layer.weight.is_contiguous() and _STRIDES_UNSEEN:
                    with pytest.raises(ValueError, match="this torch did not notice"):
                        f(x)
                    layer.weight.data = layer.weight.data.contiguous()
                torch.testing.assert_close(f(x), m(x), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)
    packed = graphs[-1]._packed
    assert packed is not None and packed.current is not None and packed.current.fingerprint.block[2]
