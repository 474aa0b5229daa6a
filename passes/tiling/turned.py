"""Tiles of a stream that are read once and used both ways round.

The backward of attention multiplies the scores' operand with what became of the scores: dS k where S = q k^T. The tile of k is loaded
transposed for one product and as it is for the other; when both loads take the same elements, the second becomes a transposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir import Builder, Operation, TileType, Value, sym
from ...ir.expr import substitute
from ...ir.ranges import simplify

__all__ = ["turned"]

_SWAP = {"t0": sym("t1"), "t1": sym("t0")}


def turned(b: Builder, value: Value, made: Sequence[Value]) -> Value:
    """`value`, a load that was just emitted, or in its place the transposition of one of `made` that has the same elements."""
    load = value.defining_op
    for other in made:
        first = other.defining_op
        if load is not None and first is not None and load is not first and load.name == first.name == "tile.load" and _mirrors(load, first):
            assert isinstance(value.type, TileType)
            load.erase()
            return b.op("tile.transpose", other, type=value.type)
    return value


def _mirrors(a: Operation, b: Operation) -> bool:
    if list(a.operands) != list(b.operands) or a["shape"] != tuple(reversed(b["shape"])) or repr(a["other"]) != repr(b["other"]):
        return False
    if _swapped(b["offset"]) != _plain(a["offset"]) or a["check"] or b["check"]:
        return False
    masks = [{tuple(map(f, pair)) for pair in op["mask"] or ()} for op, f in ((a, _plain), (b, _swapped))]
    return masks[0] == masks[1] and {_plain(e) for e in a["mask_low"] or ()} == {_swapped(e) for e in b["mask_low"] or ()}


def _plain(e: Any) -> Any:
    return simplify(e, {})


def _swapped(e: Any) -> Any:
    return simplify(substitute(e, _SWAP), {})
