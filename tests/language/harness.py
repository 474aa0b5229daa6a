"""A row of the language checklist: a function, its inputs, and what should become of it.

    ROWS = {"a transposed input": Row(f, lambda: (torch.randn(4, 6).t(),))}

    @pytest.mark.parametrize("name", ROWS)
    def test_row(name): check(ROWS[name])

`check` calls the function twice, compiled and eager, on equal inputs of its own, and compares results with their types, strides and
shared memory, the inputs afterwards and, with `train`, all gradients. And it compares what was compiled with what the row says.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from aicc.compiler.driver import Compilation, watching
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

__all__ = ["EAGER", "TORCH", "Row", "check", "close"]

EAGER = "eager"
TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])


@dataclass(frozen=True)
class Row:
    """`function` may be a module: each side gets a copy of its own. `make` gives the arguments.

    how       "compiled", or "eager" where Dynamo runs the function as it is
    aten      the operators that stay with ATen, without "aten."
    newer     those of them that torch's tracing does not have before 2.12
    breaks    whether Dynamo parts the function into several graphs
    note      for the table: what a user should know
    warns     a part of the message of the warning that says so
    """

    function: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    train: bool = False
    how: str = "compiled"
    aten: tuple[str, ...] = ()
    newer: tuple[str, ...] = ()
    breaks: bool = False
    note: str = ""
    warns: str = ""
    tolerance: float = 1e-5
    shares: bool = True
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """A cell of the table."""
        if self.how == EAGER:
            return "runs in eager"
        parts = ["compiled"]
        if self.breaks:
            parts.append("in several graphs")
        if self.aten:
            parts.append("with ATen's " + ", ".join(f"`{a}`" for a in self.aten))
        return " ".join(parts)


def check(row: Row, calls: int = 2) -> None:
    """See the module docstring."""
    torch._dynamo.reset()
    counters.clear()
    ours, plain = (copy.deepcopy(row.function) if isinstance(row.function, nn.Module) else row.function for _ in range(2))
    compiled = torch.compile(ours, backend="aicc", **row.options)
    seen: list[Compilation] = []
    with watching(compiled=seen.append), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for seed in range(calls):
            _compare(row, compiled, ours, plain, seed)
    assert (row.how == "compiled") == bool(seen), f"{len(seen)} graphs were compiled"
    externs = sorted({e["target"].removeprefix("aten.").removesuffix(".default") for c in seen for e in c.stats["externs"]})
    assert externs == sorted(set(row.aten) - (set() if TORCH >= (2, 12) else set(row.newer))), externs
    broken = {**counters["graph_break"], **counters["unimplemented"]}
    assert bool(broken) == row.breaks, broken
    messages = [str(w.message) for w in warned if "aicc" in str(w.message)]
    assert any(row.warns in m for m in messages) if row.warns else not messages, messages
    torch._dynamo.reset()


def _compare(row: Row, compiled: Callable[..., Any], ours: Any, plain: Any, seed: int) -> None:
    sides = []
    for call, owner in ((compiled, ours), (plain, plain)):
        torch.manual_seed(seed)
        args = row.make()
        if row.train:
            for t in _tensors(args):
                if t.is_leaf and (t.is_floating_point() or t.is_complex()):
                    t.requires_grad_()
        torch.manual_seed(seed + 100)
        with row.around():
            result = call(*args)
        shown = [*_tensors(args), *_tensors(result)]
        gradients: list[Any] = []
        if row.train:
            losses = [t.abs().square().sum() if t.is_complex() else t.double().square().sum() for t in _tensors(result) if t.requires_grad]
            torch.stack([loss.double() for loss in losses]).sum().backward()
            leaves = [*_tensors(args), *(owner.parameters() if isinstance(owner, nn.Module) else ())]
            gradients = [t.grad for t in leaves if t.is_leaf]
        state = list(owner.buffers()) if isinstance(owner, nn.Module) else []
        sides.append((result, args, gradients, state, _shared(shown)))
    (got, *rest, shared), (want, *wanted, expected) = sides
    close(got, want, row.tolerance)
    for a, b in zip(rest, wanted, strict=True):
        close(a, b, row.tolerance)
    if row.shares:
        assert shared == expected, "which tensors share memory"


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Values, types, shapes and strides; numbers and None as they are."""
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if not isinstance(b, Tensor):
            assert type(a) is type(b) and np.array_equal(a, b)
            continue
        assert type(a) is type(b) and a.requires_grad == b.requires_grad
        if a.is_nested:
            a, b = a.values(), b.values()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        if b.layout == torch.strided and b.numel() > 1 and type(b) in (Tensor, nn.Parameter):  # a stride along one element says nothing
            assert all(n == 1 or s == t for n, s, t in zip(b.shape, a.stride(), b.stride(), strict=True)), (a.stride(), b.stride())


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _shared(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Pairs that live in one storage. Tensors without elements share nothing."""
    where = [t.untyped_storage().data_ptr() if t.layout == torch.strided and type(t) is Tensor and t.numel() else None for t in tensors]
    return [(i, j) for i in range(len(where)) for j in range(i) if where[i] is not None and where[i] == where[j]]
