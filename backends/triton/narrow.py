"""64-bit integers that fit 32 bits: positions mostly do, and 64-bit arithmetic costs a GPU twice the instructions.

`Narrow` follows the ranges of integer values through a kernel; a value that it knows is computed and kept in int32, and widened where an
op wants the 64 bits that its type says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...ir.core import Operation, Value
from ...ir.expr import as_int, product
from ...ir.types import TileType, element_type

__all__ = ["LIMIT", "Narrow"]

LIMIT = 1 << 30
"""Magnitudes below this survive an addition."""
EXACT = 1 << 23
"""Integers up to this magnitude, and sums of two, are exact in float32."""
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})

Interval = tuple[int, int]


@dataclass
class Narrow:
    """Intervals of the i64 values that are held as int32."""

    known: dict[Value, Interval] = field(default_factory=dict)

    def learn(self, v: Value, low: object, high: object) -> bool:
        """Notes that `v` is in [low, high], if that is a small interval of an i64; True if it will be int32."""
        if element_type(v.type).name != "i64" or not isinstance(low, int) or not isinstance(high, int) or max(-low, high) >= LIMIT:
            return False
        self.known[v] = low, high
        return True

    def takes(self, op: Operation) -> bool:
        """True if the arith op may compute on int32 operands; its result is then int32 too, unless it is of another type."""
        name = op.name.removeprefix("arith.")
        values = op.operands[1:] if name == "select" else op.operands
        if name == "constant" and isinstance(op["value"], int):
            return self.learn(op.result, op["value"], op["value"])
        if not values or not all(v in self.known for v in values):
            return False
        ranges = [self.known[v] for v in values]
        if name in _COMPARISONS:
            return True
        if name == "cast":
            return element_type(op.result.type).is_float or self.learn(op.result, *ranges[0])
        found = _result(name, ranges)
        return found is not None and self.learn(op.result, *found)

    def split_cast(self, op: Operation) -> tuple[Value, str, Value] | None:
        """(a, "+" or "-", b) where `op` makes float32 numbers of a + b or a - b, and may as well add theirs: a row and a column of positions,
        say. Then a tile's conversions, as slow as exponentials, are those of its sides."""
        made = op.operands[0].defining_op if op.name == "arith.cast" and element_type(op.result.type).name == "f32" else None
        if made is None or made.name not in ("arith.add", "arith.sub"):
            return None
        a, b = made.operands
        small = all(v in self.known and max(-self.known[v][0], self.known[v][1]) <= EXACT and _count(v) < _count(op.result) for v in (a, b))
        return (a, "+" if made.name == "arith.add" else "-", b) if small else None


def _count(v: Value) -> int:
    """Elements of a tile; 1 for a number."""
    return as_int(product(v.type.shape)) if isinstance(v.type, TileType) else 1


def _result(name: str, ranges: list[Interval]) -> Interval | None:
    (a, b), *rest = ranges
    if name == "neg":
        return -b, -a
    if name == "abs":
        return 0, max(abs(a), abs(b))
    if len(rest) != 1:
        return None
    c, d = rest[0]
    match name:
        case "add":
            return a + c, b + d
        case "sub":
            return a - d, b - c
        case "mul":
            corners = [x * y for x in (a, b) for y in (c, d)]
            return min(corners), max(corners)
        case "min":
            return min(a, c), min(b, d)
        case "max":
            return max(a, c), max(b, d)
        case "select":
            return min(a, c), max(b, d)
    return None
