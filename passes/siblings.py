"""Products of one left operand whose results meet in one pointwise op: gate and up of a gated unit, silu(x @ g) * (x @ u).

As one kernel they read x once, and neither result goes to memory. A library would write both. On CPUs a tile of one is summed after the same
tile of the other: what is saved is the first result's way to memory and back, and a launch.
"""

from __future__ import annotations

from ..ir import Operation, Value
from .exact import factors, matrix_unit_type
from .structured import is_contraction, is_pointwise
from .tiling.roles import EXCHANGED, roles_of

__all__ = ["are_siblings", "sibling_of"]

REACH = 12
"""Pointwise ops that may lie between a product and where it meets the other."""


def are_siblings(a: Operation, b: Operation, on_gpu: bool = True) -> bool:
    """Contractions of one space that read the same left operand at the same places, and multiply alike: on the matrix units, or from right operands
    that are packed alike."""
    if a is b or a["dims"] != b["dims"] or a["reductions"] != b["reductions"]:
        return False
    r, q = roles_of(a), roles_of(b)
    if r is None or r != q or a.attributes.get(EXCHANGED) or b.attributes.get(EXCHANGED):
        return False
    if on_gpu and (matrix_unit_type(a) is None or matrix_unit_type(a) != matrix_unit_type(b)):
        return False
    if not on_gpu and any(_form(a, r.right) != _form(b, r.right) or c.attributes.get("_streams") for c in (a, b)):
        return False
    left = r.left
    return a.operands[left] is b.operands[left] and a["maps"][left] == b["maps"][left] and not a["fills"] and not b["fills"]


def _form(op: Operation, right: int) -> tuple[object, ...]:
    """How the right operand lies: where it is read, in which form and type, as which type it is multiplied."""
    return op.attributes.get("_packed"), op["maps"][right], op.operands[right].type, op.result.type, [t.name for t in factors(op)[right]]


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
