"""Floats of 8 bits, held as their bit patterns (i8), to float32 and back, in integer arithmetic.

float8_e4m3fn has 4 bits of exponent (bias 7) and no infinity; float8_e5m2 has 5 (bias 15) and is the upper byte of a float16. To float32 is
exact. From float32 rounds to nearest even; what is too large, infinity included, becomes 448 (e4m3fn) as in torch since 2.13, where 2.11 gives
NaN, or infinity (e5m2). Sources: the OFP8 specification (Open Compute Project, 2023); c10/util/Float8_e4m3fn.h and Float8_e5m2.h for what
torch does at the ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from .lanes import F32, I32, splat, with_element

__all__ = ["FORMATS", "Float8"]

I8 = ir.IntType(8)


@dataclass(frozen=True)
class Float8:
    """`mantissa` stored bits; exponents are biased by `bias`; magnitudes from the float32 pattern `limit` on become `beyond`."""

    mantissa: int
    bias: int
    limit: int
    beyond: int
    infinite: bool

    def to_f32(self, b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        """i8 patterns as float: exact, subnormal ones too where the processor takes those of float32 for zero."""
        wide = b.zext(value, with_element(value.type, I32))
        magnitude = b.and_(wide, splat(wide.type, 0x7F))
        single = with_element(value.type, F32)
        shifted = b.shl(magnitude, splat(wide.type, 23 - self.mantissa))
        normal = b.bitcast(b.add(shifted, splat(wide.type, (127 - self.bias) << 23)), single)
        below = b.icmp_unsigned("<", magnitude, splat(wide.type, 1 << self.mantissa))
        small = b.fmul(b.uitofp(magnitude, single), splat(single, 2.0 ** (1 - self.bias - self.mantissa)))
        bits = b.bitcast(b.select(below, small, normal), wide.type)
        if self.infinite:
            bits = b.select(b.icmp_unsigned("==", magnitude, splat(wide.type, self.beyond)), splat(wide.type, 0x7F800000), bits)
        bits = b.select(b.icmp_unsigned(">", magnitude, splat(wide.type, self.beyond)), splat(wide.type, 0x7FC00000), bits)
        sign = b.shl(b.and_(wide, splat(wide.type, 0x80)), splat(wide.type, 24))
        return b.bitcast(b.or_(bits, sign), single)

    def from_f32(self, b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        """float to i8 patterns, to nearest even. Subnormal results come from an addition whose last place is theirs."""
        whole = with_element(value.type, I32)
        all_bits = b.bitcast(value, whole)
        bits = b.and_(all_bits, splat(whole, 0x7FFFFFFF))
        drop = 23 - self.mantissa
        odd = b.and_(b.lshr(bits, splat(whole, drop)), splat(whole, 1))
        rounded = b.add(b.add(bits, odd), splat(whole, (1 << (drop - 1)) - 1 - ((127 - self.bias) << 23)))
        normal = b.lshr(rounded, splat(whole, drop))
        base = (127 - self.bias + drop + 1) << 23
        lifted = b.fadd(b.bitcast(bits, value.type), b.bitcast(splat(whole, base), value.type))
        small = b.sub(b.bitcast(lifted, whole), splat(whole, base))
        result = b.select(b.icmp_unsigned("<", bits, splat(whole, (128 - self.bias) << 23)), small, normal)
        result = b.select(b.icmp_unsigned(">=", bits, splat(whole, self.limit)), splat(whole, self.beyond), result)
        result = b.select(b.icmp_unsigned(">", bits, splat(whole, 0x7F800000)), splat(whole, 0x7F), result)
        sign = b.lshr(b.and_(all_bits, splat(whole, -0x80000000)), splat(whole, 24))
        return b.trunc(b.or_(result, sign), with_element(value.type, I8))


FORMATS = {
    "f8e4m3fn": Float8(3, 7, 0x43E80000, 0x7E, infinite=False),
    "f8e5m2": Float8(2, 15, 0x47800000, 0x7C, infinite=True),
}
