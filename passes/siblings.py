"""Products of one left operand whose results meet in one pointwise op: gate and up of a gated unit, silu(x @ g) * (x @ u).

As one kernel they read x once, and neither result goes to memory. A library would write both.
"""

from __future__ import annotations

from ..ir import Operation, Value
from .exact import matrix_unit_type
from .structured import is_contraction, is_pointwise
from .tiling.contraction import roles_of

__all__ = ["are_siblings", "sibling_of"]

REACH = 12
"""Pointwise ops that may lie between a product and where it meets the other."""


def are_siblings(a: Operation, b: Operation) -> bool:
    """Contractions of one space that read the same left operand at the same places, and multiply on the matrix units."""
    if a is b or a["dims"] != b["dims"] or a["reductions"] != b["reductions"]:
        return False
    r, q = roles_of(a), roles_of(b)
    if r is None or r != q or matrix_unit_type(a) is None or matrix_unit_type(a) != matrix_unit_type(b):
        return False
    left = r.left
    return a.operands[left] is b.operands[left] and a["maps"][left] == b["maps"][left] and not a["fills"] and not b["fills"]


def sibling_of(op: Operation) -> Operation | None:
    """The other product with whose result this one's meets, each read by nothing else on the way there."""
    mine = _followers(op.result)
    for v in op.operands:
        for other in v.users:
            if other is not op and is_contraction(other) and are_siblings(op, other) and set(_followers(other.result)) & set(mine):
                return other
    return None


def _followers(v: Value) -> list[Operation]:
    """Pointwise ops by which alone the value, and what becomes of it, is read."""
    found: list[Operation] = []
    while len(v.users) == 1 and is_pointwise(v.users[0]) and len(v.users[0].results) == 1 and len(found) < REACH:
        found.append(v.users[0])
        v = v.users[0].result
    # x * sigmoid(x) reads x twice: both readers, and what they lead to
    if len(v.users) == 2 and all(is_pointwise(u) and len(u.results) == 1 for u in v.users) and len(found) < REACH:
        a, b = sorted(v.users, key=lambda u: any(w.defining_op in v.users for w in u.operands))
        if a.result.users == [b]:
            found += [a, b, *_followers(b.result)]
    return found
