"""`tile.keep` on vectors: which lanes beat the last element of the list is one comparison a vector; those enter by insertion, one by one.

    last = values[n - 1], or anything if places[n - 1] < 0
    if any lane of the tile beats it: for each such lane, in order: shift what it beats down by one, write it there
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir

from ...ir.core import Operation
from ...ir.expr import as_int
from ...ir.types import DType, element_type
from .access import Accessor, full_mask
from .intrinsics import call
from .values import I1, I64, Tile, memory_type, splat

if TYPE_CHECKING:
    from .kernel import KernelEmitter

__all__ = ["keep"]


def _better(b: ir.IRBuilder, x: ir.Value, y: ir.Value, dtype: DType, largest: bool) -> ir.Value:
    """x goes before y: larger (smaller), NaN as the largest."""
    if dtype.is_float:
        x_nan, y_nan = b.fcmp_unordered("uno", x, x), b.fcmp_unordered("uno", y, y)
        if largest:
            return b.or_(b.fcmp_ordered(">", x, y), b.and_(x_nan, b.not_(y_nan)))
        return b.or_(b.fcmp_ordered("<", x, y), b.and_(y_nan, b.not_(x_nan)))
    compare = b.icmp_signed if dtype.is_signed else b.icmp_unsigned
    return compare(">" if largest else "<", x, y)


def keep(k: KernelEmitter, op: Operation) -> None:
    """Emits the op; leaves the builder in a new block."""
    b = k.b
    x = k.value(op.operands[2])
    assert isinstance(x, Tile)
    dtype = element_type(op.operands[2].type)
    n = as_int(op.operands[0].type.numel)  # type: ignore[attr-defined]
    list_ = _List(k, k.env[op.operands[0]], k.env[op.operands[1]], dtype, n, op["largest"])
    chunks = [c for row in Accessor(k, op, x.widths).rows() for c in row]
    values = [v for row in x.rows for v in row]
    last, last_place = list_.entry(I64(n - 1))
    free = b.icmp_signed("<", last_place, I64(0))
    masks: list[ir.Value] = []
    for c, v in zip(chunks, values, strict=True):
        width = c.lanes.width
        beats = b.or_(_better(b, v, splat(b, last, width), dtype, op["largest"]), splat(b, free, width))
        scalar, vector = c.lanes.mask(c.gaps)
        if scalar is not None or vector is not None:
            beats = b.and_(beats, full_mask(b, scalar, vector, width))
        masks.append(b.zext(beats if width == 1 else b.bitcast(beats, ir.IntType(width)), I64) if width < 64 else b.bitcast(beats, I64))
    some = masks[0]
    for m in masks[1:]:
        some = b.or_(some, m)
    enter, done = b.append_basic_block("enter"), b.append_basic_block("kept")
    b.cbranch(b.icmp_unsigned("!=", some, I64(0)), enter, done).set_weights([1, 20])
    b.position_at_end(enter)
    for c, v, m in zip(chunks, values, masks, strict=True):
        first = k.scalars.emit(c.lanes.at(c.offset, 0))
        _each_lane(k, list_, v, m, first)
    b.branch(done)
    b.position_at_end(done)


def _each_lane(k: KernelEmitter, list_: _List, v: ir.Value, mask: ir.Value, first: ir.Value) -> None:
    """Inserts the lanes of `v` whose bit is set, lowest first; `first` is the place of lane 0."""
    b = k.b
    before = b.block
    head, body, after = (b.append_basic_block(f"lane.{name}") for name in ("head", "body", "end"))
    b.branch(head)
    b.position_at_end(head)
    left = b.phi(I64)
    left.add_incoming(mask, before)
    b.cbranch(b.icmp_unsigned("!=", left, I64(0)), body, after)
    b.position_at_end(body)
    lane = call(b, "llvm.cttz.i64", I64, [left, I1(1)])
    value = b.extract_element(v, lane) if isinstance(v.type, ir.VectorType) else v
    list_.insert(value, b.add(first, lane))
    left.add_incoming(b.and_(left, b.sub(left, I64(1))), b.block)
    b.branch(head)
    b.position_at_end(after)


class _List:
    """The sorted list in memory."""

    def __init__(self, k: KernelEmitter, values: ir.Value, places: ir.Value, dtype: DType, n: int, largest: bool):
        self.b, self.values, self.places, self.dtype, self.n, self.largest = k.b, values, places, dtype, n, largest
        self.memory = memory_type(dtype)

    def _at(self, i: ir.Value) -> tuple[ir.Value, ir.Value]:
        b = self.b
        return b.gep(self.values, [i], source_etype=self.memory), b.gep(self.places, [i], source_etype=I64)

    def entry(self, i: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(value, place) of element i."""
        at, place = self._at(i)
        return self.b.load(at, typ=self.memory), self.b.load(place, typ=I64)

    def put(self, i: ir.Value, value: ir.Value, place: ir.Value) -> None:
        at, where = self._at(i)
        self.b.store(value, at)
        self.b.store(place, where)

    def loses(self, i: ir.Value, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(whether element i is free or worse than `value`, its value, its place)."""
        held, place = self.entry(i)
        b = self.b
        return b.or_(b.icmp_signed("<", place, I64(0)), _better(b, value, held, self.dtype, self.largest)), held, place

    def insert(self, value: ir.Value, place: ir.Value) -> None:
        """Unless the last element (which may be another one by now) is as good."""
        b = self.b
        wanted, _, _ = self.loses(I64(self.n - 1), value)
        head, test, move, found, out = (b.append_basic_block(f"insert.{name}") for name in ("head", "test", "move", "found", "end"))
        before = b.block
        b.cbranch(wanted, head, out)
        b.position_at_end(head)
        at = b.phi(I64)
        at.add_incoming(I64(self.n - 1), before)
        b.cbranch(b.icmp_signed(">", at, I64(0)), test, found)
        b.position_at_end(test)
        above = b.sub(at, I64(1))
        loses, held, held_place = self.loses(above, value)
        b.cbranch(loses, move, found)
        b.position_at_end(move)
        self.put(at, held, held_place)
        at.add_incoming(above, b.block)
        b.branch(head)
        b.position_at_end(found)
        self.put(at, value, place)
        b.branch(out)
        b.position_at_end(out)
