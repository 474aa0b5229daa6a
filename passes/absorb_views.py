"""Views vanish into the index maps of their readers.

Before: reshapes, permutes, slices, expands, pads are generics that copy. After: every structured reader of such a view reads the view's
source through the composed map; views that nothing reads any more are erased. What stays is a view that leaves the
function or feeds an extern, or one whose padding cannot be kept in the reader's map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Operation, TensorType
from ..ir.dialects.tensor import fill_of
from ..ir.opdef import Trait
from ..ir.passes import Pass, PassContext, register
from .structured import composed_map, is_contraction, is_identity_view, map_bounds, plain_dims


@register
@dataclass(frozen=True)
class AbsorbViews(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "absorb-views"

    def run(self, module: Operation, ctx: PassContext) -> None:
        absorbed = 0
        for func in module.body:
            if func.name != "func":
                continue
            for op in func.body:
                if op.has_trait(Trait.Structured):
                    absorbed += absorb_into(op, ctx)
            for op in func.body.reversed():
                if is_identity_view(op) and not op.result.uses:
                    op.erase()
        ctx.remark("done", f"{absorbed} views absorbed")


def absorb_into(op: Operation, ctx: PassContext) -> int:
    """Replaces operands of `op` that are views by their sources. Returns how many."""
    lead = 1 if op.name == "tensor.scatter" else 0
    count = 0
    for i, m in enumerate(op["maps"]):
        if m is None:
            continue
        v = op.operands[lead + i]
        view = v.defining_op
        if view is None or not is_identity_view(view):
            continue
        fill, view_fill = fill_of(op, i), fill_of(view, 0)
        if fill is not None and not (view_fill is None and _is_permutation(view)):
            ctx.remark("declined", "a padded read of a view keeps the view", op.location)
            continue
        if view_fill is not None and is_contraction(op):
            continue  # a padded operand of a contraction is materialised: its inner loop must not test bounds
        maps, fills = list(op["maps"]), list(op["fills"] or (None,) * len(op["maps"]))
        maps[i] = composed_map(m, view["maps"][0], map_bounds(op))
        fills[i] = fill if fill is not None else view_fill
        op.attributes["maps"] = tuple(maps)
        if any(f is not None for f in fills):
            op.attributes["fills"] = tuple(fills)
        op.set_operand(lead + i, view.operands[0])
        count += 1
    return count


def _is_permutation(view: Operation) -> bool:
    source = view.operands[0].type
    assert isinstance(source, TensorType)
    dims = plain_dims(view["maps"][0])
    return dims is not None and len(dims) == len(view["dims"]) and all(view["dims"][d] == s for d, s in zip(dims, source.shape, strict=True))
