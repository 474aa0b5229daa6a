"""What the bounds of a stream's loop say of its mask, in a part of a step's tile (see `warp_groups.py`).

    masks = StepMasks(kernel, loop)
    masks.truth(condition, rows, columns)       # what all of its elements are, or None: that is not known
    masks.dead(rows, columns)                   # every score there is masked, in every step of the loop
    masks.without(rows, columns)                # values of the step that are others there: a & b is b where a holds everywhere

A loop over the end of a window has positions that are all before the diagonal, and of the 128 columns of the diagonal's step the second half is
masked for the first 64 rows. Conditions are comparisons of positions; the loop's bounds, which programs and their numbers bound in turn, decide them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...ir.core import Operation, Value
from ...ir.expr import Dim, Expr, Max, Min, arguments, as_int, substitute, sym
from ...ir.ranges import Bounds, known_less, lower_bound, split_linear
from ...ir.types import TileType, element_type
from .stream_shape import ROWS, Loop

__all__ = ["Span", "StepMasks"]

Span = tuple[int, int]
"""The first and the last row, or column, of a part of a tile."""
_MASKED = float("-inf")
_ORDERED = {"arith.le": (0, 1, 0), "arith.lt": (0, 1, 1), "arith.ge": (1, 0, 0), "arith.gt": (1, 0, 1)}
"""Comparison -> (smaller operand, larger operand, least difference)."""
_KEEPS_MASKED = ("arith.mul", "arith.sub", "arith.add", "arith.cast")


@dataclass
class StepMasks:
    """Of one loop of a stream's kernel."""

    kernel: Operation
    loop: Loop
    names: dict[Value, str] = field(default_factory=dict)

    def dead(self, rows: Span, columns: Span) -> bool:
        """Weights are zero there, and neither sums nor maxima of rows change: all scores are -inf by one choice between them and it."""
        choices = [op for op in self.loop.between if op.name == "arith.select" and _is_tile(op.result)]
        return any(self._masked(op, rows, columns) and self._ends_in_zero(op) for op in choices)

    def without(self, rows: Span, columns: Span) -> dict[Value, Value]:
        """Results of the step's ops that are the same as another value, in this part: what a mask asks is partly known."""
        found: dict[Value, Value] = {}
        for op in self.loop.between:
            if op.name in ("arith.and", "arith.or"):
                for value, other in (op.operands, op.operands[::-1]):
                    if self.truth(value, rows, columns) is (op.name == "arith.and"):
                        found[op.result] = found.get(other, other)
                        break
            elif op.name == "arith.select" and (known := self.truth(op.operands[0], rows, columns)) is not None:
                chosen = op.operands[1 if known else 2]
                if chosen.type == op.result.type:
                    found[op.result] = found.get(chosen, chosen)
        return found

    def truth(self, condition: Value, rows: Span, columns: Span) -> bool | None:
        """What the condition is for all of the rows and columns, in every step."""
        op = condition.defining_op
        if op is None:
            return None
        if op.name in ("arith.and", "arith.or"):
            parts = [self.truth(v, rows, columns) for v in op.operands]
            decisive = op.name == "arith.or"
            return decisive if decisive in parts else None if None in parts else not decisive
        if op.name not in _ORDERED:
            return None
        smaller, larger, least = _ORDERED[op.name]
        a, b = (self._position(op.operands[k]) for k in (smaller, larger))
        if a is None or b is None:
            return None
        if self._nonnegative(b - a - least, rows, columns):
            return True
        return False if self._nonnegative(a - b + least - 1, rows, columns) else None

    def _masked(self, select: Operation, rows: Span, columns: Span) -> bool:
        known = self.truth(select.operands[0], rows, columns)
        return known is not None and _constant(select.operands[1 if known else 2]) == _MASKED

    def _ends_in_zero(self, select: Operation) -> bool:
        """If all that `select` gives is -inf, weights are zero, sums get zeros and maxima get -inf."""
        masked, zero = {select.result}, set()
        for op in self.loop.between:
            value = op.operands[0] if op.operands else None
            if op.name == "tile.reduce" and _is_tile(op.operands[0]):
                if not (op["kind"] == "sum" and value in zero or op["kind"] == "max" and value in masked):
                    return False
            elif op.name in ("arith.exp", "arith.exp2") and value in masked or op.name == "arith.cast" and value in zero:
                zero.add(op.result)
            elif op.name in _KEEPS_MASKED and value in masked and (op.name != "arith.mul" or (_constant(op.operands[1]) or 0) > 0):
                masked.add(op.result)
        return self.loop.second.operands[0] in zero

    def _position(self, v: Value) -> Dim | None:
        """An integer as an expression over t0 (rows), t1 (columns), the loop's step and values from outside."""
        op = v.defining_op
        if op is None:
            return None
        if op.name == "arith.constant" and isinstance(op["value"], int):
            return op["value"]
        if op.name == "tile.index":
            return substitute(op["expr"], {f"i{k}": self._symbol(x) for k, x in enumerate(op.operands)})
        if op.name in ("arith.add", "arith.sub"):
            a, b = map(self._position, op.operands)
            return None if a is None or b is None else a + b if op.name == "arith.add" else a - b
        return None

    def _symbol(self, v: Value) -> Dim:
        return sym(self.names.setdefault(v, "step" if v is self.loop.op.body.args[0] else f"n{len(self.names)}"))

    def _end(self, bound: str) -> Dim:
        op = self.loop.op
        return substitute(op[bound], {f"i{k}": self._symbol(v) for k, v in enumerate(op.operands[:op["indices"]])})

    def _nonnegative(self, e: Dim, rows: Span, columns: Span) -> bool:
        """In every step of the loop. Of a lower end that is a maximum, and of an upper end that is a minimum, one part is enough."""
        bounds: dict[str, tuple[Dim | None, Dim | None]] = {"t0": rows, "t1": columns}
        low, high = self._end("lower"), self._end("upper")
        for v, name in self.names.items():
            made = v.defining_op
            bounds[name] = (0, self.kernel["grid"][made["axis"]] - 1) if made is not None and made.name == "tile.program_id" else (None, None)
        found = split_linear(e, "step")
        if found is None or not isinstance(found[0], int):
            return False
        factor, rest = as_int(found[0]), found[1]
        if factor == 0:
            return _at_least_zero(e, bounds)
        if factor > 0:
            return any(_at_least_zero(rest + factor * x, bounds) for x in arguments(low, Max))
        return any(all(_at_least_zero(rest + factor * x, bounds) for x in self._last(part, low, bounds)) for part in arguments(high, Min))

    def _last(self, end: Dim, low: Dim, bounds: Bounds) -> Iterator[Dim]:
        """Numbers of which the largest is the loop's last step, or one behind it, if it ends at `end`."""
        size, starts = self.loop.op["step"], list(arguments(low, Max))
        whole = all(_multiple(x, size) for x in starts)
        for part in arguments(end, Max):
            const = part if isinstance(part, int) else part.const
            last = part - const + (const - 1) // size * size if whole and _multiple(part - const, size) else part - 1
            if not any(known_less(last, x, bounds) for x in starts):  # no step ends there
                yield last


def _at_least_zero(e: Dim, bounds: Bounds) -> bool:
    low = lower_bound(e, bounds)
    return isinstance(low, int) and low >= 0


def _multiple(e: Dim, of: int) -> bool:
    return e % of == 0 if isinstance(e, int) else isinstance(e, Expr) and e.const % of == 0 and all(c % of == 0 for _, c in e.terms)


def _is_tile(v: Value) -> bool:
    return isinstance(v.type, TileType) and v.type.shape[0] == ROWS and v.type.shape[1] != 1 and element_type(v.type).is_float


def _constant(v: Value) -> float | None:
    made = v.defining_op
    while made is not None and made.name == "tile.full":
        made = made.operands[0].defining_op
    return made["value"] if made is not None and made.name == "arith.constant" else None
