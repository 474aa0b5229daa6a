"""Planted faults: wrong sharded programs, to see whether validation catches them.

    for fault in plant(partitioned): validate(..., fault.partitioned, ...)

Each fault is one edit of a correct program, of a kind that real distributed training has had: an all-reduce that was forgotten, a
reduction with the wrong operator, gradients handed to the wrong parameter, pieces gathered in the wrong order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...ir.builder import Builder
from ...ir.core import Operation, Value
from ...ir.types import TensorType
from .partition import Partitioned

__all__ = ["Fault", "plant"]


@dataclass(frozen=True)
class Fault:
    """kind: what was done; where: to which op; partitioned: the wrong program."""

    kind: str
    where: str
    partitioned: Partitioned


def plant(partitioned: Partitioned) -> Iterator[Fault]:
    """Every fault of every kind, one at a time, each in a copy of the program."""
    for kind, (applies, edit) in _KINDS.items():
        ops = [i for i, op in enumerate(partitioned.module.walk()) if applies(op)]
        for i in ops:
            copied = _copy(partitioned)
            op = next(op for j, op in enumerate(copied.module.walk()) if j == i)
            where = f"{str(op).splitlines()[0].strip()[:120]} at {op.location}"
            if edit(op):
                yield Fault(kind, where, copied)


def _copy(partitioned: Partitioned) -> Partitioned:
    mapping: dict[Value, Value] = {}
    module = partitioned.module.clone(mapping)
    return Partitioned(module, {mapping[v]: o for v, o in partitioned.origin.items() if v in mapping}, partitioned.gathered, partitioned.moved)


def _drop(op: Operation) -> bool:
    """The all-reduce is forgotten."""
    op.result.replace_all_uses_with(op.operands[0])
    op.erase()
    return True


def _wrong_operator(op: Operation) -> bool:
    op.attributes["kind"] = "max"
    return True


def _swap(op: Operation) -> bool:
    """Two results of one type change places: each parameter gets the other's gradient."""
    values = op.operands
    for i in range(1, len(values)):
        for j in range(i + 1, len(values)):
            if values[i].type == values[j].type and values[i] is not values[j]:
                op.set_operand(i, values[j])
                op.set_operand(j, values[i])
                return True
    return False


def _wrong_order(op: Operation) -> bool:
    """The pieces of a gather come out in the wrong order: the halves of the dimension change places."""
    t = op.result.type
    assert isinstance(t, TensorType) and op.parent is not None
    b = Builder.before_op(op.next) if op.next is not None else Builder.at_end(op.parent)
    d, size = op["dim"], t.shape[op["dim"]]
    assert isinstance(size, int)
    half = size // op["ranks"]

    def cut(start: int, n: int) -> Value:
        shape = tuple(n if i == d else s for i, s in enumerate(t.shape))
        return b.op("graph.slice", op.result, type=TensorType(shape, t.dtype), starts=tuple(start if i == d else 0 for i in range(t.rank)),
                    steps=(1,) * t.rank)
    made = b.op("graph.cat", cut(half, size - half), cut(0, half), type=TensorType(t.shape, t.dtype), dim=d)
    slices = {v.defining_op for v in made.defining_op.operands}  # type: ignore[union-attr]
    op.result.replace_uses_if(made, lambda user: user not in slices)
    return True


_KINDS: dict[str, tuple[Callable[[Operation], bool], Callable[[Operation], bool]]] = {
    "dropped all-reduce": (lambda op: op.name == "dist.all_reduce", _drop),
    "dropped shift": (lambda op: op.name == "dist.shift", _drop),
    "wrong reduce operator": (lambda op: op.name in ("dist.all_reduce", "dist.reduce_scatter") and op["kind"] == "sum", _wrong_operator),
    "gathered in the wrong order": (lambda op: op.name == "dist.all_gather", _wrong_order),
    "swapped gradients": (lambda op: op.name == "return", _swap),
}
