"""How each tile value of a kernel is cut into chunks.

A tile is split into vectors of the target's lanes, except for left operands of `tile.dot` (and the elementwise chain from
their load): those are held element by element, because the outer product splats each of them.
"""

from __future__ import annotations

from ...ir.core import Operation, Value
from ...ir.opdef import Trait
from ...ir.target import Target
from ...ir.types import TileType, element_type
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
        return (1,) * size if v in self._by_element else split_widths(size, self.lanes)
