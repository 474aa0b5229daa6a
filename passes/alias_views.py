"""Views that are needed in memory share their source's (GPUs).

Most views are gone by now: their readers read the source through a map. What is left is saved for the backward pass, or given to an operator or a
library under another shape: the three parts of a projection as heads, an activation as a matrix. If the view is a walk through its source's memory
with fixed strides it becomes a `tensor.alias`, which copies nothing.

Views of arguments that are not written share memory where an operator or a library reads them: the backward pass hands the parts of a saved
projection to the gradient of attention.
A result that the user sees keeps memory of its own: only results marked `saved`, which torch keeps for the backward pass, may share it, and only
with what the user does not see.
Before: layouts are settled, nothing is fused. After: such views are `tensor.alias` ops, whose types say how memory is walked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Builder, Dim, Operation, TensorType, Value
from ..ir.core import BlockArg
from ..ir.dialects.tensor import fill_of
from ..ir.expr import as_int, simplify, split_linear
from ..ir.passes import Pass, PassContext, register
from .structured import is_identity_view, space_bounds

__all__ = ["AliasViews"]

LARGE = 1 << 16
"""Bytes from which a view of memory is cheaper than a tensor of its own."""
MAKERS = ("tensor.generic", "tensor.library", "tensor.extern")


@register
@dataclass(frozen=True)
class AliasViews(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "alias-views"

    def run(self, module: Operation, ctx: PassContext) -> None:
        made = 0
        for func in [f for f in module.body if f.name == "func"]:
            returned = _returned(func)
            written = {op.operands[0] for op in func.body if op.name == "tensor.assign"}
            for op in [o for o in func.body if is_identity_view(o)]:
                made += _alias(op, returned, written)
        ctx.remark("done", f"{made} views share the memory of what they show")


def _returned(func: Operation) -> dict[Value, list[dict]]:
    """For each returned value, the attributes of the results that it is."""
    attrs = [a for a in func["result_attrs"] if a.get("kind", "tensor") in ("tensor", "int") and "view" not in a]
    values = func.body.terminator.operands
    found: dict[Value, list[dict]] = {}
    for k, v in enumerate(values):
        found.setdefault(v, []).append(attrs[k] if len(attrs) == len(values) else {})
    return found


def _alias(op: Operation, returned: dict[Value, list[dict]], written: set[Value]) -> bool:
    source, t = op.operands[0], op.result.type
    maker = source.defining_op
    if fill_of(op, 0) is not None or (maker is not None and maker.name not in MAKERS):
        return False
    if isinstance(source, BlockArg) and (source in written or op.result in returned or not _has_operator(op.result)):
        return False
    assert isinstance(t, TensorType)
    if not isinstance(t.numel, int) or as_int(t.numel) * t.dtype.bytes < LARGE or any(not a.get("saved") for a in returned.get(source, ())):
        return False
    found = _strides(op)
    if found is None:
        return False
    strides, offset = found
    for a in returned.get(op.result, ()):
        if not a.get("saved") or tuple(a.get("strides") or t.with_strides(None).layout) != strides or "base" in a or "same" in a:
            return False
    made = Builder.before_op(op).create("tensor.alias", [source], {"map": op["maps"][0], "offset": offset},
                                        [t.with_strides(None if strides == t.with_strides(None).layout else strides)])
    made.result.name = op.result.name
    if op.result in returned:
        returned[made.result] = returned[op.result]
    for user, i in list(op.result.uses):
        if user.regions and any(arg.type == op.result.type for arg in user.body.args) and user.name != "tensor.library":
            lead = 1 if user.name == "tensor.scatter" else 0
            if i >= lead and user["maps"][i - lead] is None:
                user.body.args[i - lead].type = made.result.type
    op.result.replace_all_uses_with(made.result)
    op.erase()
    for user, i in made.result.uses:
        if user.name == "tensor.library":
            user.body.args[i].type = made.result.type
    return True


def _has_operator(v: Value) -> bool:
    """An operator or a library reads it: kernels walk arguments by maps of their own."""
    return any(user.name in ("tensor.extern", "tensor.library") for user in v.users)


def _strides(op: Operation) -> tuple[tuple[Dim, ...], Dim] | None:
    """(strides, offset) of the view in its source's memory, in elements; None if it is no walk with fixed strides."""
    source = op.operands[0].type
    assert isinstance(source, TensorType)
    rest: Dim = 0
    for e, stride in zip(op["maps"][0], source.layout, strict=True):
        rest = rest + e * stride
    rest = simplify(rest, space_bounds(op["dims"]))
    strides: list[Dim] = []
    for d, size in enumerate(op["dims"]):
        split = split_linear(rest, f"d{d}")
        if split is None:
            return None
        stride, rest = split
        strides.append(stride)
        if size != 1 and stride == 0:
            return None  # an expanded dimension: writers of the result's own memory would not expect it
    if not isinstance(rest, int) or not all(isinstance(s, int) for s in strides):
        return None
    # The stride of a dimension of size 1 is what a row-major walk would give it, as in torch.
    for d in reversed(range(len(strides))):
        if op["dims"][d] == 1:
            strides[d] = 1 if d == len(strides) - 1 else strides[d + 1] * op["dims"][d + 1]
    return tuple(strides), rest
