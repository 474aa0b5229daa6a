"""A loop that reads or writes a reversed tensor walks it backwards instead.

Before: operands that a `loop` slices may be flipped along dimension 0, and all readers of a stacked result may flip it (the loop of a
backward pass is so). After: such operands and results are in the loop's `reversed_operands` and `reversed_results`, and the flips are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Operation, TensorType, Value, sym
from ..ir.passes import Pass, PassContext, register
from .structured import identity_map, is_identity_view

__all__ = ["AbsorbFlips"]


@register
@dataclass(frozen=True)
class AbsorbFlips(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "absorb-flips"

    def run(self, module: Operation, ctx: PassContext) -> None:
        count = 0
        for func in [f for f in module.body if f.name == "func"]:
            for op in [op for op in func.body if op.name == "loop"]:
                count += _operands(op) + _results(op)
        ctx.remark("done", f"{count} flips absorbed by loops")


def _flipped(v: Value) -> Value | None:
    """What `v` is the reverse of along dimension 0."""
    op = v.defining_op
    if op is None or not is_identity_view(op) or op["fills"]:
        return None
    source = op.operands[0]
    t = source.type
    if not isinstance(t, TensorType) or t.shape != op["dims"] or not t.rank:
        return None
    return source if op["maps"][0] == (t.shape[0] - 1 - sym("d0"), *identity_map(t.rank)[1:]) else None


def _operands(loop: Operation) -> int:
    backwards = set(loop["reversed_operands"])
    count = 0
    for j in range(loop["sliced"]):
        i = loop["carried"] + j
        source = _flipped(loop.operands[i])
        if source is not None:
            view = loop.operands[i].defining_op
            loop.set_operand(i, source)
            backwards ^= {j}
            count += 1
            if view is not None and not view.result.uses:
                view.erase()
    _set(loop, "reversed_operands", backwards)
    return count


def _results(loop: Operation) -> int:
    backwards = set(loop["reversed_results"])
    count = 0
    for j, r in enumerate(loop.results[loop["carried"]:]):
        if not r.uses or not all(len(user.results) == 1 and _flipped(user.results[0]) is r for user in r.users):
            continue
        for user in list(r.users):
            user.results[0].replace_all_uses_with(r)
            user.erase()
        backwards ^= {j}
        count += 1
    _set(loop, "reversed_results", backwards)
    return count


def _set(loop: Operation, key: str, numbers: set[int]) -> None:
    loop.attributes.pop(key, None)
    if numbers:
        loop.attributes[key] = tuple(sorted(numbers))
