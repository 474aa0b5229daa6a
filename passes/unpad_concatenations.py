"""Concatenations of equal parts read each part periodically instead of with padding.

    cat([a, b], -1)[d] = select(d < n, a[d] or 0, b[d - n] or 0)      ->      select(d < n, a[d % n], b[d % n])

A padded read keeps its producer in memory, since the padding is said in terms of the tensor's bounds; a periodic one is in bounds everywhere and
its producer merges (rotary embeddings become one kernel). Elements are read once per part, mostly from cache: for GPUs, whose loads need no
contiguous vectors. Before: straight after `decompose`, which marks concatenations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Operation, sym
from ..ir.expr import mod
from ..ir.passes import Pass, PassContext, register


@register
@dataclass(frozen=True)
class UnpadConcatenations(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "unpad-concatenations"
    most: int = 4

    def run(self, module: Operation, ctx: PassContext) -> None:
        changed = 0
        for func in [f for f in module.body if f.name == "func"]:
            for op in func.body:
                if op.name == "tensor.generic" and "_concatenates" in op.attributes:
                    changed += self._unpad(op)
        ctx.remark("done", f"{changed} concatenations unpadded")

    def _unpad(self, op: Operation) -> bool:
        dim = op.attributes.pop("_concatenates")
        sizes = {v.type.shape[dim] for v in op.operands}  # type: ignore[attr-defined]
        if len(sizes) != 1 or len(op.operands) > self.most:
            return False
        size, = sizes
        if not isinstance(size, int) or size == 0:
            return False
        op.attributes["maps"] = tuple(tuple(mod(sym(f"d{j}"), size) if j == dim else e for j, e in enumerate(m)) for m in op["maps"])
        del op.attributes["fills"]
        return True
