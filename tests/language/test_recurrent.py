"""Recurrent layers and scans: one native loop, whatever the number of steps; against eager, and level by level in the interpreter."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from aicc.frontend import scan as mending
from aicc.ir.interpreter import interpret
from models.observing import recorded
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._higher_order_ops.scan import scan

from .harness import Row, check


def _patched() -> Any:
    return torch._dynamo.config.patch(allow_rnn=True)


def _row(layer: nn.Module, *shape: int, **kwargs: Any) -> Row:
    dtype = next(layer.parameters()).dtype
    return Row(layer, lambda: (torch.randn(shape, dtype=dtype),), train=True, around=_patched, **kwargs)


ROWS: dict[str, Row] = {
    "nn.LSTM": _row(nn.LSTM(8, 6), 5, 3, 8, note="with `torch._dynamo.config.allow_rnn`, as all of these: a native loop"),
    "nn.LSTM of two layers, both ways, batch first": _row(nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), 3, 5, 8),
    "nn.LSTM with a projection": _row(nn.LSTM(8, 6, proj_size=3), 5, 3, 8),
    "nn.LSTM without bias, in float64": _row(nn.LSTM(8, 20, bias=False).double(), 7, 4, 8),
    "nn.GRU": _row(nn.GRU(8, 6), 5, 3, 8),
    "nn.GRU of two layers, both ways": _row(nn.GRU(8, 6, 2, bidirectional=True), 5, 3, 8),
    "nn.GRU over one step": _row(nn.GRU(8, 6), 1, 3, 8),
    "nn.RNN": _row(nn.RNN(8, 6), 5, 3, 8),
    "nn.RNN with ReLU": _row(nn.RNN(8, 6, nonlinearity="relu"), 5, 3, 8),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("nn.GRU of two layers, both ways", "nn.RNN", "nn.LSTM with a projection"))) for n in ROWS])
def test_row(name: str) -> None:
    check(ROWS[name])


def test_without_allow_rnn_eager_runs() -> None:
    check(Row(nn.LSTM(8, 6), lambda: (torch.randn(5, 3, 8),), how="eager", breaks=True,
              around=lambda: torch._dynamo.config.patch(allow_rnn=False)))


def _compiled(f: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Compilation]]:
    torch._dynamo.reset()
    seen: list[Compilation] = []
    with torch.no_grad(), _patched(), watching(compiled=seen.append):
        return torch.compile(f, backend="aicc", **kwargs)(*args), seen


def test_launches_do_not_grow_with_steps() -> None:
    layer = nn.LSTM(16, 16)
    counts = [_compiled(layer, torch.randn(steps, 2, 16))[1][0].stats for steps in (3, 50)]
    assert counts[0]["launches"] == counts[1]["launches"]
    assert counts[0]["externs"] == counts[1]["externs"] == []
    assert counts[0]["packed"] >= 2  # both weights, once for all calls


def test_number_of_steps_is_dynamic() -> None:
    layer = nn.LSTM(8, 6)
    seen: list[Compilation] = []
    torch._dynamo.reset()
    with torch.no_grad(), _patched(), watching(compiled=seen.append):
        f = torch.compile(layer, backend="aicc", dynamic=True)
        for steps, batch in ((5, 3), (9, 2), (2, 7)):
            x = torch.randn(steps, batch, 8)
            for got, want in zip(f(x)[1], layer(x)[1], strict=True):
                torch.testing.assert_close(got, want)
    assert len(seen) == 1
    assert not seen[0].stats["externs"]


def _swap(state: tuple[Tensor, Tensor], x: Tensor) -> Any:
    """Each state is the other's old value, and what is stacked is the state before."""
    a, b = state
    return (b.clone(), a + x), (a.clone(), b.clone(), x * 2)


def _shift(state: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Any:
    a, b, c = state
    return (x.clone(), a.clone(), b.clone()), (c + x, c.clone())


def _unchanged(state: tuple[Tensor, Tensor], x: Tensor) -> Any:
    a, b = state
    y = (b * x).tanh()
    return (a.clone(), y), (y.clone(), y.clone())


@pytest.mark.product
@pytest.mark.parametrize("step, count", [(_swap, 2), (_shift, 3), (_unchanged, 2)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_states_that_trade_places(step: Callable[..., Any], count: int, steps: int) -> None:
    state, xs = tuple(torch.randn(5) for _ in range(count)), torch.randn(steps, 5)
    want_state, want = state, []
    for x in xs:
        want_state, y = step(want_state, x)
        want.append(y)
    (got_state, got), seen = _compiled(lambda s, x: scan(step, s, x), state, xs)
    assert [c.name for c in seen] == ["inference"]  # one graph: the loop is native
    for a, b in zip(got_state, want_state, strict=True):
        torch.testing.assert_close(a, b)
    for k, a in enumerate(got):
        torch.testing.assert_close(a, torch.stack([y[k] for y in want]))


# -- gradients that torch loses

@contextmanager
def _forgetting(mended: bool) -> Iterator[None]:
    """torch's scan loses gradients as 2.11's does: initial values are traced as they are, not as if they needed a gradient."""
    module = importlib.import_module("torch._higher_order_ops.scan")
    op, scope = module.scan_op, dict(vars(module))
    text = inspect.getsource(module.scan_autograd)
    kept, flag = dict(op.py_kernels), mending._LOSES_GRADIENTS
    mending._LOSES_GRADIENTS = mended
    if "and not t.requires_grad" in text:  # torch 2.11 needs nothing done
        exec(text[text.index("def scan_autograd"):].replace("and not t.requires_grad", "and False"), scope)
        del op.py_kernels[DispatchKey.Autograd]
        op._dispatch_cache.clear()
        op.py_autograd_impl(scope["scan_autograd"])
    try:
        yield
    finally:
        op.py_kernels.update(kept)
        op._dispatch_cache.clear()
        mending._LOSES_GRADIENTS = flag


def _gradients(f: Callable[..., Any], needed: tuple[bool, ...]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    args = [torch.randn(shape).double().requires_grad_(k) for shape, k in zip(((3, 5), (7, 3, 5), (5, 5)), needed, strict=True)]
    results = f(*args)
    if any(needed):
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    return [r.requires_grad for r in results], [*(r.detach() for r in results), *(a.grad for a in args)]


@pytest.mark.product
@pytest.mark.parametrize("needed", [(False, True, True), (False, False, True), (False, True, False), (True, True, True), (False, False, False)], ids=str)
@pytest.mark.parametrize("forgetful", [False, True], ids=["torch as it is", "torch 2.11"])
def test_gradients_through_states_that_start_as_constants(needed: tuple[bool, ...], forgetful: bool) -> None:
    """Compared with a loop in Python: before torch 2.13, eager's own scan loses what reaches weights and inputs through earlier steps."""
    def unrolled(c: Tensor, xs: Tensor, w: Tensor) -> Any:
        ys = []
        for x in xs:
            c = (c @ w + x).tanh()
            ys.append(c)
        return c, torch.stack(ys)

    def scanned(c: Tensor, xs: Tensor, w: Tensor) -> Any:
        def step(c: Tensor, x: Tensor) -> Any:
            h = (c @ w + x).tanh()
            return h, h.clone()
        return scan(step, c, xs)

    torch._dynamo.reset()
    with _forgetting(mended=True) if forgetful else nullcontext():
        want, got = _gradients(unrolled, needed), _gradients(torch.compile(scanned, backend="aicc"), needed)
    torch.testing.assert_close(got, want)


def test_what_torch_forgets_is_forgotten_without_the_mending() -> None:
    """The test above would fail without it."""
    torch._dynamo.reset()
    layer, x = nn.RNN(8, 6).double(), torch.randn(5, 3, 8).double()
    with _patched(), _forgetting(mended=False):
        found = [torch.autograd.grad(f(x)[0].sum(), layer.parameters())[0] for f in (torch.compile(layer, backend="aicc"), layer)]
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_random_numbers_in_a_step_stay_in_python() -> None:
    _, seen = _compiled(lambda c, x: scan(lambda c, x: (c + torch.rand_like(x), x.clone()), c, x), torch.zeros(4), torch.randn(5, 4))
    assert len(seen) != 1 or seen[0].name != "inference"


def test_an_index_out_of_range_within_a_step_is_reported() -> None:
    table = torch.randn(6, 4)

    def f(c: Tensor, index: Tensor) -> Any:
        return scan(lambda c, i: (c + table.index_select(0, i)[0], c * 2), c, index)

    got, _ = _compiled(f, torch.zeros(4), torch.tensor([[1], [5]]))
    torch.testing.assert_close(got[0], table[1] + table[5])
    with pytest.raises(IndexError):
        _compiled(f, torch.zeros(4), torch.tensor([[1], [99], [2]]))


def test_every_level_means_the_same() -> None:
    """Forward and backward of a GRU: graph, tensor and tile levels by the reference interpreter."""
    torch._dynamo.reset()
    layer, x = nn.GRU(5, 4), torch.randn(6, 3, 5, requires_grad=True)
    with _patched(), recorded() as seen:
        torch.compile(layer, backend="aicc")(x)[0].square().sum().backward()
    assert len(seen) == 2
    for graph in seen:
        tensors = [a.detach() for a in graph.arguments if isinstance(a, Tensor)]
        levels = [interpret(graph.stages[level], tensors) for level in ("graph", "tensor", "tile")]
        for level in levels[1:]:
            for a, b in zip(levels[0], level, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
