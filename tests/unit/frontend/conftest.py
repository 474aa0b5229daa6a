"""Capture of small functions and comparison of the imported module with eager, through the reference interpreter."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aicc.frontend.decompositions import decomposition_table
from aicc.frontend.importer import externs, import_graph
from aicc.ir.core import Operation
from aicc.ir.interpreter import interpret
from aicc.ir.parser import parse_module
from aicc.ir.printer import print_op
from aicc.ir.verifier import verify
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function
from torch.fx.experimental.proxy_tensor import make_fx

TABLE = decomposition_table()


def trace(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> torch.fx.GraphModule:
    """The functional ATen graph of `fn` after decomposition; with `dynamic`, all sizes (0 and 1 excepted) are symbols."""
    gm = make_fx(lambda *xs: fn(*xs), decomposition_table=TABLE, tracing_mode="symbolic" if dynamic else "fake")(*args)
    if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in gm.graph.nodes):
        graphs: list[torch.fx.GraphModule] = []  # AOTAutograd makes it functional, at five times the cost
        aot_function(lambda *xs: fn(*xs), lambda gm, _: graphs.append(gm) or gm, decompositions=TABLE, dynamic=dynamic)(*args)
        gm, = graphs
    return gm


def load(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> Operation:
    """The module of `fn`, verified, and printed and parsed without change."""
    module = import_graph(trace(fn, *args, dynamic=dynamic))
    verify(module)
    text = print_op(module)
    assert print_op(parse_module(text)) == text
    return module


def ops(module: Operation) -> list[str]:
    """Names of the function's ops, in order, without 'graph.' and 'return'."""
    return [op.name.removeprefix("graph.") for op in module.body.first.body if op.name != "return"]


def compare(fn: Callable[..., Any], *args: Any, dynamic: bool = False, compiled: bool = True, tol: float = 2e-5) -> Operation:
    """Imports `fn`, interprets it, and compares with eager. With `compiled`, no operator may be left to ATen."""
    module = load(fn, *args, dynamic=dynamic)
    if compiled:
        assert not [op["target"] for op in externs(module)]
    expected = fn(*args)
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    got = interpret(module, [a.clone() for a in args if isinstance(a, torch.Tensor)])
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype and g.shape == e.shape
        loose = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(e.dtype, tol)
        torch.testing.assert_close(g, e.contiguous(), rtol=loose, atol=loose, equal_nan=True)
    return module


def capture(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> list[torch.fx.GraphModule]:
    """The graphs (forward, then backward when the result needs a gradient) that AOTAutograd hands to a backend."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, decompositions=TABLE)
    out = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    for o in out if isinstance(out, (tuple, list)) else [out]:
        if isinstance(o, torch.Tensor) and o.requires_grad:
            o.sum().backward()
    return graphs


@pytest.fixture
def tools() -> SimpleNamespace:
    """The helpers above: test modules under importlib mode cannot import one another."""
    return SimpleNamespace(trace=trace, load=load, ops=ops, compare=compare, capture=capture)
