"""Loads that only one side of a choice by position needs are not done elsewhere (GPUs).

A concatenation is `select(column < n, first[...], second[...])`: each program read all of its parts, at any address, and dropped all but one
(the gradients of q, k and v of BERT's layer put together: 23 us for what takes 9). Here the condition becomes a mask of the load:

    %x = tile.load(...);  %y = select(lt(index, n), %x, ...)      ->      %x = tile.load(...) {mask = [[index, n]]}

Before: kernels' bodies have no dead or equal ops. After: the same values are chosen; what was not chosen is not read. Conditions are
comparisons of a position with a constant; between the load and the choice there may be conversions and further choices, read by nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Dim, Operation, Value, element_type, sym
from ..ir.expr import free_symbols, substitute
from ..ir.passes import Pass, PassContext, register

__all__ = ["PredicateLoads"]


@dataclass(frozen=True)
class _Condition:
    """`low` <= position < `high`, each a constant or None; the position is `index`, a `tile.index`."""

    index: Operation
    low: int | None
    high: int | None


@register
@dataclass(frozen=True)
class PredicateLoads(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "predicate-loads"

    def run(self, module: Operation, ctx: PassContext) -> None:
        done = 0
        for kernel in [op for op in module.body if op.name == "tile.kernel"]:
            for op in list(kernel.walk()):
                if op.name == "arith.select":
                    for side in (True, False):
                        condition = _condition(op.operands[0], side)
                        if condition is not None:
                            done += _narrow(op.operands[1 if side else 2], condition, op)
        ctx.remark("done", f"{done} loads masked by the choice that reads them")


def _condition(v: Value, holds: bool) -> _Condition | None:
    """What `v`, or its contrary, says about a position."""
    op = v.defining_op
    if op is None or op.name not in ("arith.lt", "arith.ge", "arith.le", "arith.gt"):
        return None
    index, bound = (x.defining_op for x in op.operands)
    if index is None or bound is None or index.name != "tile.index" or bound.name != "arith.constant" or not isinstance(bound["value"], int):
        return None
    below = op.name in ("arith.lt", "arith.le")
    limit = bound["value"] + (op.name in ("arith.le", "arith.gt"))
    return _Condition(index, None, limit) if below == holds else _Condition(index, limit, None)


def _narrow(v: Value, condition: _Condition, reader: Operation) -> int:
    """Masks the loads that make `v` for `reader` alone; how many."""
    op = v.defining_op
    if op is None or len(v.uses) != 1 or op.parent is not reader.parent:
        return 0
    if op.name == "arith.cast":
        return _narrow(op.operands[0], condition, op)
    if op.name == "arith.select":
        return sum(_narrow(x, condition, op) for x in op.operands[1:])
    if op.name != "tile.load" or op["check"] or op["matrix"] or not _comes_before(condition.index, op):
        return 0
    shape = op["shape"]
    if any(n > 1 and (not shape or shape[i] == 1) for i, n in enumerate(condition.index["shape"])):
        return 0  # it is loaded once for positions on both sides
    first = len(op.operands) - 1
    at: Dim = substitute(condition.index["expr"], {f"i{k}": sym(f"i{first + k}") for k in range(len(condition.index.operands))})
    _append(op, condition.index.operands)
    if condition.high is not None:
        op.attributes["mask"] = (*op["mask"], (at, condition.high))
    if condition.low is not None:
        op.attributes["mask_low"] = (*op["mask_low"], at - condition.low)
    dtype = element_type(op.result.type)
    op.attributes.setdefault("other", 0.0 if dtype.is_float else False if dtype.kind == "bool" else 0)
    return 1


def _comes_before(index: Operation, load: Operation) -> bool:
    """The load may use what `index` is computed from."""
    block = load.parent
    for v in index.operands:
        maker = v.defining_op
        if maker is not None and maker.parent is block and not _is_earlier(maker, load):
            return False
    return bool(index.parent is block) and not free_symbols(index["expr"]) - {"t0", "t1", *(f"i{k}" for k in range(len(index.operands)))}


def _is_earlier(a: Operation, b: Operation) -> bool:
    assert a.parent is not None
    for op in a.parent:
        if op is a or op is b:
            return op is a
    return False


def _append(op: Operation, values: tuple[Value, ...] | list[Value]) -> None:
    op.set_operands([*op.operands, *values])
