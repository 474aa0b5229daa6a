"""Loops of kernels with their iterations side by side.

`run_loop` splits the body of a `tile.for` in two. What depends only on the induction variable, on values from outside and
on buffers that the kernel never writes is computed for many iterations at once, each a lane. The rest (what the carried values
need, and stores when something is carried or read back) runs iteration by iteration on slices of those results; when all of it
is `acc = acc + v`, max, min or a `tile.dot` onto the accumulator, it becomes one reduction. A loop that carries nothing and
reads nothing it may write runs whole. Where programs leave a loop at different times, those that are done are masked.

The values are those of the sequential loop, up to the order in which floats are summed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..core import Operation, Value
from .arith import select
from .context import WIDENED
from .tensor import combine

if TYPE_CHECKING:
    from .tile import Programs

Tensor = torch.Tensor

__all__ = ["lift", "run_loop"]

LANES = 1 << 20
"""Elements of the largest tile of a kernel, times the lanes that run together."""

_FOLDS = {"arith.add": "sum", "arith.max": "max", "arith.min": "min"}


def run_loop(p: Programs, op: Operation, lower: Tensor, upper: Tensor, state: list[Any]) -> list[Any]:
    """The carried values after the `tile.for` op, whose bounds are [1] or, where programs differ, [P]."""
    counts = (upper - lower + (op["step"] - 1)) // op["step"]
    count = max(0, int(counts.max()))
    same = count == 0 or bool((counts == count).all())
    alone = not state and _commutes(op, p.written)
    if not same and not alone:
        return _run_masked(p, op, lower, upper, state)
    free = _independent(op, p.written)
    if count < 2 or not (free or alone):
        return _one_by_one(p, op, lower, count, state)
    together = max(1, LANES // max(1, p.largest * len(p.ids)))
    for start in range(0, count, together):
        part = range(start, min(start + together, count))
        side = _expanded(p, op, lower, part)
        if not same:
            last = _spread(upper.expand(len(p.ids)), len(p.ids), len(part))
            running = side.env[op.body.args[0]] < last
            side = replace(side, active=running if side.active is None else running & side.active)
        if alone:
            side.run(op.body)
            continue
        for inner in op.body:
            if inner in free:
                side.run_op(inner)
        folded = _fold(p, op, free, side, state, len(part))
        state = folded if folded is not None else _dependent(p, op, free, side, lower, part, state)
    return state


def _run_masked(p: Programs, op: Operation, lower: Tensor, upper: Tensor, state: list[Any]) -> list[Any]:
    """A loop that some programs leave before others."""
    iv, *carried = op.body.args
    outer = p.active
    at = lower.expand(torch.broadcast_shapes(lower.shape, upper.shape))
    while True:
        running = at < upper if outer is None else (at < upper) & outer
        if not bool(running.any()):
            p.active = outer
            return state
        p.env.update(zip([iv, *carried], [at, *state]))
        p.active = running
        p.run(op.body)
        new = [p.env[v] for v in op.body.terminator.operands]
        state = [select(lift(running, x.dim() - 1), x, old) for x, old in zip(new, state)]
        at = at + op["step"]


def _one_by_one(p: Programs, op: Operation, lower: Tensor, count: int, state: list[Any]) -> list[Any]:
    iv, *carried = op.body.args
    for k in range(count):
        p.env.update(zip([iv, *carried], [lower + k * op["step"], *state]))
        p.run(op.body)
        state = [p.env[v] for v in op.body.terminator.operands]
    return state


# -- what depends on what ---------------------------------------------------------------------------------------------

def _reads_only(op: Operation, written: frozenset[Value]) -> bool:
    """Whether the op, with all that it holds, writes nothing and reads no buffer in `written`."""
    return _commutes(op, written) and all(o.name != "tile.store" for o in op.walk())


def _commutes(op: Operation, written: frozenset[Value]) -> bool:
    """Whether the iterations read nothing that the kernel writes; their stores are then ordered by lane."""
    return all(o.name not in ("tile.alloca", "tile.sort") and not (o.name == "tile.load" and o.operands[0] in written) for o in op.walk())


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

def lift(x: Tensor, rank: int) -> Tensor:
    """A scalar of every program as a tile of size 1; tiles as they are."""
    return x.reshape(x.shape[0], *(1,) * rank) if x.dim() == 1 else x


def _spread(x: Any, programs: int, n: int) -> Any:
    """A value of all programs repeated for n iterations of each; memory, and what is the same for all programs, as it is."""
    if not isinstance(x, Tensor) or x.shape[0] != programs:
        return x
    return x.unsqueeze(1).expand(programs, n, *x.shape[1:]).reshape(programs * n, *x.shape[1:])


def _expanded(p: Programs, op: Operation, lower: Tensor, part: range) -> Programs:
    """Lanes for the iterations numbered in `part` of all programs, program-major, with the values taken from outside."""
    programs, n = len(p.ids), len(part)
    inside = {v for inner in op.body for o in inner.walk() for v in o.results}
    outside = {v for inner in op.body for o in inner.walk() for v in o.operands if v in p.env and v not in inside}
    env = {v: _spread(p.env[v], programs, n) for v in outside}
    numbers = torch.arange(part.start, part.stop) * op["step"]
    env[op.body.args[0]] = (lower.expand(programs).unsqueeze(1) + numbers).reshape(-1)
    active = None if p.active is None else _spread(p.active.expand(programs), programs, n)
    ids, lanes = (_spread(x, programs, n) for x in (p.ids, p.lanes))
    return replace(p, ids=ids, lanes=lanes, env=env, active=active, ordered=True)


def _by_iteration(x: Tensor, programs: int, n: int) -> Tensor:
    """A value of all lanes as [programs, n, ...]; of size 1 in both where it is the same in all."""
    return x.reshape(programs, n, *x.shape[1:]) if x.shape[0] == programs * n else x.unsqueeze(1)


def _dependent(p: Programs, op: Operation, free: set[Operation], side: Programs, lower: Tensor, part: range,
               state: list[Any]) -> list[Any]:
    """The rest of the body, iteration by iteration."""
    iv, *carried = op.body.args
    terminator = op.body.terminator
    rest = [inner for inner in op.body if inner not in free and inner is not terminator]
    results = {v for inner in free for v in inner.results}
    needed = {v for inner in [*rest, terminator] for o in inner.walk() for v in o.operands if v in results}
    values = {v: _by_iteration(side.env[v], len(p.ids), len(part)) for v in needed}
    for k, number in enumerate(part):
        p.env.update({v: x[:, k] if x.shape[1] > 1 else x[:, 0] for v, x in values.items()})
        p.env.update(zip([iv, *carried], [lower + number * op["step"], *state]))
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
        others = [v for v in update.operands if v is not carried]
        if not all(v in side.env for v in others):
            return None
        values = [_by_iteration(side.env[v], len(p.ids), n) for v in others]
        values = [x.expand(-1, n, *x.shape[2:]) for x in values]
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
