"""Constant folding, by calling the reference interpreter: there is no second semantics to disagree with.

An op whose operands are all constants becomes a constant, if the result has at most `max_elements` elements and no size symbol is
involved. Splats stay splats (`graph.full`, `arith.constant`): a large one is cheaper to make than to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ir import Dense, IRError, Operation, TensorType, Trait, Value
from ..ir.attributes import NUMPY_DTYPES
from ..ir.builder import Builder
from ..ir.interpreter import interpret_op
from ..ir.passes import Pass, PassContext, register


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """After: no pure graph or arith op within the size bound has only constant operands."""

    name: ClassVar[str] = "fold-constants"
    max_elements: int = 4096

    def run(self, module: Operation, ctx: PassContext) -> None:
        ctx.remark("done", f"{self._fold_in(module)} ops folded")

    def _fold_in(self, root: Operation) -> int:
        count = 0
        for region in root.regions:
            for block in region.blocks:
                for op in block:
                    count += self._fold_in(op) if op.regions else self._fold(op)
        return count

    def _fold(self, op: Operation) -> bool:
        dialect = op.opdef.dialect
        if dialect not in ("graph", "arith") or not op.has_trait(Trait.Pure) or op.has_trait(Trait.ConstantLike) or not op.operands:
            return False
        if len(op.results) != 1 or not all(_is_constant(v) for v in op.operands) or not self._small(op.result):
            return False
        operands = [_tensor_of(v) for v in op.operands]
        try:
            value, = interpret_op(op, operands)
        except (IRError, IndexError):  # what fails when it runs fails then
            return False
        made = _constant(Builder.before_op(op), op.result, torch.as_tensor(value))
        if made is None:
            return False
        op.result.replace_all_uses_with(made)
        op.erase()
        return True

    def _small(self, v: Value) -> bool:
        t = v.type
        return not isinstance(t, TensorType) or _is_known(t, self.max_elements)


def _is_constant(v: Value) -> bool:
    op = v.defining_op
    if op is None or op.name not in ("graph.full", "graph.constant", "arith.constant"):
        return False
    t = v.type
    return not isinstance(t, TensorType) or _is_known(t, 4096)


def _is_known(t: TensorType, most: int) -> bool:
    """Whether every size is a number (a symbol may stand beside a zero) and there are few elements."""
    return all(isinstance(size, int) for size in t.shape) and t.numel <= most  # type: ignore[operator]


def _tensor_of(v: Value) -> Any:
    op = v.defining_op
    assert op is not None
    if op.name == "arith.constant":
        return op["value"]
    return interpret_op(op, [])[0]


def _constant(b: Builder, like: Value, value: torch.Tensor) -> Value | None:
    """A constant op for `value`, as a splat when all elements are equal; None for types without one."""
    t = like.type
    dtype = t.dtype  # type: ignore[attr-defined]
    if dtype.kind == "complex":
        return None
    first = value.reshape(-1)[0].item() if value.numel() else 0
    convert: Any = {"float": float, "bool": bool}.get(dtype.kind, int)
    if not isinstance(t, TensorType):
        return b.op("arith.constant", type=t, value=convert(first))
    if value.numel() and bool((value == value.reshape(-1)[0]).all()) and (first != 0 or not bool(torch.signbit(value).any())):
        return b.op("graph.full", type=t, value=convert(first))
    raw = value.contiguous()
    bits = raw.view(torch.int16) if dtype.name == "bf16" else raw.view(torch.uint8) if dtype.bits == 8 and dtype.is_float else raw
    data = bits.numpy().astype(NUMPY_DTYPES[dtype.name], copy=False).tobytes()
    return b.op("graph.constant", type=t, value=Dense(dtype, tuple(value.shape), data))
