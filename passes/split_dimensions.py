"""Pointwise readers of grouped reductions walk their space by groups, so that they fuse with the reduction.

Group normalisation reduces [N, G, C/G, H, W] over its last three, and applies the result to [N, C, H, W], reading it at [n, c // (C/G)]. The
reader's dimension c is split into (group, channel of the group): then it reads at [n, g], and both are one kernel that finds the
second reading of a group in the cache. A view gives the result its shape again; `fuse` gives that shape to the fused op's result.

Only where there are enough groups to keep all multiprocessors busy, and on GPUs (there the second reading from memory is what counts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Builder, Dim, Operation, TensorType, Value, sym
from ..ir.dialects.tensor import fill_of
from ..ir.expr import free_symbols, product
from ..ir.passes import Pass, PassContext, register
from .structured import composed_map, is_identity_view, is_pointwise, rebuild, reshape_like, space_bounds

__all__ = ["SplitDimensions", "reshaping_view"]


@register
@dataclass(frozen=True)
class SplitDimensions(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "split-dimensions"

    def run(self, module: Operation, ctx: PassContext) -> None:
        split = 0
        for func in [f for f in module.body if f.name == "func"]:
            for op in list(func.body):
                if not is_pointwise(op) or len(op.results) != 1 or not all(isinstance(n, int) for n in op["dims"]):
                    continue
                found = _groups(op, ctx.target.multiprocessors)
                if found is not None:
                    _split(op, *found)
                    split += 1
                    ctx.remark("done", f"walks dimension {found[0]} in groups of {found[1]}, to fuse with the reduction that it reads", op.location)
        ctx.remark("done", f"{split} readers walk their space by groups")


def reshaping_view(v: Value) -> Operation | None:
    """The op by which alone the computed `v` is read, if that only gives it another shape (elements in the same order)."""
    users = v.users
    if len(users) != 1 or v.defining_op is None or v.defining_op.name != "tensor.generic" or not is_identity_view(users[0]):
        return None
    view, t = users[0], v.type
    assert isinstance(t, TensorType) and isinstance(view.result.type, TensorType)
    plain = t.strides is None and view.result.type.strides is None and fill_of(view, 0) is None
    return view if plain and t.dtype == view.result.type.dtype and reshape_like(view["maps"][0], view["dims"], t.shape) else None


def _groups(op: Operation, multiprocessors: int) -> tuple[int, int] | None:
    """(dimension, size of a group): some operand, computed from a reduction, is read at that dimension // size, and all of such operands at nothing
    finer."""
    t = op.result.type
    assert isinstance(t, TensorType)
    if t.strides is not None:
        return None
    candidates: set[tuple[int, int]] = set()
    for i, (v, m) in enumerate(zip(op.operands, op["maps"], strict=True)):
        if m is None or fill_of(op, i) is not None or not _reduced(v.defining_op):
            continue
        outer = product(v.type.shape)  # type: ignore[attr-defined]
        if not isinstance(outer, int):
            continue
        for d, size in enumerate(op["dims"]):
            name = f"d{d}"
            of = [e for e in m if name in free_symbols(e)]
            c = next((c for c in range(2, size) if size % c == 0 and of == [sym(name) // c]), None)
            if c is not None and outer >= max(1, multiprocessors):
                candidates.add((d, c))
    return candidates.pop() if len(candidates) == 1 else None


def _reduced(maker: Operation | None, depth: int = 4) -> bool:
    """A reduction, or small pointwise work on one."""
    if maker is None or maker.name != "tensor.generic" or depth == 0:
        return False
    return bool(maker["reductions"]) or any(_reduced(v.defining_op, depth - 1) for v in maker.operands)


def _split(op: Operation, d: int, c: int) -> None:
    dims = list(op["dims"])
    new_dims = [*dims[:d], dims[d] // c, c, *dims[d + 1:]]
    place: dict[int, Dim] = {j: sym(f"d{j + (j > d)}") for j in range(len(dims))}
    place[d] = sym(f"d{d}") * c + sym(f"d{d + 1}")
    bounds = space_bounds(new_dims)
    old_to_new = [place[j] for j in range(len(dims))]
    maps = [None if m is None else composed_map(old_to_new, m, bounds) for m in op["maps"]]
    fills = [fill_of(op, i) for i in range(len(op.operands))]
    b = Builder.before_op(op)
    made = rebuild(op, b, op.operands, maps, fills, new_dims, place)
    read = [sym(f"d{j}") for j in range(d)] + [sym(f"d{d}") // c, sym(f"d{d}") % c] + [sym(f"d{j}") for j in range(d + 1, len(dims))]
    view = b.generic([made.result], [tuple(read)], dims, lambda _, x: x, name=op.result.name)
    assert reshaping_view(made.result) is view
    op.result.replace_all_uses_with(view.result)
    op.erase()
