"""Putting the ops of a block back into a valid order."""

from __future__ import annotations

import heapq

from ..ir import Block, IRError, Operation, Trait


def topological_sort(block: Block) -> None:
    """Reorders the ops of `block` so that definitions come before uses, otherwise keeping the given order.

    IRError if the ops depend on each other in a circle.
    """
    ops = block.ops
    position = {op: i for i, op in enumerate(ops)}
    waiting: dict[Operation, int] = {}
    readers: dict[Operation, list[Operation]] = {op: [] for op in ops}
    for op in ops:
        producers = {v.defining_op for inner in op.walk() for v in inner.operands if v.defining_op in position} - {op}
        if op is ops[-1] and op.has_trait(Trait.Terminator):
            producers |= set(ops[:-1])
        waiting[op] = len(producers)
        for p in producers:
            assert p is not None
            readers[p].append(op)
    ready = [position[op] for op in ops if waiting[op] == 0]
    heapq.heapify(ready)
    order: list[Operation] = []
    while ready:
        op = ops[heapq.heappop(ready)]
        order.append(op)
        for r in readers[op]:
            waiting[r] -= 1
            if waiting[r] == 0:
                heapq.heappush(ready, position[r])
    if len(order) != len(ops):
        stuck = next(op for op in ops if waiting[op])
        raise IRError(f"ops depend on each other in a circle, one of them is '{stuck.name}' at {stuck.location}")
    for op in order:
        op.detach()
    for op in order:
        block.append(op)
