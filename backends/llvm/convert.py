"""Element types of the LLVM backend: how each dtype lives in registers and in memory, and casts between them.

A dtype is named as in the aicc IR (`f32`, `bf16`, `i1`, ...).  In registers bf16 is its i16 bit pattern, f16 is LLVM's
`half`, unsigned integers are LLVM integers read as unsigned, `i1` is an LLVM i1 and `index` an i64; in memory an `i1`
takes a byte, 0 or 1.
All functions take a scalar or a vector of any width and return the same shape.

`emit_cast` follows eager torch on x86-64: float to integer truncates, and a value that does not fit gives what the
hardware gives, the most negative integer (narrow integers are the low bits of a wider result); LLVM's `fptosi` would be
poison there.  float64 rounds to f16 and bf16 by way of float32, integers do as well.  Any NaN becomes the bf16 NaN 0x7fc0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from .float8 import FORMATS
from .lanes import F32, F64, I1, I16, I32, I64, declare, element_type, overload, splat, with_element

I8 = ir.IntType(8)
F16 = ir.HalfType()


@dataclass(frozen=True)
class Representation:
    """How a dtype is held: its register and memory element types, and the kind that decides how it converts."""

    register: ir.Type
    memory: ir.Type
    kind: str  # float, bf16, signed, unsigned, bool, or the name of a float of 8 bits


REPRESENTATIONS: dict[str, Representation] = {
    "f64": Representation(F64, F64, "float"),
    "f32": Representation(F32, F32, "float"),
    "f16": Representation(F16, F16, "float"),
    "bf16": Representation(I16, I16, "bf16"),
    **{name: Representation(I8, I8, name) for name in FORMATS},
    "i64": Representation(I64, I64, "signed"),
    "i32": Representation(I32, I32, "signed"),
    "i16": Representation(I16, I16, "signed"),
    "i8": Representation(I8, I8, "signed"),
    "u8": Representation(I8, I8, "unsigned"),
    "u16": Representation(I16, I16, "unsigned"),
    "u32": Representation(I32, I32, "unsigned"),
    "u64": Representation(I64, I64, "unsigned"),
    "i1": Representation(I1, I8, "bool"),
    "index": Representation(I64, I64, "signed"),
}


def from_memory(b: ir.IRBuilder, value: ir.Value, name: str) -> ir.Value:
    """The register form of `value` as loaded from memory: an i1's byte becomes a bit, all else stays."""
    if REPRESENTATIONS[name].kind != "bool":
        return value
    return b.icmp_unsigned("!=", value, splat(value.type, 0))


def to_memory(b: ir.IRBuilder, value: ir.Value, name: str) -> ir.Value:
    """The form of `value` that is stored: an i1 becomes a byte, all else stays."""
    if REPRESENTATIONS[name].kind != "bool":
        return value
    return b.zext(value, with_element(value.type, I8))


def emit_cast(b: ir.IRBuilder, value: ir.Value, from_name: str, to_name: str) -> ir.Value:
    """`value` of dtype `from_name` (register form) as dtype `to_name` (register form), same shape.

    Raises KeyError on an unknown dtype and TypeError if the value is not held as `from_name` is.
    """
    source, target = REPRESENTATIONS[from_name], REPRESENTATIONS[to_name]
    if element_type(value.type) != source.register:
        raise TypeError(f"{from_name} is held as {source.register}, not as {value.type}")
    if from_name == to_name:
        return value
    return _CASTS[source.kind, target.kind](b, value, target)


# -- casts by kind ---------------------------------------------------------------------------------------------------


def bf16_to_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """i16 bf16 patterns to float: exact."""
    wide = b.zext(value, with_element(value.type, I32))
    return b.bitcast(b.shl(wide, splat(wide.type, 16)), with_element(value.type, F32))


def f32_to_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float to i16 bf16 patterns, to nearest even: add half an ulp, less one unless the kept part is odd, and cut."""
    bits = b.bitcast(value, with_element(value.type, I32))
    odd = b.and_(b.lshr(bits, splat(bits.type, 16)), splat(bits.type, 1))
    rounded = b.lshr(b.add(b.add(bits, odd), splat(bits.type, 0x7FFF)), splat(bits.type, 16))
    nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.select(nan, splat(bits.type, 0x7FC0), rounded), with_element(value.type, I16))


def _float_to_float(b: ir.IRBuilder, value: ir.Value, target: Representation) -> ir.Value:
    goal = with_element(value.type, target.register)
    if target.register == F16:
        return b.fptrunc(_as_f32(b, value), goal)
    if element_type(value.type) == F64:
        return b.fptrunc(value, goal)
    return b.fpext(value, goal)


def _as_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """half, float or double as float."""
    goal = with_element(value.type, F32)
    if value.type == goal:
        return value
    return b.fptrunc(value, goal) if element_type(value.type) == F64 else b.fpext(value, goal)


def _float_to_bf16(b: ir.IRBuilder, value: ir.Value, target: Representation) -> ir.Value:
    return f32_to_bf16(b, _as_f32(b, value))


def _float_to_integer(b: ir.IRBuilder, value: ir.Value, target: Representation) -> ir.Value:
    """Truncation through i32, or i64 where the result, or the low bits of a large float64, need it."""
    if element_type(value.type) == F16:
        value = _as_f32(b, value)
    unsigned = target.kind == "unsigned"
    if unsigned and target.register == I64:
        # The upper half of u64's range is moved down by 2^63 and back.
        high = b.fcmp_ordered(">=", value, splat(value.type, 2.0**63))
        moved = b.select(high, b.fsub(value, splat(value.type, 2.0**63)), value)
        low = _truncate(b, moved, with_element(value.type, I64))
        return b.select(high, b.xor(low, splat(low.type, -(1 << 63))), low)
    wide = target.register == I64 or (unsigned and (target.register == I32 or element_type(value.type) == F64))
    whole = _truncate(b, value, with_element(value.type, I64 if wide else I32))
    goal = with_element(value.type, target.register)
    return whole if goal == whole.type else b.trunc(whole, goal)


def _truncate(b: ir.IRBuilder, value: ir.Value, integer: ir.Type) -> ir.Value:
    """float or double to i32 or i64; the most negative integer for NaN and for what does not fit."""
    limit = 2.0 ** (element_type(integer).width - 1)
    magnitude = declare(b, f"llvm.fabs.{overload(value.type)}", value.type, [value.type])
    fits = b.fcmp_ordered("<", b.call(magnitude, [value]), splat(value.type, limit))
    whole = b.fptosi(b.select(fits, value, splat(value.type, 0.0)), integer)
    return b.select(fits, whole, splat(integer, -int(limit)))


def _float_to_bool(b: ir.IRBuilder, value: ir.Value, target: Representation) -> ir.Value:
    """NaN is true."""
    return b.fcmp_unordered("!=", value, splat(value.type, 0.0))


def _integer_to_float(
    signed: bool,
) -> Callable[[ir.IRBuilder, ir.Value, Representation], ir.Value]:
    def cast(b: ir.IRBuilder, value: ir.Value, target: Representation) -> ir.Value:
        convert = b.sitofp if signed else b.uitofp
        if target.register == F64:
            return convert(value, with_element(value.type, F64))
        single = convert(value, with_element(value.type, F32))
        return _float_to_float(b, single, target) if target.register == F16 else single

    return cast


def _integer_to_integer(
    signed: bool,
) -> Callable[[ir.IRBuilder, ir.Value, Representation], ir.Value]:
    def cast(b: ir.IRBuilder, value: ir.Value, target: Representation) -> ir.Value:
        goal = with_element(value.type, target.register)
        have, want = element_type(value.type).width, target.register.width
        if have == want:
            return value
        if have > want:
            return b.trunc(value, goal)
        return b.sext(value, goal) if signed else b.zext(value, goal)

    return cast


def _integer_to_bool(b: ir.IRBuilder, value: ir.Value, target: Representation) -> ir.Value:
    return b.icmp_unsigned("!=", value, splat(value.type, 0))


def _integer_to_bf16(signed: bool) -> Callable[[ir.IRBuilder, ir.Value, Representation], ir.Value]:
    convert = _integer_to_float(signed)
    return lambda b, value, target: f32_to_bf16(b, convert(b, value, REPRESENTATIONS["f32"]))


def _bf16_through_f32(
    cast: Callable[[ir.IRBuilder, ir.Value, Representation], ir.Value],
) -> Callable[[ir.IRBuilder, ir.Value, Representation], ir.Value]:
    return lambda b, value, target: cast(b, bf16_to_f32(b, value), target)


def _f32_to_float(b: ir.IRBuilder, value: ir.Value, target: Representation) -> ir.Value:
    return value if target.register == F32 else _float_to_float(b, value, target)


_CASTS: dict[tuple[str, str], Callable[[ir.IRBuilder, ir.Value, Representation], ir.Value]] = {
    ("float", "float"): _float_to_float,
    ("float", "bf16"): _float_to_bf16,
    ("float", "signed"): _float_to_integer,
    ("float", "unsigned"): _float_to_integer,
    ("float", "bool"): _float_to_bool,
    ("bf16", "float"): _bf16_through_f32(_f32_to_float),
    ("bf16", "signed"): _bf16_through_f32(_float_to_integer),
    ("bf16", "unsigned"): _bf16_through_f32(_float_to_integer),
    ("bf16", "bool"): _bf16_through_f32(_float_to_bool),
    ("signed", "float"): _integer_to_float(True),
    ("signed", "bf16"): _integer_to_bf16(True),
    ("signed", "signed"): _integer_to_integer(True),
    ("signed", "unsigned"): _integer_to_integer(True),
    ("signed", "bool"): _integer_to_bool,
    ("unsigned", "float"): _integer_to_float(False),
    ("unsigned", "bf16"): _integer_to_bf16(False),
    ("unsigned", "signed"): _integer_to_integer(False),
    ("unsigned", "unsigned"): _integer_to_integer(False),
    ("unsigned", "bool"): _integer_to_bool,
    ("bool", "float"): _integer_to_float(False),
    ("bool", "bf16"): _integer_to_bf16(False),
    ("bool", "signed"): _integer_to_integer(False),
    ("bool", "unsigned"): _integer_to_integer(False),
}


def _of_8_bits(name: str) -> dict[tuple[str, str], Callable[[ir.IRBuilder, ir.Value, Representation], ir.Value]]:
    """Casts from and to a float of 8 bits: all by way of float32."""
    f8, single = FORMATS[name], REPRESENTATIONS["f32"]

    def into(kind: str) -> Callable[[ir.IRBuilder, ir.Value, Representation], ir.Value]:
        if kind == "float":
            return lambda b, value, target: f8.from_f32(b, _as_f32(b, value))
        return lambda b, value, target: f8.from_f32(b, _CASTS[kind, "float"](b, value, single))

    def out_of(kind: str) -> Callable[[ir.IRBuilder, ir.Value, Representation], ir.Value]:
        convert = _f32_to_float if kind == "float" else _CASTS["float", kind]
        return lambda b, value, target: convert(b, f8.to_f32(b, value), target)

    kinds = {source for source, _ in _CASTS if source not in FORMATS}
    return {**{(kind, name): into(kind) for kind in kinds}, **{(name, kind): out_of(kind) for kind in kinds}}


_CASTS |= {**_of_8_bits("f8e4m3fn"), **_of_8_bits("f8e5m2")}
