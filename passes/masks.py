"""Masks from random numbers and by comparison: fewer instructions for the same bits.

A uniform number is an integer of 24 bits times 2^-24; dropout compares it with a probability, and multiplies what it keeps by the mask and by a
scale. Compared are the integer's 32 random bits instead, and mask and scale are one factor. Both hold bit for bit; `canonicalize` applies them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..ir import Operation, Value, element_type
from ..ir.rewriter import Rewriter

__all__ = ["compare_bits", "scale_mask"]

WORD, SIGNIFICAND = 32, 24


def compare_bits(op: Operation, rewriter: Rewriter, constant_value: Callable[[Value], object]) -> None:
    """f32(word >> n) * 2^-k >= c, or <: word >= t << n with t the least integer of which it holds. `word` is a u32 of which 24 bits are left."""
    bound = constant_value(op.operands[1])
    scaled = op.operands[0].defining_op
    if not isinstance(bound, float) or not math.isfinite(bound) or scaled is None or scaled.name != "arith.mul" or (
            element_type(scaled.result.type).name != "f32"):
        return
    factor, number = constant_value(scaled.operands[1]), scaled.operands[0].defining_op
    if not isinstance(factor, float) or factor <= 0 or math.frexp(factor)[0] != 0.5 or not 2.0**-64 <= factor <= 1 or number is None:
        return
    while number is not None and number.name == "arith.cast":
        number = number.operands[0].defining_op
    if number is None or number.name != "arith.shr" or element_type(number.result.type).name != "u32":
        return
    n = constant_value(number.operands[1])
    if not isinstance(n, int) or not WORD - SIGNIFICAND <= n < WORD:
        return
    least = math.ceil(float(torch.tensor(bound, dtype=torch.float32)) / factor)
    if not 0 < least < 1 << (WORD - n):
        return
    b, word = rewriter.builder(op), number.operands[0]
    rewriter.replace(op, [b.arith(op.name.removeprefix("arith."), word, b.constant(least << n, element_type(word.type)))])


def scale_mask(op: Operation, rewriter: Rewriter, constant_value: Callable[[Value], object]) -> None:
    """(x * float(mask)) * c -> x * (c if mask else 0.0): also of infinities and NaN, and of zero's sign, for c > 0."""
    scale, inner = constant_value(op.operands[1]), op.operands[0].defining_op
    if not isinstance(scale, float) or not 0 < scale < math.inf or inner is None or inner.name != "arith.mul" or len(op.operands[0].uses) != 1:
        return
    for x, flag in (inner.operands, reversed(inner.operands)):
        cast = flag.defining_op
        if cast is not None and cast.name == "arith.cast" and element_type(cast.operands[0].type).kind == "bool":
            b, dtype = rewriter.builder(op), element_type(op.result.type)
            factor = b.arith("select", cast.operands[0], b.constant(scale, dtype), b.constant(0.0, dtype))
            rewriter.replace(op, [b.arith("mul", x, factor)])
            return
