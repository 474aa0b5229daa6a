"""Orders the launches of a function so that little memory is alive at any time.

Before and after: functions of `tile.launch`, `tensor.library`, `tensor.constant`, `tensor.extern`, `tensor.assign` and `return`, with value
semantics. After: the same ops in an order that respects data flow, keeps externs with effects (random, or without results) in
their order, and whose peak of temporary bytes is never above that of the given order.

Programs with collectives keep the given order: there, distance between a start and its end is worth more (see `overlap.py`).

Candidates: the given order; greedy list scheduling (of the ready ops the one with the smallest allocated minus freed bytes,
ties by given order, no look-ahead); and a depth-first order from the results, which visits the operand
subtree with the larger surplus first (Sethi and Ullman 1970, generalised to graphs by Liu 1987). The best is kept.

What counts: values made and used inside the function. Arguments, returned values (memory of their own for the whole call),
constants and cached launches (they outlive the call) cost nothing. Symbolic sizes are compared at representative values; that
decides only which order is better, not what is right.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.core import Operation, Value
from ..ir.passes import Pass, PassContext, register
from ..ir.types import TensorType
from .overlap import is_start
from .storage import align, representative_symbols, size_at, storage_bytes

__all__ = ["Schedule", "peak_bytes"]


@register
@dataclass(frozen=True)
class Schedule(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "schedule"

    def run(self, module: Operation, ctx: PassContext) -> None:
        kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        for func in module.body:
            if func.name == "func":
                self._schedule(func, _Costs(func, kernels), ctx)

    def _schedule(self, func: Operation, costs: _Costs, ctx: PassContext) -> None:
        given = func.body.ops[:-1]
        graph = _Dependences(given)
        if any(is_start(op) for op in given):
            ctx.remark("declined", f"the order of '{func['sym_name']}' is left to `overlap`: it has collectives")
            return
        orders = {"given": given, "greedy": _greedy(graph, costs), "depth-first": _depth_first(graph, costs)}
        peaks = {name: costs.peak(order) for name, order in orders.items()}
        best = min(orders, key=lambda name: peaks[name])  # min keeps the first of equals: the given order
        text = ", ".join(f"{name} {peak}" for name, peak in peaks.items())
        if best == "given":
            ctx.remark("declined", f"the given order of '{func['sym_name']}' is kept; peak bytes: {text}")
            return
        terminator = func.body.terminator
        for op in orders[best]:
            op.move_before(terminator)
        ctx.remark("done", f"'{func['sym_name']}' ordered {best}; peak bytes: {text}")


class _Costs:
    """Bytes of values that live in temporary memory, and which launches may overwrite an operand."""

    def __init__(self, func: Operation, kernels: dict[str, Operation]):
        self.kernels = kernels
        symbols = representative_symbols(func)
        returned = set(func.body.terminator.operands)
        self.bytes: dict[Value, int] = {}
        for op in func.body:
            if op.name == "tensor.constant" or (op.name == "tile.launch" and op["cached"]):
                continue
            for r in op.results:
                if r not in returned and isinstance(r.type, TensorType):
                    self.bytes[r] = size_at(align(storage_bytes(r.type)), symbols)

    def reusable(self, op: Operation) -> list[tuple[Value, Value]]:
        """(operand, result) pairs that may share memory."""
        if op.name == "tensor.library" and "c" in op["roles"]:
            return [(op.operands[op["roles"].index("c")], op.result)]
        if op.name != "tile.launch":
            return []
        kernel = self.kernels.get(op["kernel"].name)
        n = len(op.operands)
        pairs = kernel["inplace"] if kernel is not None else ()
        return [(op.operands[i], op.results[j - n]) for i, j in pairs if i < n <= j < n + len(op.results)]

    def saved(self, op: Operation, dying: set[Value]) -> int:
        """Bytes not allocated because results take over operands that die here."""
        taken: set[Value] = set()
        total = 0
        for source, result in self.reusable(op):
            size = self.bytes.get(source, 0)
            if size and source in dying and not {source, result} & taken and self.bytes.get(result) == size:
                taken |= {source, result}
                total += size
        return total

    def peak(self, order: Sequence[Operation]) -> int:
        """The largest number of temporary bytes alive at once."""
        remaining = {v: len(v.users) for v in self.bytes}
        live = peak = 0
        for op in order:
            operands = {v for v in op.operands if v in remaining}
            dying = {v for v in operands if remaining[v] == 1}
            live += sum(self.bytes.get(r, 0) for r in op.results)
            peak = max(peak, live - self.saved(op, dying))
            for v in operands:
                remaining[v] -= 1
            live -= sum(self.bytes[v] for v in dying) + sum(self.bytes[r] for r in op.results if r in remaining and not r.uses)
        return peak


def peak_bytes(module: Operation, func: Operation) -> int:
    """The peak of temporary bytes of a function in its present order (symbolic sizes at representative values)."""
    kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
    return _Costs(func, kernels).peak(func.body.ops[:-1])


def _has_effect(op: Operation) -> bool:
    """Externs that must keep their order: they draw random numbers, or are there for their effect alone."""
    return op.name == "tensor.extern" and (bool(op["random"]) or not op.results)


class _Dependences:
    """Which op must come before which: data flow, and the chain of effects."""

    def __init__(self, ops: Sequence[Operation]):
        self.ops = list(ops)
        self.index = {op: i for i, op in enumerate(self.ops)}
        self.before: list[list[int]] = []
        self.after: list[list[int]] = [[] for _ in self.ops]
        last_effect: int | None = None
        for i, op in enumerate(self.ops):
            sources = dict.fromkeys(self.index[v.defining_op] for v in op.operands if v.defining_op is not None)
            if _has_effect(op):
                if last_effect is not None:
                    sources[last_effect] = None
                last_effect = i
            self.before.append(list(sources))
            for j in sources:
                self.after[j].append(i)


def _greedy(graph: _Dependences, costs: _Costs) -> list[Operation]:
    """List scheduling by the change in live bytes.

    The change an op makes shrinks as other users of its operands are scheduled, so its entry in the heap is renewed then.
    """
    waiting = [len(sources) for sources in graph.before]
    remaining = {v: len(v.users) for v in costs.bytes}
    done = [False] * len(graph.ops)
    heap: list[tuple[int, int]] = []

    def change(i: int) -> int:
        op = graph.ops[i]
        made = sum(costs.bytes.get(r, 0) for r in op.results if r.uses)
        return made - sum(costs.bytes[v] for v in set(op.operands) if remaining.get(v) == 1)

    def enter(i: int) -> None:
        if not waiting[i] and not done[i]:
            heapq.heappush(heap, (change(i), i))

    for i in range(len(graph.ops)):
        enter(i)
    order: list[Operation] = []
    while heap:
        estimate, i = heapq.heappop(heap)
        if done[i] or estimate != change(i):
            continue  # an older entry; a newer one is in the heap
        done[i] = True
        order.append(graph.ops[i])
        for v in set(graph.ops[i].operands):
            if v in remaining:
                remaining[v] -= 1
                if remaining[v] == 1:
                    for user in v.users:
                        if user in graph.index:
                            enter(graph.index[user])
        for j in graph.after[i]:
            waiting[j] -= 1
            enter(j)
    assert len(order) == len(graph.ops), "the data flow has a cycle"
    return order


def _depth_first(graph: _Dependences, costs: _Costs) -> list[Operation]:
    """Operands before ops, from the last op's operands back; among operands the one with the larger (peak - result) first."""
    need = [0] * len(graph.ops)
    kept = [sum(costs.bytes.get(r, 0) for r in op.results) for op in graph.ops]
    sources: list[list[int]] = []
    for i in range(len(graph.ops)):
        ordered = sorted(graph.before[i], key=lambda j: (kept[j] - need[j], j))
        sources.append(ordered)
        held = peak = 0
        for j in ordered:
            peak = max(peak, held + need[j])
            held += kept[j]
        need[i] = max(peak, held + kept[i])
    done = [False] * len(graph.ops)
    order: list[int] = []
    roots = [i for i in range(len(graph.ops)) if not graph.after[i]]
    for root in sorted(roots, key=lambda i: (kept[i] - need[i], i)):
        stack: list[tuple[int, bool]] = [(root, False)]
        while stack:
            i, expanded = stack.pop()
            if done[i]:
                continue
            if expanded:
                done[i] = True
                order.append(i)
                continue
            stack.append((i, True))
            stack.extend((j, False) for j in reversed(sources[i]) if not done[j])
    return [graph.ops[i] for i in order]
