"""Dead code elimination: pure ops whose results nobody reads are erased, inside bodies too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Operation, Trait
from ..ir.passes import Pass, PassContext, register


@register
@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """After: every pure op has a used result. Externs that only read are dropped too, unless they draw random numbers or decide a size."""

    name: ClassVar[str] = "dce"

    def run(self, module: Operation, ctx: PassContext) -> None:
        ctx.remark("done", f"{erase_dead(module)} ops erased")


def erase_dead(root: Operation) -> int:
    """Erases dead ops inside `root`, users first; returns how many."""
    count = 0
    for region in root.regions:
        for block in region.blocks:
            for op in block.reversed():
                if _removable(op) and not any(r.uses for r in op.results):
                    op.erase()
                    count += 1
                elif op.regions:
                    count += erase_dead(op)
    return count


def _removable(op: Operation) -> bool:
    if op.has_trait(Trait.Terminator) or not op.results:
        return False
    if op.name == "tile.load":
        return not op["check"]
    if op.has_trait(Trait.Pure) or op.name == "tile.for":
        return op.name != "tile.for" or not _has_effect(op)
    return op.name in ("graph.extern", "tensor.extern") and not op["random"] and not op["defines"]


def _has_effect(op: Operation) -> bool:
    """A store, or a load that reports bad indices."""
    return any(inner.has_trait(Trait.WritesMemory) or (inner.name == "tile.load" and inner["check"]) for inner in op.walk())
