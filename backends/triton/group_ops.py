"""Tile ops in Gluon, on the rows of one group of warps: what the plain printer has, with layouts.

Half of a program's rows are a group's; `who` (0 or 1) says which. Tiles are in `layout`, which the matrix units have, or in `part` where only half of
a step's columns are computed (the same registers as half of the other); results are stored in the layout `stored`, in which a thread writes 16 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...ir.core import Operation, Value
from ...ir.expr import as_int, product
from ...ir.types import TileType, element_type
from .arith import literal
from .expressions import IndexText
from .printer import Printer
from .stream_shape import HALF, ROWS, Declined, require

__all__ = ["GroupOps", "in_gluon"]


class GroupOps(Printer):
    """Prints single ops. `program` is the name of the number of the program that they belong to."""

    program = "program"
    store_layout = False
    half: int | None = None
    """Which half of a step's columns ops are printed for; None: all."""
    steps = 0
    columns: int

    def _begin(self) -> None:
        self.positions: dict[tuple[int, int, int, str], str] = {}

    def _one(self, op: Operation) -> None:
        handler = _HANDLERS.get(op.name)
        if handler is not None:
            handler(self, op)
        elif op.name.startswith("arith."):
            self._arith(op)
        else:
            raise Declined(f"'{op.name}' has no form in Gluon")

    def _local(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(HALF if k == 0 and n == ROWS or k == 1 and n == self.steps and self.half is not None else n for k, n in enumerate(shape))

    def _text(self, operands: Sequence[Value], shape: Sequence[int]) -> IndexText:
        text = super()._text(operands, self._local(shape))
        if shape and shape[0] == ROWS:
            text.bounds["t0"] = (0, ROWS - 1)
        if self.half is not None and len(shape) == 2 and shape[1] == self.steps:
            text.bounds["t1"] = (0, self.steps - 1)
        return text

    def _arange(self, axis: int, size: int, rank: int) -> str:
        require(rank == 2, "tiles of other ranks")
        layout = "stored" if self.store_layout else self._layout()
        key = (axis, size, rank, layout)
        if key not in self.positions:
            name = f"{'row' if axis == 0 else 'col'}{size}{'' if layout == 'layout' else f'_{layout}'}"
            while name in self.taken:
                name += "_"
            self.taken.add(name)
            self.positions[key] = name
        return self.positions[key] if axis == 0 or not self.half else f"({self.positions[key]} + {HALF * self.half})"

    def _layout(self) -> str:
        return "layout" if self.half is None else "part"

    def _spread(self, text: str, shape: Sequence[int], reached: Sequence[int] | None) -> str:
        """Operands of Gluon's operators broadcast by themselves."""
        return text

    def _define(self, op: Operation, text: str) -> None:
        super()._define(op, in_gluon(text))

    def _constant(self, value: str, kind: str) -> str:
        return f"gl.cast({value}, {kind})"

    def program_id(self, op: Operation) -> None:
        grid, axis = self.kernel["grid"], op["axis"]
        below, size = as_int(product(grid[axis + 1:])), grid[axis]
        self.ranges[op.result] = (0, size - 1)
        text = self.program + (f" // {below}" if below != 1 else "") + (f" % {size}" if any(n != 1 for n in grid[:axis]) else "")
        self._define(op, text if size != 1 else "0")

    def full(self, op: Operation) -> None:
        assert isinstance(op.result.type, TileType)
        value, shape = op.operands[0], self._local(op.result.type.shape)  # type: ignore[arg-type]
        dtype = self._type(element_type(op.result.type))
        if isinstance(value.type, TileType):
            self._define(op, f"gl.full([{shape[0]}, {shape[1]}], 0, {dtype}, layout={self._layout()}) + {self._use(value)}")
        else:
            self._define(op, f"gl.full([{shape[0]}, {shape[1]}], {self._use(value)}, {dtype}, layout={self._layout()})")

    def mask(self, op: Operation) -> None:
        text, _ = self._mask(op["mask"], (), op.operands, self._text(op.operands, op["shape"]))
        self._define(op, text)

    def load(self, op: Operation) -> None:
        require(not op["check"], "an index is checked")
        text = self._text(op.operands[1:], op["shape"])
        mask, _ = self._mask(op["mask"], op["mask_low"], op.operands[1:], text)
        masked = f", mask={mask}, other={literal(op['other'])}" if mask else ""
        self._define(op, f"gl.load({self._name(op.operands[0])} + ({text(op['offset'])}){masked})")

    def store(self, op: Operation) -> None:
        """Through shared memory, to a layout in which a thread writes 16 bytes. Values of rows too: stored from where they are, Triton 3.6 keeps
        half of the accumulators in memory."""
        value = op.operands[1]
        require(not op["atomic"] and isinstance(value.type, TileType), "an atomic store, or one of a number")
        assert isinstance(value.type, TileType)
        wide = value.type.shape[1] in (1, self.columns)
        self.store_layout = wide
        text = self._text(op.operands[2:], value.type.shape)  # type: ignore[arg-type]
        mask, _ = self._mask(op["mask"], op.attributes.get("mask_low", ()), op.operands[2:], text)
        place = in_gluon(text(op["offset"]))
        self.store_layout = False
        made = f"gl.convert_layout({self._use(value)}, stored)" if wide else self._use(value)
        self._write(f"gl.store({self._name(op.operands[0])} + ({place}), {made}{f', mask={in_gluon(mask)}' if mask else ''})")


_HANDLERS = {
    "tile.program_id": GroupOps.program_id,
    "tile.load": GroupOps.load,
    "tile.store": GroupOps.store,
    "tile.index": GroupOps.index,
    "tile.mask": GroupOps.mask,
    "tile.full": GroupOps.full,
    "tile.reduce": GroupOps.reduce,
    "tile.require": GroupOps.require,
}


def in_gluon(text: str) -> str:
    """Triton's functions by their names in Gluon."""
    text = re.sub(r"\btl\.(where|exp2|abs|maximum|minimum|floor|ceil|cast|sum|max|min|reduce|inline_asm_elementwise)\(", r"gl.\1(", text)
    return re.sub(r"\blibdevice\.(div_rn|sqrt_rn)\(", r"gl.\1(", text)
