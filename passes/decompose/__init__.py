"""Decomposition: the graph dialect rewritten to the tensor dialect.

Before: functions of graph ops. After: no graph op is left; what was one is a few `tensor.generic` (or scatter, scan, extern,
constant, assign), and the module's level is "tensor". Sizes stay symbolic, locations and the names of results are kept,
function attributes are untouched. Nothing is fused or simplified here: bodies are small and every intermediate is a
tensor, for the passes that follow to join.

`RULES` maps each graph op to its rule, a file per family; `common` says what a rule is and how precision is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir import Builder, IRError, Operation, TensorType, Value
from ...ir.passes import Pass, PassContext, register
from . import attention, contraction, convolution, elementwise, indexing, norm, pool, random, reduction, sources, views
from .common import Rule, identity, move, tensor_type

__all__ = ["RULES", "Decompose"]


def _merged() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for family in (elementwise, views, sources, contraction, convolution, attention, reduction, norm, pool, indexing, random):
        for name, rule in family.RULES.items():
            if name in rules:
                raise IRError(f"'{name}' has two decompositions")
            rules[name] = rule
    return rules


RULES = _merged()


@register
@dataclass(frozen=True)
class Decompose(Pass):
    """graph -> tensor; see the module docstring."""

    name: ClassVar[str] = "decompose"

    def run(self, module: Operation, ctx: PassContext) -> None:
        """Rewrites `module` in place. IRError names an op of the graph dialect that has no rule."""
        for func in module.body:
            if func.name != "func":
                continue
            for op in func.body:
                if op.opdef.dialect == "graph":
                    if ctx.target.is_gpu:
                        op.attributes.pop("exact", None)
                    _rewrite(op)
        module.attributes["level"] = "tensor"


def _rewrite(op: Operation) -> None:
    rule = RULES.get(op.name)
    if rule is None:
        raise IRError(f"'{op.name}' at {op.location} has no decomposition; add a rule to passes/decompose, or let the frontend "
                      f"make it a graph.extern")
    b = Builder.before_op(op)
    values = rule(b, op)
    for old, new in zip(op.results, values, strict=True):
        if new is not None:
            old.replace_all_uses_with(_with_type(b, op, new, tensor_type(old)))
    op.erase()


def _with_type(b: Builder, op: Operation, value: Value, want: TensorType) -> Value:
    """`value` with the layout that the graph op declared for its result."""
    have = tensor_type(value)
    if (have.shape, have.dtype) != (want.shape, want.dtype):
        raise IRError(f"the decomposition of '{op.name}' at {op.location} gives {have} where {want} is declared")
    if have == want:
        return value
    if value in op.operands:  # an operand has uses of its own: its layout is not ours to change
        value = move(b, value, want.shape, identity(want.rank))
    value.type = want
    return value
