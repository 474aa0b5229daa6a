"""Reductions and contractions compute directly in the shape in which they are read.

`linear` on [B, S, K] arrives as a matmul of [B*S, K] whose result is read back as [B, S, N]. When every reader sees the result
through one and the same reshape, the op's parallel dimensions are replaced by the readers': after this pass such readers
read it through the identity map, and fusion sees one iteration space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Builder, Operation, Value, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import Dim, free_symbols
from ..ir.opdef import Trait
from ..ir.passes import Pass, PassContext, register
from .structured import composed_map, identity_map, rebuild, reshape_like, space_bounds


@register
@dataclass(frozen=True)
class SinkReshapes(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "sink-reshapes"

    def run(self, module: Operation, ctx: PassContext) -> None:
        moved = 0
        for func in module.body:
            if func.name == "func":
                for op in list(func.body.reversed()):
                    if op.name == "tensor.generic" and op["reductions"] > 0:
                        moved += _sink(op)
        ctx.remark("done", f"{moved} reshapes moved into their producers")


def _reads(op: Operation) -> list[tuple[Operation, int, int]] | None:
    """(reader, operand number, map number) of every use; None if some use is not a mapped read."""
    found = []
    for r in op.results:
        for user, i in r.uses:
            lead = 1 if user.name == "tensor.scatter" else 0
            if not user.has_trait(Trait.Structured) or i < lead or user["maps"][i - lead] is None or fill_of(user, i - lead) is not None:
                return None
            found.append((user, i, i - lead))
    return found


def _space_of(reader: Operation, m: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """The parallel sizes through which `reader` sees the value; None if its map uses reduction dimensions."""
    shape = parallel_dims(reader) if reader.name == "tensor.generic" else reader["dims"]
    names = {f"d{i}" for i in range(len(shape))}
    used = {s for e in m for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()}
    return shape if used <= names else None


def _sink(op: Operation) -> bool:
    reads = _reads(op)
    if not reads:
        return False
    first, _, k = reads[0]
    m = first["maps"][k]
    shape = _space_of(first, m)
    old = parallel_dims(op)
    if shape is None or m == identity_map(len(shape)) or not reshape_like(m, shape, old):
        return False
    if any(u["maps"][j] != m or _space_of(u, m) != shape for u, _, j in reads):
        return False
    dims = (*shape, *op["dims"][len(old):])
    old_to_new: list[Dim] = [*m, *(sym(f"d{len(shape) + r}") for r in range(op["reductions"]))]
    bounds = space_bounds(dims)
    maps = [None if om is None else composed_map(old_to_new, om, bounds) for om in op["maps"]]
    fills = [fill_of(op, i) for i in range(len(op.operands))]
    new = rebuild(op, Builder.before_op(op), op.operands, maps, fills, dims, dict(enumerate(old_to_new)))
    swap: dict[Value, Value] = dict(zip(op.results, new.results, strict=True))
    for user, i, j in reads:
        user.set_operand(i, swap[user.operands[i]])
        user_maps = list(user["maps"])
        user_maps[j] = identity_map(len(shape))
        user.attributes["maps"] = tuple(user_maps)
    op.erase()
    return True
