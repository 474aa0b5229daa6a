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

__all__ = ["Home", "choose_homes", "kept_values"]


@dataclass(frozen=True)
class Home:
    """A buffer, and the offset in it over the frame's dimensions; `private` if nobody else sees it."""

    buffer: Value
    offset: Dim
    private: bool


def kept_values(frame: Frame) -> list[tuple[Value, int, int, int]]:
    """(value, bytes of an element, the stage that makes it, the last that needs it) of what is worth keeping between stages."""
    found: list[tuple[Value, int, int, int]] = []
    for op in frame.members:
        if op["reductions"] or not frame.is_full(op):
            continue
        for r in op.results:
            until = _needed_until(frame, r)
            if until > frame.stage[op] and (r in frame.outputs or is_expensive(op)):
                found.append((r, element_type(r.type).bytes, frame.stage[op], until))
    return found


def choose_homes(frame: Frame, buffers: Mapping[Value, Value], e: Emitter, order: list[str], private_bytes: int, row: str = "",
                 side: int = 1) -> dict[Value, Home]:
    """Homes of the values that are worth keeping. `order` is the order of the inner loops, the fastest last; up to `private_bytes` are private.
    With `row`, a dimension of which several points are under way (`row_pipeline.py`), `side` at each stage, each of those has a place of its own."""
    made: dict[Value, Operation] = {r: op for op in frame.members for r in op.results}
    stores = {x.value: x.offset for x in frame.accesses if x.is_store}
    free = [r for r in stores if frame.is_full(made[r]) and _needed_until(frame, r) <= frame.stage[made[r]]]
    homes: dict[Value, Home] = {}
    for r, width, stage, until in kept_values(frame):
        elements, offset = _row(frame, order)
        places = (until - stage) * side if row else 1
        size = elements * places * width if isinstance(elements, int) else private_bytes + 1
        if size <= private_bytes:
            private_bytes -= size
            if places > 1:
                offset = offset + sym(row) % places * elements
            homes[r] = Home(e.builder.op("tile.alloca", type=BufferType((elements * places,), element_type(r.type))), offset, True)
        elif r in stores:
            homes[r] = Home(buffers[r], stores[r], False)
        else:
            borrowed = next((f for f in free if element_type(f.type) == element_type(r.type) and frame.stage[made[f]] >= until), None)
            if borrowed is not None:
                free.remove(borrowed)
                homes[r] = Home(buffers[borrowed], stores[borrowed], False)
    return homes


def _needed_until(frame: Frame, v: Value) -> int:
    return max((frame.stage[op] for op in frame.members if v in op.operands), default=-1)


def _row(frame: Frame, order: list[str]) -> tuple[Dim, Dim]:
    """Elements of the inner space, and the position in it."""
    total: Dim = 1
    offset: Dim = 0
    for f in reversed(order):
        offset = offset + sym(f) * total
        total = total * frame.sizes[f]
    return total, offset
