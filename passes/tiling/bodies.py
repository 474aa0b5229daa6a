"""Evaluates the body of a structured op on tiles: what every kind of kernel does with its members, wherever their operands come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...ir import Dim, Operation, Value, element_type
from ...ir.expr import mod
from ...ir.ranges import known_less, simplify
from ..structured import body_ops
from .emit import Emitter, Pair, emit_extract

__all__ = ["evaluate_body"]

_POSITIONS = {"arith.add": lambda a, b: a + b, "arith.sub": lambda a, b: a - b, "arith.mul": lambda a, b: a * b}


def evaluate_body(e: Emitter, op: Operation, at: Mapping[str, Dim], operand: Callable[[int], Value], buffers: Mapping[Value, Value],
                  active: Sequence[Pair], wanted: Sequence[Value] = ()) -> list[Value]:
    """What `op` yields (or the scalars of its body that are `wanted`) at the position `at` (d0, d1, ... as expressions): tiles or scalars.

    operand(i): the tile of mapped operand i at that position. active: pairs that hold inside of the space; elsewhere gathers read element 0 and
    requirements do not count. A choice that the position decides (even or odd columns, say) is made here.
    """
    local: dict[Value, Value] = {arg: operand(i) for i, (m, arg) in enumerate(zip(op["maps"], op.body.args, strict=True)) if m is not None}
    known: dict[Value, Dim] = {}  # integers, and comparisons as 0 or 1, that are expressions of the position
    with e.builder.at(op.location):
        for inner in body_ops(op):
            args = [local[v] for v in inner.operands if v in local]
            if inner.name == "tensor.index":
                known[inner.result] = simplify(at[f"d{inner['dim']}"], e.bounds())
                local[inner.result] = e.index_value(known[inner.result])
            elif inner.name == "tensor.sym":
                local[inner.result] = e.index_value(inner["expr"])
            elif inner.name == "tensor.extract":
                source = op.operands[inner.operands[0].index]  # type: ignore[attr-defined]
                local[inner.result] = emit_extract(e, buffers[source], source, args, inner["check"], active)
            elif inner.name == "tensor.require":
                local[inner.result] = e.require(inner, args, active)
            else:
                decided = _decide(e, inner, known)
                local[inner.result] = e.arith(inner, args) if decided is None else local[decided]
    return [local[v] for v in wanted or op.body.terminator.operands]


def _decide(e: Emitter, inner: Operation, known: dict[Value, Dim]) -> Value | None:
    """Notes what the op's integer is, if the position says; the operand that it gives, if it is a choice that the position makes."""
    if inner.name == "arith.constant":
        if type(inner["value"]) is int:
            known[inner.result] = inner["value"]
        return None
    if inner.name == "arith.select":
        choice = known.get(inner.operands[0])
        return inner.operands[1 if choice else 2] if isinstance(choice, int) else None
    if len(inner.operands) != 2 or not all(v in known for v in inner.operands) or element_type(inner.operands[0].type).name != "i64":
        return None
    (a, b), bounds = (known[v] for v in inner.operands), e.bounds()
    if inner.name in _POSITIONS:
        known[inner.result] = simplify(_POSITIONS[inner.name](a, b), bounds)
    elif inner.name == "arith.mod" and isinstance(b, int) and b > 0:
        known[inner.result] = simplify(mod(a, b), bounds)
    elif inner.name == "arith.floordiv" and isinstance(b, int) and b > 0:
        known[inner.result] = simplify(a // b, bounds)
    elif inner.name == "arith.lt":
        if known_less(a, b, bounds):
            known[inner.result] = 1
        elif known_less(b, a + 1, bounds):
            known[inner.result] = 0
    elif inner.name == "arith.eq" and isinstance(a, int) and isinstance(b, int):
        known[inner.result] = int(a == b)
    return None
