"""Putting the ops of a block back into a valid order."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from ..ir import Block, IRError, Operation, Trait, Value

__all__ = ["topological_sort"]


def topological_sort(block: Block) -> None:
    """Reorders the ops of `block` so that definitions come before uses, otherwise keeping the given order: of all ops whose operands are there, the
    one that was first comes next (Kahn's algorithm with a heap).

    IRError if the ops depend on each other in a circle.
    """
    ops = block.ops
    last = len(ops) - 1 if ops and ops[-1].has_trait(Trait.Terminator) else len(ops)
    position = {op: i for i, op in enumerate(ops)}
    needs = [{k for v in _used(op) if (k := position.get(v.defining_op, i)) != i} for i, op in enumerate(ops)]  # type: ignore[arg-type]
    if all(k < i for i, makers in enumerate(needs) for k in makers):
        return
    readers: list[list[int]] = [[] for _ in ops]
    for i, makers in enumerate(needs):
        for k in makers:
            readers[k].append(i)
    waits = [len(makers) for makers in needs]
    ready = [i for i in range(last) if not waits[i]]
    heapify(ready)
    order: list[int] = []
    while ready:
        order.append(at := heappop(ready))
        for i in readers[at]:
            waits[i] -= 1
            if not waits[i] and i != last:
                heappush(ready, i)
    if len(order) < last:
        stuck = ops[_in_circle(needs, next(i for i in range(last) if waits[i]), waits)]
        raise IRError(f"ops depend on each other in a circle, one of them is '{stuck.name}' at {stuck.location}")
    for op in ops:
        op.detach()
    for i in (*order, *range(last, len(ops))):
        block.append(ops[i])


def _used(op: Operation) -> Iterator[Value]:
    """What an op needs: its operands, and what its regions read from outside."""
    if not op.regions or op.has_trait(Trait.IsolatedFromAbove):
        yield from op.operands
        return
    for inner in op.walk():
        yield from inner.operands


def _in_circle(needs: list[set[int]], start: int, waits: list[int]) -> int:
    """Walking from an op that never became ready to another that it waits for comes back to one that was there before."""
    seen: set[int] = set()
    while start not in seen:
        seen.add(start)
        start = min(k for k in needs[start] if waits[k])
    return start
