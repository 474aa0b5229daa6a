"""Translation validation: the sharded program against the whole one, value by value, in float64.

    report = validate(module, partitioned, mesh, order, arguments, inputs)
    report.ok, report.first        # the first op whose value differs, with its line of Python

The whole module runs in the reference interpreter; the partitioned one on all virtual ranks at once. Every value of the partitioned
module that stands for a value of the whole one (`Partitioned.origin`) is put together from the ranks and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.core import IRError, Operation, Value
from ...ir.interpreter import HANDLERS
from ...ir.interpreter.context import Context, Numerics
from ...ir.sharding import Mesh, Placement
from .partition import Partitioned
from .virtual import assemble, disassemble, run_virtual

__all__ = ["Difference", "Report", "compare_results", "run_whole", "validate"]

Tensor = torch.Tensor
TOLERANCE = 1e-8
"""Relative to the largest element: float64 leaves about 1e-15 for sums in another order."""


@dataclass(frozen=True)
class Difference:
    """An op whose value differs: its text, its place in the program, by how much (relative) or why it cannot be compared."""

    op: str
    location: str
    error: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.op}\n  at {self.location}\n  {self.note or f'relative difference {self.error:.2e}'}"


@dataclass(frozen=True)
class Report:
    """compared: how many values; worst: the largest relative difference among them; first: the first op that differs, in program order."""

    compared: int
    worst: float
    first: Difference | None = None

    @property
    def ok(self) -> bool:
        return self.first is None


@torch.no_grad()
def run_whole(module: Operation, inputs: Sequence[Tensor], precision: torch.dtype | None = torch.float64) -> dict[Value, Any]:
    """Every value of a module's only function, by the reference interpreter."""
    func = next(op for op in module.body if op.name == "func")
    ctx = Context(HANDLERS, Numerics(precision))
    env: dict[Value, Any] = {a: ctx.to_type(x.detach(), a.type) for a, x in zip(func.body.args, inputs, strict=True)}
    for op in func.body:
        if op is func.body.terminator:
            break
        for r, x in zip(op.results, ctx.run_op(op, [env[v] for v in op.operands])):
            env[r] = x
    for target, value in ctx.assignments:
        env[target] = value
    return env


def validate(module: Operation, partitioned: Partitioned, mesh: Mesh, order: Sequence[str], arguments: Sequence[Mapping[str, Placement]],
             inputs: Sequence[Tensor], *, pieces: Sequence[Sequence[Tensor]] | None = None,
             results: Sequence[Mapping[str, Placement] | None] = ()) -> Report:
    """Compares the two on `inputs` (whole tensors, one per argument). order: the axes in the order in which they cut.

    pieces: what each argument is on each rank, where that is not to be cut from `inputs` (planted faults). results: the placements that
    the returned values are claimed to have: they are compared too.
    """
    whole = run_whole(module, inputs)
    per_argument = pieces or [disassemble(x, mesh, dict(p), order) for x, p in zip(inputs, arguments, strict=True)]
    state = _State(partitioned, mesh, order, whole)
    try:
        got = run_virtual(partitioned.module, mesh, [[p[r] for p in per_argument] for r in range(mesh.ranks)], precision=torch.float64,
                          watch=state.watch)
    except IRError as e:
        first = state.first or Difference("", "", float("inf"), f"the sharded program does not run: {e}")
        return Report(state.compared, float("inf"), first)
    func = next(op for op in module.body if op.name == "func")
    for i, placement in enumerate(results):
        if placement is not None and state.first is None:
            want = whole[func.body.terminator.operands[i]]
            state.compare([g[i] for g in got], want, dict(placement), f"result {i}", "the function's results")
    return Report(state.compared, state.worst, state.first)


class _State:
    def __init__(self, partitioned: Partitioned, mesh: Mesh, order: Sequence[str], whole: dict[Value, Any]):
        self.partitioned, self.mesh, self.order, self.whole = partitioned, mesh, order, whole
        self.compared, self.worst = 0, 0.0
        self.first: Difference | None = None

    def watch(self, op: Operation, envs: list[dict[Value, Any]]) -> None:
        if self.first is not None:
            return
        for r in op.results:
            found = self.partitioned.origin.get(r)
            if found is not None and found[0] in self.whole:
                text = str(op).split("\n", 1)[0][:300]
                self.compare([env[r] for env in envs], self.whole[found[0]], found[1], text, str(op.location), CANCELLED * self._operands(op))

    def _operands(self, op: Operation) -> float:
        """The largest magnitude among the op's operands, of those that the whole program has too."""
        known = [self.whole[o[0]] for v in op.operands if (o := self.partitioned.origin.get(v)) is not None and o[0] in self.whole]
        sizes = [float(x.abs().nan_to_num(0.0, 0.0).max()) for x in known if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
        return max(sizes, default=0.0)

    def compare(self, xs: list[Tensor], want: Tensor, placement: dict[str, Placement], text: str, location: str,
                floor: float = 0.0) -> None:
        self.compared += 1
        try:
            got = assemble(xs, self.mesh, placement, self.order)
        except (IRError, RuntimeError) as e:
            self.first = Difference(text, location, float("inf"), str(e))
            return
        error = compare_results(got, want, floor)
        self.worst = max(self.worst, error)
        if error > TOLERANCE:
            self.first = Difference(text, location, error)


CANCELLED = 1e-3
"""A result this much smaller than what it was computed from is what cancellation left: its error is measured against the operands."""


def compare_results(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """The largest difference relative to the largest element (or to `floor`, if that is larger); infinite if shapes or infinities differ."""
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    a, b = got.to(torch.float64), want.to(torch.float64)
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
    return float((a - b).abs().max() / b.abs().max().clamp_min(max(floor, 1e-30)))
