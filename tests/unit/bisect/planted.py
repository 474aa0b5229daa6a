"""Faults to plant in the compiler, one at a time: each is a function of pytest's monkeypatch, with a program that the fault spoils.

`where` is what bisect must name, `line` what must stand on the Python line that it points at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.backends.llvm import arith as llvm_arith
from aicc.backends.llvm import host as llvm_host
from aicc.frontend.ops import TABLE
from aicc.ir import Operation, Value
from aicc.passes import absorb_views, bufferize, canonicalize, cse, fold_constants, fuse, pack, plan_memory, sink_reshapes, structured
from aicc.passes.decompose import RULES
from aicc.passes.decompose import elementwise as decompose_elementwise
from aicc.passes.tiling import loops

Plant = Callable[[pytest.MonkeyPatch], None]


_SEEDS = itertools.count()


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(next(_SEEDS)))


@dataclass(frozen=True)
class Planted:
    where: str
    line: str
    program: Callable[..., Any]
    inputs: tuple[torch.Tensor, ...]
    plant: Plant
    most_ops: int = 3
    train: bool = False
    target: str = "cpu"

    @property
    def file(self) -> str:
        """Where the program's lines are."""
        forward = type(self.program).forward if isinstance(self.program, torch.nn.Module) else self.program
        return forward.__code__.co_filename


# -- programs: something right around the line that goes wrong

def uses_rsqrt(x: torch.Tensor) -> torch.Tensor:
    y = x * x + 1
    z = torch.rsqrt(y)
    return z.tanh() + y.sum()


def uses_minus_one(x: torch.Tensor) -> torch.Tensor:
    y = torch.sin(x)
    z = y * -1
    return z.exp() + x


def two_sums(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    rows, columns = y.sum(0), y.sum(1)
    return (rows * 2 + columns).tanh()


def constants(x: torch.Tensor) -> torch.Tensor:
    table = torch.full((5,), 3.0).cumsum(0)
    shift = torch.full((5,), 3.0) * torch.full((5,), 2.0)
    return x.sin() * table + shift


def uses_relu(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x @ w
    a = torch.relu(h)
    return a.sum(-1) + h.mean(-1)


def transposed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = y.cos()
    t = x.t()
    return t * z + y


def chain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a = torch.sin(x) - y
    b = a.t().contiguous()
    return (b * 3).sum(1)


def reshaped_sum(x: torch.Tensor) -> torch.Tensor:
    s = x.sum(-1)
    v = s.reshape(4, 4)
    return v.exp()


def ragged_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.tanh()
    out = F.linear(h, w)
    return out * 2


def difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a = (x.exp() - y).sum(1, keepdim=True)
    return (x - y) * a


def ragged(x: torch.Tensor) -> torch.Tensor:
    h = x.exp()
    return h.sum(-1) + 1


def updated(x: torch.Tensor) -> torch.Tensor:
    z = x @ x
    w = x @ z
    x.copy_(z)
    return w.sum(0)


def deep(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    a = x @ w
    b = torch.relu(a) @ w
    c = b @ a
    return c @ a + b


def uses_floor_division(x: torch.Tensor) -> torch.Tensor:
    n = (x * 10).to(torch.int64)
    q = n // 3
    return q + n


# -- faults

def _wrong_row(m: pytest.MonkeyPatch) -> None:
    m.setitem(TABLE, "aten.rsqrt.default", lambda c, x: c.ew("sqrt", x))


def _sign_forgotten(m: pytest.MonkeyPatch) -> None:
    m.setattr(canonicalize, "_same", lambda a, b: a is not None and abs(a) == abs(b))


def _attributes_forgotten(m: pytest.MonkeyPatch) -> None:
    m.setattr(cse, "_key", lambda op: (op.name, tuple(id(v) for v in op.operands), tuple(r.type for r in op.results), op.name.startswith("arith.") and id(op)))


def _folds_one_off(m: pytest.MonkeyPatch) -> None:
    true = fold_constants.interpret_op

    def wrong(op: Operation, operands: Any) -> list[Any]:
        return [x + 1e-3 if op.name == "graph.mul" else x for x in true(op, operands)]
    m.setattr(fold_constants, "interpret_op", wrong)


def _leaky_relu(m: pytest.MonkeyPatch) -> None:
    def rule(b: Any, op: Operation) -> list[Value]:
        return decompose_elementwise._elementwise(lambda i, x: i.arith("max", x, 1e-3))(b, op)
    m.setitem(RULES, "graph.relu", rule)


def _reversed_map(m: pytest.MonkeyPatch, module: Any) -> None:
    true = module.composed_map
    m.setattr(module, "composed_map", lambda outer, inner, bounds: tuple(reversed(made)) if len(made := true(outer, inner, bounds)) == 2 else made)


def _short_panel(m: pytest.MonkeyPatch) -> None:
    true = pack._packing_body
    m.setattr(pack, "_packing_body", lambda panel, lane, nr, n: true(panel, lane, nr, n - 1))


def _operands_swapped(m: pytest.MonkeyPatch) -> None:
    true = fuse.Fuse.run

    def wrong(self: Any, module: Operation, ctx: Any) -> None:
        true(self, module, ctx)
        for op in module.walk():
            if op.name == "tensor.fused" and len(op.body) > 2 and op.operands[0].type == op.operands[1].type:
                a, b = op.operands[:2]
                op.set_operand(0, b)
                op.set_operand(1, a)
    m.setattr(fuse.Fuse, "run", wrong)


def _reduction_unmasked(m: pytest.MonkeyPatch) -> None:
    m.setattr(loops.Lowering, "_active", lambda self, scope, offset: [])
    true = loops.Lowering._load

    def wrong(self: Any, scope: Any, v: Any, m_: Any, positions: Any, fill: Any) -> Value:
        return true(self, scope, v, m_, {**positions, "d1": 0}, fill)
    m.setattr(loops.Lowering, "_load", wrong)


def _writes_too_early(m: pytest.MonkeyPatch) -> None:
    m.setattr(bufferize._Bufferizer, "_may_write_directly", lambda self, target, v: True)


def _everything_at_zero(m: pytest.MonkeyPatch) -> None:
    true = plan_memory.fit

    def wrong(blocks: Any, effort: int) -> Any:
        placed = true(blocks, effort)
        return type(placed)(**{**vars(placed), "offsets": [0] * len(placed.offsets)})
    m.setattr(plan_memory, "fit", wrong)
    m.setattr(plan_memory, "check_plan", lambda func, kernels: None)  # it would say so at once


def _floors_towards_zero(m: pytest.MonkeyPatch) -> None:
    m.setitem(llvm_arith.TABLE, "floordiv", {**llvm_arith.TABLE["floordiv"], "i": llvm_arith.TABLE["truncdiv"]["i"]})


def _slots_shifted(m: pytest.MonkeyPatch) -> None:
    """The host code takes the second of two slots to be where the first is."""
    true = llvm_host._Segment._pointer

    def wrong(self: Any, v: Value) -> Any:
        op = v.defining_op
        if op is not None and op.name == "host.slot" and op["offset"] != 0:
            op = op.clone()
            op.attributes["offset"] = 0
            v = op.result
        return true(self, v)
    m.setattr(llvm_host._Segment, "_pointer", wrong)


PLANTED: dict[str, Planted] = {
    "importer": Planted("import", "torch.rsqrt(y)", uses_rsqrt, (r(6, 7),), _wrong_row),
    "canonicalize": Planted("canonicalize", "y * -1", uses_minus_one, (r(6, 7),), _sign_forgotten),
    "cse": Planted("cse", "y.sum(0), y.sum(1)", two_sums, (r(6, 6),), _attributes_forgotten),
    "fold-constants": Planted("fold-constants", "torch.full((5,), 2.0)", constants, (r(5),), _folds_one_off),
    "decompose": Planted("decompose", "torch.relu(h)", uses_relu, (r(6, 8), r(8, 5)), _leaky_relu),
    "absorb-views": Planted("absorb-views", "t * z", transposed, (r(6, 6), r(6, 6)), lambda m: _reversed_map(m, absorb_views)),
    "inline": Planted("inline", "", chain, (r(6, 6), r(6, 6)), lambda m: _reversed_map(m, structured)),
    "sink-reshapes": Planted("sink-reshapes", "v.exp()", reshaped_sum, (r(16, 16),), lambda m: _reversed_map(m, sink_reshapes)),
    "pack": Planted("pack", "F.linear(h, w)", ragged_linear, (r(9, 24), r(21, 24)), _short_panel),
    "fuse": Planted("fuse", "", difference, (r(6, 8), r(6, 8)), _operands_swapped),
    "tile": Planted("tile", "h.sum(-1)", ragged, (r(6, 37),), _reduction_unmasked),
    "bufferize": Planted("bufferize", "x.copy_(z)", updated, (r(24, 24),), _writes_too_early, 4),
    "plan-memory": Planted("plan-memory", "", deep, (r(24, 24), r(24, 24)), _everything_at_zero, 5),
    "llvm": Planted("llvm", "n // 3", uses_floor_division, (r(50),), _floors_towards_zero),
    "program": Planted("program", "", deep, (r(24, 24), r(24, 24)), _slots_shifted, 5),
}
