"""f16 conversions for x86 processors without F16C.

There LLVM calls `__extendhfsf2` and `__truncsfhf2` of compiler-rt, which a Python process does not have. A module that uses
f16 gets its own definitions of them, in integer arithmetic.
"""

from __future__ import annotations

from llvmlite import ir

from ...ir.target import Target

__all__ = ["add_half_conversions"]

I16, I32, F16, F32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


def add_half_conversions(module: ir.Module, target: Target) -> None:
    """Defines the conversion functions if the target needs them and the module uses f16."""
    uses_half = any("half" in str(f) for f in module.functions) if _lacks_f16c(target) else False
    if uses_half:
        _extend(module)
        _truncate(module)


def _lacks_f16c(target: Target) -> bool:
    return target.triple.startswith("x86_64") and not {"f16c", "avx512f"} & set(target.features)


def _function(module: ir.Module, name: str, result: ir.Type, operand: ir.Type) -> tuple[ir.IRBuilder, ir.Value]:
    f = ir.Function(module, ir.FunctionType(result, [operand]), name)
    f.linkage = "weak"  # kept although nothing refers to it before instruction selection
    f.attributes.add("nounwind")
    return ir.IRBuilder(f.append_basic_block("entry")), f.args[0]


def _extend(module: ir.Module) -> None:
    """(bits << 13) read as f32 is the value times 2^-112, subnormals included; infinities and NaN get a full exponent."""
    b, x = _function(module, "__extendhfsf2", F32, F16)
    bits = b.zext(b.bitcast(x, I16), I32)
    magnitude = b.and_(bits, I32(0x7FFF))
    shifted = b.shl(magnitude, I32(13))
    finite = b.bitcast(b.fmul(b.bitcast(shifted, F32), ir.Constant(F32, 2.0**112)), I32)
    special = b.or_(shifted, I32(0x7F800000))
    value = b.select(b.icmp_unsigned(">=", magnitude, I32(0x7C00)), special, finite)
    b.ret(b.bitcast(b.or_(value, b.shl(b.and_(bits, I32(0x8000)), I32(16))), F32))


def _truncate(module: ir.Module) -> None:
    """Round to nearest even: by an integer carry for normal results, by adding 1/2 for subnormal ones."""
    b, x = _function(module, "__truncsfhf2", F16, F32)
    bits = b.bitcast(x, I32)
    sign = b.and_(b.lshr(bits, I32(16)), I32(0x8000))
    a = b.and_(bits, I32(0x7FFFFFFF))
    odd = b.and_(b.lshr(a, I32(13)), I32(1))
    normal = b.lshr(b.add(b.add(a, I32(0xC8000FFF - (1 << 32))), odd), I32(13))
    half = ir.Constant(F32, 0.5)
    subnormal = b.sub(b.bitcast(b.fadd(b.bitcast(a, F32), half), I32), I32(0x3F000000))
    value = b.select(b.icmp_unsigned("<", a, I32(0x38800000)), subnormal, normal)
    value = b.select(b.icmp_unsigned(">=", a, I32(0x47800000)), I32(0x7C00), value)
    value = b.select(b.icmp_unsigned(">", a, I32(0x7F800000)), I32(0x7E00), value)
    b.ret(b.bitcast(b.trunc(b.or_(value, sign), I16), F16))
