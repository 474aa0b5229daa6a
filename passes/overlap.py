"""Puts computation between the start of a collective and its end.

Before: functions as `schedule` takes them; a collective is an extern that starts it and one that waits for it (`backends/nccl/lower.py`).
After: the same ops, in an order that respects data flow. Collectives start in the given order, which is the same on every rank; one whose
operand is computed starts as soon as that is there, one whose operand is an argument where it was (passes over `dist` ops decide how far
ahead parameters are gathered). Waits come right before the first reader.

The order is made start by start: first what the next start needs, in the given order; whatever is not needed for it, such as gradients of weights,
is put off until a wait would leave the device idle, and fills that gap for as long as the collective is modelled to take. At most `most` ops are
put off, for they keep their operands alive; results that are only returned are waited for when more than `open` of them are on the way.

On CPUs every wait is right behind its start instead: gloo's threads take the cores that compute, and processes have died in them with several
collectives on the way (docs/distributed.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.core import Operation, Value
from ..ir.passes import Pass, PassContext, register
from ..ir.types import TensorType
from .storage import representative_symbols, size_at, storage_bytes

__all__ = ["Overlap", "is_start", "is_wait"]


LINK, MEMORY, FLOPS = 150e9, 2.5e12, 600e12
"""What the times on a GPU are modelled with: bytes/s of a collective and of memory, FLOP/s of products."""


def is_start(op: Operation) -> bool:
    """Whether the op starts a collective."""
    return op.name == "tensor.extern" and op["target"].startswith("_c10d_functional.")


def is_wait(op: Operation) -> bool:
    """Whether the op waits for a collective."""
    return op.name == "tensor.extern" and op["target"] == "aicc_dist.wait.default"


@register
@dataclass(frozen=True)
class Overlap(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "overlap"
    most: int = 8
    open: int = 2
    reach: int = 64

    def run(self, module: Operation, ctx: PassContext) -> None:
        for func in module.body:
            if func.name != "func" or not any(is_start(op) for op in func.body):
                continue
            terminator = func.body.terminator
            if not ctx.target.is_gpu:
                for op in _one_at_a_time(func.body.ops[:-1]):
                    op.move_before(terminator)
                ctx.remark("declined", f"'{func['sym_name']}': gloo moves bytes on the cores that compute, and has not survived several collectives "
                                       "at once: each ends where it starts")
                continue
            order = _Order(self, func)
            for op in order.run():
                op.move_before(terminator)
            ctx.remark("done", f"'{func['sym_name']}': {order.filled} ops moved between starts and waits; modelled to wait for "
                               f"{order.idle * 1e3:.3g} ms of {order.busy * 1e3:.3g} ms of collectives")


def _one_at_a_time(ops: Sequence[Operation]) -> Iterator[Operation]:
    """The ops in their order, every wait right behind its start."""
    waits = {op.operands[0].defining_op: op for op in ops if is_wait(op)}
    for op in ops:
        if not is_wait(op):
            yield op
            if op in waits:
                yield waits[op]


class _Order:
    def __init__(self, options: Overlap, func: Operation):
        self.options = options
        self.ops = func.body.ops[:-1]
        self.at = {op: i for i, op in enumerate(self.ops)}
        self.symbols = representative_symbols(func)
        self.before = {op: self._sources(op) for op in self.ops}
        last: dict[bool, Operation] = {}  # effects keep their order: collectives among themselves, others among themselves
        for op in self.ops:
            if op.name == "tensor.extern" and not is_wait(op) and (op["random"] or not op.results):
                kind = is_start(op)
                if kind in last:
                    self.before[op].append(last[kind])
                last[kind] = op
        self.done: dict[Operation, None] = {}
        self.clock = self.link_free = self.idle = self.busy = 0.0
        self.ends: dict[Operation, float] = {}  # start -> when it is modelled to be over
        self.filled = 0

    def _sources(self, op: Operation) -> list[Operation]:
        return list(dict.fromkeys(v.defining_op for v in op.operands if v.defining_op in self.at))  # type: ignore[misc]

    def run(self) -> list[Operation]:
        returned = [op for op in self.ops if is_wait(op) and all(u not in self.at for u in op.result.users)]
        for start in [op for op in self.ops if is_start(op)]:
            early = not self._computed(start)
            wanted = [op for op in self.ops[:self.at[start]] if op not in self.done] if early else self._ancestors(start)
            if early:  # it stays behind what was before it, but for what can be put off and what waits
                needed = set(self._ancestors(start))
                wanted = [op for op in wanted if op in needed or not self._can_wait(op)]
            for op in wanted:
                self._emit(op)
            self._emit(start)
            open_waits = [w for w in returned if w not in self.done and w.operands[0].defining_op in self.done]
            for wait in open_waits[:max(0, len(open_waits) - self.options.open)]:
                self._emit(wait)
            put_off = [op for op in self.ops[:self.at[start]] if op not in self.done and not is_wait(op) and not is_start(op)]
            for op in put_off[:max(0, len(put_off) - self.options.most)]:
                self._emit(op)
        for op in self.ops:
            if op not in returned:
                self._emit(op)
        for op in returned:
            self._emit(op)
        assert len(self.done) == len(self.ops), "the data flow has a cycle"
        return list(self.done)

    def _computed(self, start: Operation) -> bool:
        return any(v.defining_op is not None for v in start.operands)

    def _can_wait(self, op: Operation) -> bool:
        """Nothing else computes with its results: they are returned, as gradients are."""
        return is_wait(op) or (bool(op.results) and all(u not in self.at for r in op.results for u in r.users))

    def _ancestors(self, op: Operation) -> list[Operation]:
        """What `op` needs and has not been emitted, in the given order."""
        found: set[Operation] = set()
        stack = list(self.before[op])
        while stack:
            current = stack.pop()
            if current not in found and current not in self.done:
                found.add(current)
                stack.extend(self.before[current])
        return sorted(found, key=self.at.__getitem__)

    def _emit(self, op: Operation) -> None:
        """Appends what `op` needs, and `op`; a wait only after what can fill the time until it is over."""
        if op in self.done:
            return
        for needed in self._ancestors(op):
            if not is_wait(needed) or any(u in self.at for u in needed.result.users):
                self._one(needed)
        self._one(op)

    def _one(self, op: Operation) -> None:
        if op in self.done:
            return
        if is_wait(op):
            start = op.operands[0].defining_op
            assert start is not None
            self._fill(op, self.ends[start])
            self.idle += max(0.0, self.ends[start] - self.clock)
            self.clock = max(self.clock, self.ends[start])
        elif is_start(op):
            took = sum(map(self._bytes, (*op.operands, *op.results))) / 2 / LINK
            self.link_free = max(self.clock, self.link_free) + took
            self.busy += took
            self.ends[op] = self.link_free
        else:
            self.clock += self._seconds(op)
        self.done[op] = None

    def _fill(self, wait: Operation, until: float) -> None:
        for op in self._ready(self.at[wait] + self.options.reach):
            if self.clock >= until:
                return
            self._one(op)
            self.filled += 1

    def _ready(self, end: int) -> Iterator[Operation]:
        """Computation of which all operands are there, in the given order, up to a place; what reads nothing is not made early."""
        for op in self.ops[:end]:
            if op not in self.done and op.operands and not is_wait(op) and not is_start(op) and all(b in self.done for b in self.before[op]):
                yield op

    # -- modelled times

    def _bytes(self, v: Value) -> float:
        return float(size_at(storage_bytes(v.type), self.symbols)) if isinstance(v.type, TensorType) else 0.0

    def _seconds(self, op: Operation) -> float:
        moved = sum(map(self._bytes, (*op.operands, *op.results))) / MEMORY
        return max(moved, self._products(op) / FLOPS)

    def _products(self, op: Operation) -> float:
        """FLOPs of a matrix product: from the sizes of its three tensors, for [m, k] * [k, n] -> [m, n] has 2 sqrt(mk * kn * mn)."""
        if op.name != "tensor.library":
            return 0.0
        sizes: Sequence[float] = [self._elements(v) for v in (*op.operands[:2], op.results[0])]
        return 2.0 * (sizes[0] * sizes[1] * sizes[2]) ** 0.5

    def _elements(self, v: Value) -> float:
        return self._bytes(v) / v.type.dtype.bytes if isinstance(v.type, TensorType) else 0.0
