"""Reductions whose result was rounded to 16 bits are stored in 16 bits.

When a rounding cast of a reduction's result merges into its readers (`inline`), they compute with the unrounded value: more precise, and free
while that value stays in registers. Where it must go through memory after all, because producer and readers ended up in different kernels, it
takes twice the bytes; then it is rounded, as eager does. `inline` notes on the reduction, as `_rounds`, what type it had been rounded to, if all
readers saw that.
Before: `fuse` has made groups. After: such a result crosses from kernel to kernel in its 16-bit type; readers widen it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Block, Builder, DType, Operation, ScalarType, TensorType, Value, element_type
from ..ir.dialects.tensor import parallel_dims
from ..ir.passes import Pass, PassContext, register
from ..ir.types import DTYPES
from .structured import body_ops, identity_map, is_pointwise

__all__ = ["ROUNDS", "NarrowResults", "note_rounding", "rounding"]

ROUNDS = "_rounds"
NARROW = ("bf16", "f16")


def note_rounding(cast: Operation) -> None:
    """Called before `cast`, a pointwise op, merges into all its readers: if it only rounds the result of a reduction, the reduction is told."""
    narrow = rounding(cast)
    maker = cast.operands[0].defining_op if narrow is not None else None
    if maker is not None and maker.name == "tensor.generic" and maker["reductions"] and len(maker.results) == 1 and len(maker.result.uses) == 1:
        assert narrow is not None
        maker.attributes[ROUNDS] = narrow.name


def rounding(op: Operation) -> DType | None:
    """The 16-bit type of the result, if all that a pointwise op does is round float32 numbers to it."""
    if not is_pointwise(op) or len(op.operands) != 1 or len(op.results) != 1 or [o.name for o in body_ops(op)] != ["arith.cast"]:
        return None
    narrow = element_type(op.result.type)
    return narrow if element_type(op.operands[0].type).name == "f32" and narrow.name in NARROW else None


@register
@dataclass(frozen=True)
class NarrowResults(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "narrow-results"

    def run(self, module: Operation, ctx: PassContext) -> None:
        narrowed = 0
        for func in [f for f in module.body if f.name == "func"]:
            for fused in [op for op in func.body if op.name == "tensor.fused" and not op["why"].startswith("streams")]:
                for k, inner in enumerate(fused.body.terminator.operands):
                    noted = inner.defining_op.attributes.get(ROUNDS) if inner.defining_op is not None else None
                    if noted is not None and fused.results[k].uses and all(_can_widen(user, i) for user, i in fused.results[k].uses):
                        _narrow(fused, k, DTYPES[noted])
                        narrowed += 1
        ctx.remark("done", f"{narrowed} results stored in 16 bits")


def _can_widen(user: Operation, i: int) -> bool:
    """The reader is a kernel whose members read the value element by element."""
    return user.name == "tensor.fused" and all(u.name == "tensor.generic" and u["maps"][j] is not None for u, j in user.body.args[i].uses)


def _narrow(fused: Operation, k: int, dtype: DType) -> None:
    terminator, outer = fused.body.terminator, fused.results[k]
    inner = terminator.operands[k]
    assert inner.defining_op is not None and isinstance(outer.type, TensorType)
    dims = parallel_dims(inner.defining_op)
    rounded = Builder.before_op(terminator).generic([inner], [identity_map(len(dims))], dims, lambda b, x: b.cast(x, dtype))
    rounded.result.name = inner.name
    terminator.set_operand(k, rounded.result)
    outer.type = rounded.result.type = TensorType(outer.type.shape, dtype, outer.type.strides)
    for user, i in list(outer.uses):
        arg = user.body.args[i]
        arg.type = outer.type
        for op, j in list(arg.uses):
            _widen(op.body, op.body.args[j], dtype)


def _widen(body: Block, arg: Value, dtype: DType) -> None:
    """The body's argument has the 16-bit type now; what the body does with it stays."""
    wide = element_type(arg.type)
    users = [user for user, _ in arg.uses]
    arg.type = ScalarType(dtype)
    first = body.first
    assert first is not None
    widened = Builder.before_op(first).cast(arg, wide)
    arg.replace_uses_if(widened, lambda user: user in users)
