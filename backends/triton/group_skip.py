"""Steps of a stream of which a mask leaves nothing to one group of warps (see `warp_groups.py`).

    alive = alive_text(loop, text, 0, 64)     # a condition on scalars, false where a step changes nothing; or None: none is known

A program has 128 rows, and its loops go over the steps that any of them needs; a group has 64 of them. Where the mask is made of comparisons of
positions, the least and the largest position of each side, in the group's rows and the step's columns, say whether every element is masked: its
weights are then zero, and neither the sums nor the running maximum change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...ir.core import Operation, Value
from ...ir.expr import Dim, as_int
from ...ir.ranges import split_linear
from ...ir.types import TileType
from .stream_shape import HALF, ROWS, Loop

__all__ = ["alive_text"]

_MASKED = float("-inf")
_SIDES = {"arith.gt": (0, "<=", ">"), "arith.ge": (0, "<", ">="), "arith.lt": (1, "<=", ">"), "arith.le": (1, "<", ">=")}
"""Of a comparison, as `a > b` or `a >= b`: which operand is a, and how not all of, or any of, a's compares with b's."""
_KEEPS_MASKED, _KEEPS_ZERO = ("arith.mul", "arith.sub", "arith.add", "arith.cast"), ("arith.cast",)
Text = Callable[[Sequence[Value], Dim], str]
"""Writes an expression over operands that are scalars."""


def alive_text(loop: Loop, text: Text, first: int, count: int) -> str | None:
    """False only where all of the group's rows are masked in `count` columns of a step from `first` on. `text`: see Text."""
    for op in loop.between:
        if op.name == "arith.select" and _is_tile(op.result) and _ends_in_zero(loop, op):
            masked = _constant(op.operands[1]) == _MASKED
            found = _Positions(text, first, count).alive(op.operands[0], masked)
            if found is not None and (masked or _constant(op.operands[2]) == _MASKED):
                return found
    return None


def _is_tile(v: Value) -> bool:
    return isinstance(v.type, TileType) and v.type.shape[0] == ROWS and v.type.shape[1] != 1


def _constant(v: Value) -> float | None:
    made = v.defining_op
    while made is not None and made.name == "tile.full":
        made = made.operands[0].defining_op
    return made["value"] if made is not None and made.name == "arith.constant" else None


def _ends_in_zero(loop: Loop, select: Operation) -> bool:
    """If all that `select` gives is -inf, weights are zero, sums get zeros and maxima get -inf."""
    masked, zero = {select.result}, set()
    for op in loop.between:
        value = op.operands[0] if op.operands else None
        if op.name == "tile.reduce" and _is_tile(op.operands[0]):
            if not (op["kind"] == "sum" and value in zero or op["kind"] == "max" and value in masked):
                return False
        elif op.name in ("arith.exp", "arith.exp2") and value in masked or op.name in _KEEPS_ZERO and value in zero:
            zero.add(op.result)
        elif op.name in _KEEPS_MASKED and value in masked and _scales_up(op):
            masked.add(op.result)
    return loop.second.operands[0] in zero


def _scales_up(op: Operation) -> bool:
    """A factor is positive."""
    factor = _constant(op.operands[1]) if op.name == "arith.mul" else 1
    return factor is not None and factor > 0


@dataclass(frozen=True)
class _Positions:
    """Conditions on the least and the largest values of positions."""

    text: Text
    first: int
    count: int

    def alive(self, condition: Value, when: bool) -> str | None:
        """False only where all elements of `condition` are `when`."""
        op = condition.defining_op
        if op is None:
            return None
        if op.name in ("arith.or", "arith.and"):
            parts = [self.alive(v, when) for v in op.operands]
            if (op.name == "arith.or") == when:  # one part alone may decide for all
                known = [p for p in parts if p is not None]
                return " & ".join(f"({p})" for p in known) or None
            return None if None in parts else " | ".join(f"({p})" for p in parts)
        if op.name in _SIDES:
            first, some, any_ = _SIDES[op.name]
            a, b = (self.span(v) for v in (op.operands[first], op.operands[1 - first]))
            if a is None or b is None:
                return None
            return f"{a[0]} {some} {b[1]}" if when else f"{a[1]} {any_} {b[0]}"
        return None

    def span(self, v: Value) -> tuple[str, str] | None:
        """The least and the largest of an integer."""
        op = v.defining_op
        if op is None:
            return None
        if op.name == "arith.constant" and isinstance(op["value"], int):
            return str(op["value"]), str(op["value"])
        if op.name == "tile.index":
            return self._index(op)
        if op.name in ("arith.sub", "arith.add"):
            a, b = map(self.span, op.operands)
            if a is None or b is None:
                return None
            return (f"({a[0]} - ({b[1]}))", f"({a[1]} - ({b[0]}))") if op.name == "arith.sub" else (f"({a[0]} + {b[0]})", f"({a[1]} + {b[1]})")
        return None

    def _index(self, op: Operation) -> tuple[str, str] | None:
        rest: Dim = op["expr"]
        low = high = 0
        rows = 0
        for axis, size in enumerate(op["shape"]):
            found = split_linear(rest, f"t{axis}")
            if found is None or not isinstance(found[0], int):
                return None
            factor, rest = as_int(found[0]), found[1]
            begin, end = (0, HALF - 1) if axis == 0 and size == ROWS else (self.first, self.first + self.count - 1) if axis == 1 else (0, size - 1)
            rows += factor if axis == 0 and op["shape"][0] == ROWS else 0
            low, high = low + min(factor * begin, factor * end), high + max(factor * begin, factor * end)
        place = self.text(op.operands, rest) + (f" + who*{rows * HALF}" if rows else "")
        return tuple(f"({place}{f' + {end}' if end > 0 else f' - {-end}' if end else ''})" for end in (low, high))  # type: ignore[return-value]
