"""Weights that stay in float32, because a stream sums them before they are scaled.

    w = f16(exp(s) / sum)        out = w @ v

A stream takes the division out of the sum, and exp(s) alone may be too large for 16 bits. Without the rounding nothing is lost: the product,
which sums in float32 anyway, reads the weights as they were computed. (bfloat16 has float32's range: there the rounding stays, and the matrix
unit with it.)
"""

from __future__ import annotations

from ..ir import DType, Operation, ScalarType, TensorType, Value, element_type
from .structured import is_contraction, is_pointwise

__all__ = ["keep_wide", "round_again"]


def keep_wide(weights: Value, rounding: Operation) -> bool:
    """Takes `rounding`, the cast to 16 bits with which the body that makes `weights` ends, out of it; False where it does something else too."""
    made = weights.defining_op
    if made is None or not is_pointwise(made) or len(made.results) != 1 or made.body.terminator.operands[0] is not rounding.result:
        return False
    if len(rounding.result.uses) != 1 or element_type(rounding.operands[0].type).name != "f32":
        return False
    if not all(_only_widens(u, i) for u, i in weights.uses):
        return False
    made.body.terminator.set_operand(0, rounding.operands[0])
    _retype(weights, element_type(rounding.operands[0].type))
    return True


def round_again(weights: Value, rounding: Operation) -> None:
    """Undoes `keep_wide`."""
    made = weights.defining_op
    assert made is not None
    made.body.terminator.set_operand(0, rounding.result)
    _retype(weights, element_type(rounding.result.type))


def _only_widens(user: Operation, i: int) -> bool:
    """The reader is a product of float32 numbers, to which the operand is converted."""
    return is_contraction(user) and all(u.name == "arith.cast" and element_type(u.result.type).name == "f32" for u in user.body.args[i].users)


def _retype(weights: Value, dtype: DType) -> None:
    assert isinstance(weights.type, TensorType)
    weights.type = TensorType(weights.type.shape, dtype, weights.type.strides)
    for user, i in weights.uses:
        user.body.args[i].type = ScalarType(dtype)
