"""Common subexpression elimination: of two equal pure ops with equal operands, the later one goes.

Works block by block (a nested block sees what its parents computed, unless its op is isolated). Ops with regions are compared structurally.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir import Block, Operation, Trait
from ..ir.attributes import Dense
from ..ir.core import equivalent
from ..ir.passes import Pass, PassContext, register


@register
@dataclass(frozen=True)
class CommonSubexpressionElimination(Pass):
    """After: no two pure ops of a block compute the same thing."""

    name: ClassVar[str] = "cse"

    def run(self, module: Operation, ctx: PassContext) -> None:
        ctx.remark("done", f"{_in_op(module, ())} ops merged")


_Known = dict[Any, list[Operation]]


def _in_op(op: Operation, outer: tuple[_Known, ...]) -> int:
    """`outer`: what the blocks around compute, from the inside out."""
    inherited = () if op.has_trait(Trait.IsolatedFromAbove) else outer
    return sum(_in_block(block, inherited) for region in op.regions for block in region.blocks)


def _in_block(block: Block, outer: tuple[_Known, ...]) -> int:
    count = 0
    known: _Known = {}
    scopes = (known, *outer)
    for op in block:
        if op.regions:
            count += _in_op(op, scopes)
        if not op.has_trait(Trait.Pure) or not op.results:
            continue
        key = _key(op)
        candidates = (c for scope in scopes for c in scope.get(key, ()))
        twin = next((c for c in candidates if not op.regions or equivalent(c, op)), None)
        if twin is None:
            known.setdefault(key, []).append(op)
            continue
        for old, new in zip(op.results, twin.results, strict=True):
            old.replace_all_uses_with(new)
        op.erase()
        count += 1
    return count


def _key(op: Operation) -> Any:
    operands = tuple(id(v) for v in op.operands)
    if op.has_trait(Trait.Commutative):
        operands = tuple(sorted(operands))
    return (op.name, operands, tuple(r.type for r in op.results), tuple(sorted((k, _hashable(v)) for k, v in op.attributes.items())),
            tuple(len(r.block) for r in op.regions))


def _hashable(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    if isinstance(value, Dense):
        return (value.digest, str(value.dtype), value.shape)
    return f"{type(value).__name__}:{value!r}"
