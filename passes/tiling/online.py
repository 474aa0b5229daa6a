"""Sums of exp(x - max(x)) beside the running maximum: one pass over a row (Milakov, Gimelshein 2018, online normalizer calculation for softmax).

A lane keeps the largest x that it has seen and the sum that belongs to it, which is rescaled when the maximum moves. On CPUs, and where columns
are reduced, the lane is the whole row: each step reduces across the tile. On GPUs that would make the threads of a program wait for each other at
every step; there a lane is a few neighbours of a row, what one thread loads at once, and lanes are merged when the row has ended. That is one
exponential more for each group of neighbours, and no step waits for another thread. Where rows begin anywhere (50257 columns), threads load single
elements, and those that one has are a part of the tile apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir import DType, TileType, Value, element_type
from .emit import Emitter, identity_of
from .gpu_loop_tiles import LOAD

__all__ = ["Lanes"]

@dataclass(frozen=True)
class Lanes:
    """Which elements of a tile share a lane: `group` neighbours of a row, or, if that is 0, all along `axes`. `apart`: not neighbours, but elements
    of the tile's one row that lie equally far apart."""

    tile: tuple[int, int]
    axes: tuple[int, ...]
    group: int = 0
    apart: bool = False

    @staticmethod
    def of(tile: tuple[int, int], axes: Sequence[int], element_bytes: int, aligned: bool) -> Lanes:
        """On a GPU, where the row's elements have so many bytes each; `aligned`: rows begin where a thread's load may."""
        group = LOAD // element_bytes
        by_row = tuple(axes) == (1,) and tile[1] % group == 0 and (aligned or tile[0] == 1)
        return Lanes(tile, tuple(axes), group, not aligned) if by_row else Lanes(tile, tuple(axes))

    @property
    def shape(self) -> tuple[int, int]:
        """Of the accumulators."""
        if self.group:
            lanes = self.tile[0] * self.tile[1] // self.group
            return (1, lanes) if self.apart else (lanes, 1)
        return (1 if 0 in self.axes else self.tile[0], 1 if 1 in self.axes else self.tile[1])

    @property
    def _grouped(self) -> tuple[int, int]:
        """The tile with a lane's elements along one axis."""
        return (self.group, self.shape[1]) if self.apart else (self.shape[0], self.group)

    def initial(self, e: Emitter, kind: str, dtype: DType) -> Value:
        return e.broadcast(e.builder.constant(identity_of(kind, dtype), dtype), self.shape)

    def maximum(self, e: Emitter, value: Value, acc: Value) -> tuple[Value, Value, Value]:
        """(the new maximum, what it is subtracted as from each element of the tile, what earlier sums are multiplied by)."""
        b = e.builder
        new = b.arith("max", acc, self._reduced(e, value, "max"))
        safe = b.arith("select", b.arith("eq", new, float("-inf")), 0, new)  # exp(-inf + inf) is NaN
        return new, self._spread(e, safe), _exp(e, b.arith("sub", acc, safe))

    def sum(self, e: Emitter, value: Value, acc: Value, alpha: Value) -> Value:
        b = e.builder
        return b.arith("add", b.arith("mul", acc, alpha), self._reduced(e, value, "sum"))

    def whole(self, e: Emitter, acc: Value) -> Value:
        """A row's maximum."""
        return _reduce(e, self._by_rows(e, acc), 1, "max") if self.group else acc

    def whole_sum(self, e: Emitter, acc: Value, maxima: Value, highest: Value) -> Value:
        """A row's sum, from the lanes' maxima and the row's; NaN where that is -inf, for there was nothing but exp(-inf + inf)."""
        b = e.builder
        if self.group:
            apart = b.arith("sub", self._by_rows(e, maxima), highest)
            acc = _reduce(e, b.arith("mul", self._by_rows(e, acc), _exp(e, apart)), 1, "sum")
        return b.arith("select", b.arith("eq", highest, float("-inf")), float("nan"), acc)

    def _by_rows(self, e: Emitter, acc: Value) -> Value:
        return _reshape(e, acc, (self.tile[0], self.tile[1] // self.group))

    def _reduced(self, e: Emitter, value: Value, kind: str) -> Value:
        """Of each lane."""
        if not isinstance(value.type, TileType) or value.type.shape != self.tile:
            value = e.broadcast(value, self.tile)
        if self.group:
            return _reduce(e, _reshape(e, value, self._grouped), 0 if self.apart else 1, kind)
        for axis in self.axes:
            value = _reduce(e, value, axis, kind)
        return value

    def _spread(self, e: Emitter, lanes: Value) -> Value:
        """For each element what its lane has."""
        return _reshape(e, e.broadcast(lanes, self._grouped), self.tile) if self.group else lanes


def _exp(e: Emitter, power: Value) -> Value:
    """As precise as those that are summed."""
    coarse = {"_approximate": True} if "arith.exp" in e.coarse and element_type(power.type).name == "f32" else {}
    return e.builder.op("arith.exp", power, type=power.type, **coarse)


def _reshape(e: Emitter, value: Value, shape: tuple[int, int]) -> Value:
    return e.builder.op("tile.reshape", value, type=TileType(shape, element_type(value.type)))


def _reduce(e: Emitter, value: Value, axis: int, kind: str) -> Value:
    t = value.type
    assert isinstance(t, TileType)
    if t.shape[axis] == 1:
        return value
    shape = tuple(1 if i == axis else s for i, s in enumerate(t.shape))
    return e.builder.op("tile.reduce", value, type=TileType(shape, t.dtype), axis=axis, kind=kind)  # type: ignore[arg-type]
