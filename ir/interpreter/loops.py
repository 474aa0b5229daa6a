"""Loops of kernels with their iterations side by side.

`run_together` splits the body of a `tile.for` in two. What depends only on the induction variable, on values from outside and on
buffers that the kernel never writes is computed for many iterations at once, each a lane. The rest (what the carried
values need, and stores when something is carried or read back) runs iteration by iteration on slices of those results; when all of it is
`acc = acc + v`, max, min or a `tile.dot` onto the accumulator, it becomes one reduction. A loop that carries nothing and reads
nothing it may write runs whole.

The values are those of the sequential loop, up to the order in which floats are summed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..core import Operation, Value
from .context import WIDENED
from .tensor import combine

if TYPE_CHECKING:
    from .tile import Programs

Tensor = torch.Tensor

__all__ = ["run_together"]

LANES = 1 << 20
"""Elements of the largest tile of a kernel, times the lanes that run together."""

_FOLDS = {"arith.add": "sum", "arith.max": "max", "arith.min": "min"}


def run_together(p: Programs, op: Operation, iterations: range, state: list[Any]) -> list[Any]:
    """The carried values after all `iterations` (the same for all programs) of the `tile.for` op."""
    if len(iterations) < 2:
        return _one_by_one(p, op, iterations, state)
    free = _independent(op, p.written)
    alone = not state and _commutes(op, p.written)
    if not free and not alone:
        return _one_by_one(p, op, iterations, state)
    step = max(1, LANES // max(1, p.largest * len(p.ids)))
    for start in range(0, len(iterations), step):
        part = iterations[start:start + step]
        side = _expanded(p, op, part)
        if alone:
            side.run(op.body)
            continue
        for inner in op.body:
            if inner in free:
                side.run_op(inner)
        folded = _fold(p, op, free, side, state, len(part))
        state = folded if folded is not None else _dependent(p, op, free, side, part, state)
    return state


def _one_by_one(p: Programs, op: Operation, iterations: range, state: list[Any]) -> list[Any]:
    iv, *carried = op.body.args
    for i in iterations:
        p.env.update(zip([iv, *carried], [torch.tensor([i]), *state]))
        p.run(op.body)
        state = [p.env[v] for v in op.body.terminator.operands]
    return state


# -- what depends on what ---------------------------------------------------------------------------------------------

def _reads_only(op: Operation, written: frozenset[Value]) -> bool:
    """Whether the op, with all that it holds, writes nothing and reads no buffer in `written`."""
    return all(o.name not in ("tile.store", "tile.alloca") and not (o.name == "tile.load" and o.operands[0] in written) for o in op.walk())


def _commutes(op: Operation, written: frozenset[Value]) -> bool:
    """Whether the iterations read nothing that the kernel writes; their stores are then ordered by lane."""
    return all(o.name != "tile.alloca" and not (o.name == "tile.load" and o.operands[0] in written) for o in op.walk())


def _independent(op: Operation, written: frozenset[Value]) -> set[Operation]:
    """The ops of the loop's body that need no carried value and no memory that the kernel writes."""
    tainted: set[Value] = set(op.body.args[1:])
    free: set[Operation] = set()
    terminator = op.body.terminator
    for inner in op.body:
        if inner is terminator:
            break
        if _reads_only(inner, written) and not any(v in tainted for o in inner.walk() for v in o.operands):
            free.add(inner)
        else:
            tainted.update(inner.results)
    return free


# -- lanes ------------------------------------------------------------------------------------------------------------

def _expanded(p: Programs, op: Operation, part: range) -> Programs:
    """Lanes for all iterations in `part` of all programs, program-major, with the values that the body takes from outside."""
    programs, n = len(p.ids), len(part)

    def spread(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.shape[0] != programs:
            return x  # memory, or the same for all programs
        return x.unsqueeze(1).expand(programs, n, *x.shape[1:]).reshape(programs * n, *x.shape[1:])

    inside = {v for inner in op.body for o in inner.walk() for v in o.results}
    env = {v: spread(p.env[v]) for inner in op.body for o in inner.walk() for v in o.operands if v in p.env and v not in inside}
    env[op.body.args[0]] = torch.arange(part.start, part.stop, part.step).repeat(programs)
    active = None if p.active is None else spread(p.active.expand(programs))
    return replace(p, ids=spread(p.ids), lanes=spread(p.lanes), env=env, active=active, ordered=True)


def _by_iteration(x: Tensor, programs: int, n: int) -> Tensor:
    """A value of all lanes as [programs, n, ...]; of size 1 in both where it is the same in all."""
    return x.reshape(programs, n, *x.shape[1:]) if x.shape[0] == programs * n else x.unsqueeze(1)


def _dependent(p: Programs, op: Operation, free: set[Operation], side: Programs, part: range, state: list[Any]) -> list[Any]:
    """The rest of the body, iteration by iteration."""
    iv, *carried = op.body.args
    terminator = op.body.terminator
    rest = [inner for inner in op.body if inner not in free and inner is not terminator]
    results = {v for inner in free for v in inner.results}
    needed = {v for inner in [*rest, terminator] for o in inner.walk() for v in o.operands if v in results}
    values = {v: _by_iteration(side.env[v], len(p.ids), len(part)) for v in needed}
    for k, i in enumerate(part):
        p.env.update({v: x[:, k] if x.shape[1] > 1 else x[:, 0] for v, x in values.items()})
        p.env.update(zip([iv, *carried], [torch.tensor([i]), *state]))
        for inner in rest:
            p.run_op(inner)
        state = [p.env[v] for v in terminator.operands]
    return state


# -- accumulations ----------------------------------------------------------------------------------------------------

def _fold(p: Programs, op: Operation, free: set[Operation], side: Programs, state: list[Any], n: int) -> list[Any] | None:
    """The carried values after n iterations, when each is only accumulated into; None for any other loop."""
    terminator = op.body.terminator
    rest = [inner for inner in op.body if inner not in free and inner is not terminator]
    updates = [v.defining_op for v in terminator.operands]
    if len(set(updates)) != len(updates) or set(rest) != set(updates):
        return None
    new: list[Any] = []
    for carried, update, acc in zip(op.body.args[1:], updates, state):
        assert update is not None
        if list(carried.uses) != [(update, list(update.operands).index(carried))] or acc.dtype in WIDENED:
            return None
        others = [_by_iteration(side.env[v], len(p.ids), n) if v in side.env else None for v in update.operands if v is not carried]
        if any(x is None for x in others):
            return None
        values = [x.expand(-1, n, *x.shape[2:]) for x in others if x is not None]
        if update.name in _FOLDS:
            totals = [combine(_FOLDS[update.name], v.movedim(1, -1), v.dim() - 1) for v in values]
        elif update.name == "tile.dot" and update.operands[2] is carried:  # one dot product, n times as long
            totals = [values[0].permute(0, 2, 1, 3).flatten(2), values[1].flatten(1, 2)]
        else:
            return None
        new.append((update, carried, acc, totals))
    return [_accumulate(p, *entry) for entry in new]


def _accumulate(p: Programs, update: Operation, carried: Value, acc: Tensor, totals: list[Tensor]) -> Tensor:
    """`acc` after the op `update`, whose other operands are `totals` instead."""
    rest = iter(totals)
    p.env.update({v: acc if v is carried else next(rest) for v in update.operands})
    p.run_op(update)
    result: Tensor = p.env[update.result]
    return result
