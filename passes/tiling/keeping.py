"""Where a value of one stage of a kernel waits for a later one.

A value that is needed again is computed again if that is cheap. Otherwise, or if it leaves the kernel anyway, it is kept: in memory of the
program's own when a row of it stays in the second-level cache, else in the output that it is, or one of its type that is written later (borrowed).
Memory of its own is better: an output that is read again cannot be written past the caches (`passes/nontemporal.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir import BufferType, Dim, Operation, Value, element_type, sym
from .emit import Emitter
from .frame import Frame, is_expensive

__all__ = ["Home", "choose_homes"]


@dataclass(frozen=True)
class Home:
    """A buffer, and the offset in it over the frame's dimensions; `private` if nobody else sees it."""

    buffer: Value
    offset: Dim
    private: bool


def choose_homes(frame: Frame, stores: Mapping[Value, Dim], buffers: Mapping[Value, Value], e: Emitter, order: list[str],
                 private_bytes: int) -> dict[Value, Home]:
    """Homes of the values that are worth keeping. `order` is the order of the inner loops, the fastest last; up to `private_bytes` are private."""
    made: dict[Value, Operation] = {r: op for op in frame.members for r in op.results}

    def needed_until(v: Value) -> int:
        return max((frame.stage[op] for op in frame.members if v in op.operands), default=-1)

    free = [r for r in stores if frame.is_full(made[r]) and needed_until(r) <= frame.stage[made[r]]]
    homes: dict[Value, Home] = {}
    for op in frame.members:
        if op["reductions"] or not frame.is_full(op):
            continue
        for r in op.results:
            until = needed_until(r)
            if until <= frame.stage[op] or not (r in stores or is_expensive(op)):
                continue
            elements, offset = _row(frame, order)
            size = elements * element_type(r.type).bytes if isinstance(elements, int) else private_bytes + 1
            if size <= private_bytes:
                private_bytes -= size
                homes[r] = Home(e.builder.op("tile.alloca", type=BufferType((elements,), element_type(r.type))), offset, True)
            elif r in stores:
                homes[r] = Home(buffers[r], stores[r], False)
            else:
                borrowed = next((f for f in free if element_type(f.type) == element_type(r.type) and frame.stage[made[f]] >= until), None)
                if borrowed is not None:
                    free.remove(borrowed)
                    homes[r] = Home(buffers[borrowed], stores[borrowed], False)
    return homes


def _row(frame: Frame, order: list[str]) -> tuple[Dim, Dim]:
    """Elements of the inner space, and the position in it."""
    total: Dim = 1
    offset: Dim = 0
    for f in reversed(order):
        offset = offset + sym(f) * total
        total = total * frame.sizes[f]
    return total, offset
