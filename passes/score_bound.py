"""Scores with a known bound need no running maximum.

Softmax subtracts the row's maximum so that exp does not overflow. Where every score is known to lie in [-U, U] or to be -inf (a soft cap, a sigmoid,
a clamp) and U is small, exp(x - U) does as well: nothing overflows, and nothing that counts vanishes in 32 bits. Then no step of the stream waits for
its maximum, and nothing is rescaled. The quotient of two sums that are shifted alike does not change, so only quotients may use this: `bound_of`
gives U where all that leaves the stream is one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..ir import Operation, Value, element_type

if TYPE_CHECKING:
    from .stream import Stream

__all__ = ["bound_of"]

LARGEST = 40.0
"""exp(-2 * 40) is 1.8e-35: a row whose scores are all at the lower end keeps a normal sum, and normal products with values down to 1e-3."""
_UNIT = frozenset({"tanh", "sin", "cos", "erf", "sigmoid"})


def bound_of(s: Stream, maximum: Operation) -> float | None:
    """U with every score that the running maximum `maximum` reads at most U in magnitude, or -inf; None if the maximum itself is needed."""
    m = maximum.result
    if maximum["combine"] != ("max",) or any(s.shifts[op] is not m for op in (*s.reductions, *s.seconds) if op is not maximum):
        return None
    if any(w.defining_op in s.row for rows in s.scales.values() for w, *_ in rows):
        return None
    sums = {op.result for op in s.reductions if op is not maximum}
    if any(user not in s.full for user in m.users) or any(user not in s.full for v in sums for user in v.users):
        return None  # something beside the weights reads them
    if not all(len(s.scales[op]) == 1 and s.scales[op][0][0] in sums and s.scales[op][0][1] == "div" for op in s.seconds):
        return None
    if any(element_type(v.type).name != "bf16" for op in s.seconds for v in op.operands if not s.kind_of(v)):
        return None  # weights would vanish in 16 bits of another kind
    found = _magnitude(s, maximum, maximum.body.terminator.operands[0])  # type: ignore[union-attr]
    return found[0] if found is not None and found[0] <= LARGEST else None


def _magnitude(s: Stream, op: Operation, x: Value) -> tuple[float, bool] | None:
    """(a bound of |x|, whether x may be -inf all the same); None where there is no bound."""
    inner = x.defining_op
    if inner is None:
        v = op.operands[x.index]  # type: ignore[attr-defined]
        made = v.defining_op
        if made is None or made not in s.full:
            return None
        return _magnitude(s, made, made.body.terminator.operands[made.results.index(v)])  # type: ignore[union-attr, arg-type]
    name = inner.name.removeprefix("arith.")
    if name == "constant":
        value = float(inner["value"])
        return (0.0, True) if value == -math.inf else (abs(value), False) if math.isfinite(value) else None
    if name in _UNIT:
        return 1.0, False
    args = [_magnitude(s, op, v) for v in inner.operands[1 if name == "select" else 0:]]
    known = [a for a in args if a is not None]
    if len(known) < len(args):
        return None
    masked = any(m for _, m in known)
    match name:
        case "select":
            return max(a for a, _ in known), masked
        case "cast" if element_type(inner.result.type).is_float:
            return known[0][0] * (1 + 2**-7), masked  # it may be rounded up
        case "neg" | "abs" if not masked:
            return known[0]
        case "mul" if not masked or any(_is_number(v) for v in inner.operands):
            return known[0][0] * known[1][0], masked
        case "add":
            return known[0][0] + known[1][0], masked
        case "sub" if not known[1][1]:
            return known[0][0] + known[1][0], masked
        case "div" if _is_number(inner.operands[1]):
            return known[0][0] / known[1][0], masked
    return None


def _is_number(v: Value) -> bool:
    """A positive constant."""
    made = v.defining_op
    while made is not None and made.name == "arith.cast":
        made = made.operands[0].defining_op
    return made is not None and made.name == "arith.constant" and float(made["value"]) > 0
