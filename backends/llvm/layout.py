"""How each tile value of a kernel is cut into chunks.

A tile is split into vectors of the target's lanes, except for left operands of `tile.dot` (and the elementwise chain from
their load): those are held element by element, because the outer product splats each of them.

What is read from memory for the first time (`streamed` loads), and what is computed with it, is cut into half vectors where a vector is a whole cache
line: hardware that looks ahead counts accesses, and two per line make it ask for more (a Zen 4 sums 64 MB by 17 to 30 % faster, a Sapphire Rapids by
20; touching the second half of each line with a scalar load gains the same). From the caches, whole lines are better: half the instructions.
"""

from __future__ import annotations

from ...ir.core import Operation, Value
from ...ir.opdef import Trait
from ...ir.target import Target
from ...ir.types import BufferType, TileType, element_type
from .nontemporal import LINE
from .values import split_widths

__all__ = ["Layouts", "kernel_lanes"]


def kernel_lanes(kernel: Operation, target: Target) -> int:
    """Lanes of a full vector: as many f32 as a register holds, or f64 where a kernel computes in those."""
    wide = any(element_type(r.type).name == "f64" for op in kernel.walk() for r in op.results if op is not kernel)
    return max(1, target.lanes(64 if wide else 32))


class Layouts:
    """Chunk widths by SSA value."""

    def __init__(self, kernel: Operation, lanes: int):
        self.lanes = lanes
        self._by_element: set[Value] = set()
        self._halved = _with_streams(kernel, lanes)
        for op in kernel.walk():
            if op.name == "tile.dot":
                self._mark(op.operands[0])

    def _mark(self, v: Value) -> None:
        """Holds `v` by element if dots (as left operand) and such elementwise ops are its only users."""
        if any(not self._wants_elements(op, v) for op in v.users):
            return
        op = v.defining_op
        if op is None or not (op.name == "tile.load" or op.has_trait(Trait.Elementwise)):
            return
        self._by_element.add(v)
        if op.has_trait(Trait.Elementwise):
            for x in op.operands:
                if isinstance(x.type, TileType) and x.type.shape == v.type.shape:  # type: ignore[attr-defined]
                    self._mark(x)

    def _wants_elements(self, op: Operation, v: Value) -> bool:
        if op.name == "tile.dot":
            return v is op.operands[0] and v is not op.operands[1] and v is not op.operands[2]
        return len(op.results) == 1 and op.result in self._by_element

    def widths(self, v: Value) -> tuple[int, ...]:
        """The chunk widths of a tile value."""
        assert isinstance(v.type, TileType)
        size: int = v.type.shape[-1]  # type: ignore[assignment]
        return (1,) * size if v in self._by_element else split_widths(size, self.lanes // 2 if v in self._halved else self.lanes)


def _with_streams(kernel: Operation, lanes: int) -> set[Value]:
    """The values that are computed chunk by chunk with streamed loads of whole lines."""
    found: set[Value] = set()
    pending: list[Value] = [op.result for op in kernel.walk() if op.name == "tile.load" and op["streamed"] and _is_line(op, lanes)]
    while pending:
        v = pending.pop()
        if v in found:
            continue
        found.add(v)
        owner = v.defining_op
        size = v.type.shape[-1]  # type: ignore[attr-defined]
        for op in [*v.users, *([owner] if owner is not None else [])]:
            pending += [x for x in _beside(op, v) if isinstance(x.type, TileType) and x.type.shape[-1] == size]
    return found


def _is_line(load: Operation, lanes: int) -> bool:
    t, buffer = load.result.type, load.operands[0].type
    assert isinstance(buffer, BufferType)
    return isinstance(t, TileType) and isinstance(n := t.shape[-1], int) and n % lanes == 0 and lanes * buffer.dtype.bytes == LINE


def _beside(op: Operation, v: Value) -> list[Value]:
    """What an op computes of a chunk of `v`, and the other way round."""
    if op.has_trait(Trait.Elementwise):
        return [*op.operands, *op.results]
    if op.name == "tile.for":
        first = op["indices"]
        return [x for n, result in enumerate(op.results)
                for group in [(op.operands[first + n], op.body.args[n + 1], op.body.terminator.operands[n], result)] if v in group for x in group]
    if op.name == "tile.yield" and op.parent_op is not None and op.parent_op.name == "tile.for":
        return _beside(op.parent_op, v)
    return []
