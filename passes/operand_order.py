"""Activations are laid out so that the product that reads them walks them in a straight line (GPUs).

Attention gives [batch, head, position, width]; the projection after it sums over heads and widths together, which in row-major order is no single
walk through memory, so that no library could compute it. Computed values may lie in any order: here as [batch, position, head, width].
Before: values are row-major. After: some that a contraction reads have strides; what they are made and read by is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

from ..ir import Operation, TensorType
from ..ir.passes import Pass, PassContext, register
from .layout import set_type
from .products import walk
from .structured import in_order, is_contraction, is_pointwise

__all__ = ["OperandOrder"]

MAX_RANK = 5


@register
@dataclass(frozen=True)
class OperandOrder(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "operand-order"

    def run(self, module: Operation, ctx: PassContext) -> None:
        found = 0
        for func in [f for f in module.body if f.name == "func"]:
            returned = set(func.body.terminator.operands)
            for op in [o for o in func.body if is_contraction(o)]:
                for i, v in enumerate(op.operands):
                    maker, t = v.defining_op, v.type
                    if maker is None or not is_pointwise(maker) or v in returned or not isinstance(t, TensorType) or t.strides is not None:
                        continue
                    order = _straight(op, i, t)
                    if order is not None:
                        set_type(v, in_order(t, order))
                        found += 1
        ctx.remark("done", f"{found} operands in the order in which products read them")


def _straight(op: Operation, i: int, t: TensorType) -> list[int] | None:
    """An order of the dimensions of operand i in which `op` reads it with fixed strides; None if row-major will do, or none does."""
    if t.rank > MAX_RANK or any(n == 0 for n in t.shape) or walk(op, i, t) is not None:
        return None
    *_, last = range(t.rank)
    return next((order for rest in permutations(range(t.rank - 1)) if walk(op, i, in_order(t, order := [*rest, last])) is not None), None)
