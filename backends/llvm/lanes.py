"""`Lanes`: one vocabulary for emitting float math on a scalar or on a vector of any width.

The functions in `vecmath*.py` are written once against this class.  It wraps an llvmlite `IRBuilder` together with the
shape of the values in hand (a scalar or `<N x float>`, single or double), so that Python numbers turn into splat
constants of the right type and intrinsics get the right overload.

Everything emitted is target-independent LLVM IR, except where `features` names an instruction set that has a
single instruction for a longer sequence (`avx512f`: `vscalefps`, `vfixupimmps`); results do not depend on it.  No fast-math flag
is set: NaN, infinities and signed zeros are part of the contract.  Fused multiply-add is assumed to be an instruction
(FMA3, AVX-512, NEON, SVE); on a target without it `llvm.fma` becomes a libm call: still right, but slow.

Methods that emit control flow (`patch_lanes`) leave the builder in a new block: a caller that builds loops must take
`builder.block` after the call for its phi nodes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from llvmlite import ir

Operand: TypeAlias = ir.Value | float | int

F32, F64 = ir.FloatType(), ir.DoubleType()
I1, I16, I32, I64 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)

_OVERLOAD = {"float": "f32", "double": "f64", "half": "f16"}


# Kinds of operands that `Lanes.fixup` tells apart, in the order of its table, and a response: the operand itself.
KINDS = ("quiet_nan", "signalling_nan", "zero", "one", "minus_inf", "plus_inf", "negative", "positive")
OPERAND = 1


def element_type(type_: ir.Type) -> ir.Type:
    """The type itself, or the element type of a vector."""
    return type_.element if isinstance(type_, ir.VectorType) else type_


def with_element(type_: ir.Type, element: ir.Type) -> ir.Type:
    """`type_` with its element type replaced: scalar stays scalar, `<N x T>` stays N wide."""
    return ir.VectorType(element, type_.count) if isinstance(type_, ir.VectorType) else element


def overload(type_: ir.Type) -> str:
    """The suffix that names `type_` in an overloaded intrinsic: f32, i64, v16f32, ..."""
    element = element_type(type_)
    name = f"i{element.width}" if isinstance(element, ir.IntType) else _OVERLOAD[str(element)]
    return f"v{type_.count}{name}" if isinstance(type_, ir.VectorType) else name


def splat(type_: ir.Type, value: float | int) -> ir.Constant:
    """The constant `value` in every lane of `type_`."""
    count = type_.count if isinstance(type_, ir.VectorType) else 0
    return _splat(element_type(type_), count, repr(value), isinstance(value, float))


@lru_cache(maxsize=4096)
def _splat(element: ir.Type, count: int, value: str, is_float: bool) -> ir.Constant:
    """Shared constants: making and printing one costs as much as ten instructions. repr() tells -0.0, NaN and 1.0 apart."""
    scalar = ir.Constant(element, float(value) if is_float else int(value))
    return ir.Constant(ir.VectorType(element, count), [scalar] * count) if count else scalar


def split_single(value: float) -> tuple[float, float]:
    """(hi, lo) with hi = `value` rounded to float32 and hi + lo = `value`."""
    hi: float = struct.unpack("f", struct.pack("f", value))[0]
    return hi, value - hi


def declare(builder: ir.IRBuilder, name: str, result: ir.Type, operands: Sequence[ir.Type]) -> ir.Function:
    """The function `name` of the builder's module, declared on first use."""
    module = builder.module
    existing = module.globals.get(name)
    if existing is None:
        existing = ir.Function(module, ir.FunctionType(result, list(operands)), name)
    return existing


class Lanes:
    """Emission of element-wise operations on values of one float shape.

    `type` is the shape: `float`, `double`, or a vector of them; `int` the integer type of the same width and count.
    Any operand of any method may be a Python number.
    """

    def __init__(self, builder: ir.IRBuilder, type_: ir.Type, features: frozenset[str] = frozenset()) -> None:
        if element_type(type_) not in (F32, F64):
            raise TypeError(f"vector math is defined on float and double lanes, not on {type_}")
        self.b = builder
        self.type = type_
        self.single = element_type(type_) == F32
        self.int = with_element(type_, I32 if self.single else I64)
        self.count: int | None = type_.count if isinstance(type_, ir.VectorType) else None
        self.features = features

    def double(self) -> Lanes:
        """The same lanes as float64."""
        return Lanes(self.b, with_element(self.type, F64), self.features)

    # -- constants ---------------------------------------------------------------------------------------------------

    def f(self, value: Operand) -> ir.Value:
        """A float value: numbers become splats."""
        return value if isinstance(value, ir.Value) else splat(self.type, float(value))

    def i(self, value: Operand) -> ir.Value:
        """An integer value of the lane width: numbers (taken modulo 2^width) become splats."""
        if isinstance(value, ir.Value):
            return value
        width = element_type(self.int).width
        return splat(self.int, (int(value) + (1 << (width - 1))) % (1 << width) - (1 << (width - 1)))

    # -- float arithmetic --------------------------------------------------------------------------------------------

    def add(self, x: Operand, y: Operand) -> ir.Value:
        return self.b.fadd(self.f(x), self.f(y))

    def sub(self, x: Operand, y: Operand) -> ir.Value:
        return self.b.fsub(self.f(x), self.f(y))

    def mul(self, x: Operand, y: Operand) -> ir.Value:
        return self.b.fmul(self.f(x), self.f(y))

    def div(self, x: Operand, y: Operand) -> ir.Value:
        return self.b.fdiv(self.f(x), self.f(y))

    def fma(self, x: Operand, y: Operand, z: Operand) -> ir.Value:
        """x * y + z, rounded once."""
        return self.intrinsic("fma", x, y, z)

    def neg(self, x: Operand) -> ir.Value:
        return self.b.fneg(self.f(x))

    def abs(self, x: Operand) -> ir.Value:
        return self.intrinsic("fabs", x)

    def sqrt(self, x: Operand) -> ir.Value:
        return self.intrinsic("sqrt", x)

    def copysign(self, magnitude: Operand, sign: Operand) -> ir.Value:
        return self.intrinsic("copysign", magnitude, sign)

    def horner(self, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """The polynomial with `coefficients` (lowest degree first) at x: len - 1 fused multiply-adds in a chain."""
        total = self.f(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            total = self.fma(total, x, c)
        return total

    def estrin(self, x: ir.Value, x2: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """The same polynomial with half the latency: two Horner chains in x2 = x * x, joined."""
        even, odd = coefficients[0::2], coefficients[1::2]
        return self.fma(self.horner(x2, odd), x, self.horner(x2, even))

    def min(self, x: Operand, limit: Operand) -> ir.Value:
        """`limit` where x > limit, else x; a NaN in x stays (one `minps`)."""
        x, limit = self.f(x), self.f(limit)
        return self.b.select(self.b.fcmp_ordered("<", limit, x), limit, x)

    def max(self, x: Operand, limit: Operand) -> ir.Value:
        """`limit` where x < limit, else x; a NaN in x stays (one `maxps`)."""
        x, limit = self.f(x), self.f(limit)
        return self.b.select(self.b.fcmp_ordered(">", limit, x), limit, x)

    # -- masks -------------------------------------------------------------------------------------------------------

    def cmp(self, relation: str, x: Operand, y: Operand) -> ir.Value:
        """Ordered comparison (false on NaN); `relation` is one of == != < <= > >=."""
        return self.b.fcmp_ordered(relation, self.f(x), self.f(y))

    def isnan(self, x: ir.Value) -> ir.Value:
        return self.b.fcmp_unordered("uno", x, x)

    def select(self, mask: ir.Value, x: Operand, y: Operand) -> ir.Value:
        return self.b.select(mask, self.f(x), self.f(y))

    def any(self, mask: ir.Value) -> ir.Value:
        """i1: whether any lane of `mask` is set."""
        if self.count is None:
            return mask
        packed = ir.IntType(self.count)
        return self.b.icmp_unsigned("!=", self.b.bitcast(mask, packed), ir.Constant(packed, 0))

    # -- bit patterns ------------------------------------------------------------------------------------------------

    def bits(self, x: Operand) -> ir.Value:
        """The float's bit pattern as an integer."""
        return self.b.bitcast(self.f(x), self.int)

    def from_bits(self, i: ir.Value) -> ir.Value:
        return self.b.bitcast(i, self.type)

    def iadd(self, x: Operand, y: Operand) -> ir.Value:
        return self.b.add(self.i(x), self.i(y))

    def isub(self, x: Operand, y: Operand) -> ir.Value:
        return self.b.sub(self.i(x), self.i(y))

    def iand(self, x: Operand, y: Operand) -> ir.Value:
        return self.b.and_(self.i(x), self.i(y))

    def ixor(self, x: Operand, y: Operand) -> ir.Value:
        return self.b.xor(self.i(x), self.i(y))

    def shl(self, x: Operand, count: int) -> ir.Value:
        return self.b.shl(self.i(x), self.i(count))

    def to_float(self, i: ir.Value) -> ir.Value:
        """Signed integer to float, by value."""
        return self.b.sitofp(i, self.type)

    def is_set(self, i: ir.Value, mask: int) -> ir.Value:
        """Whether any bit of `mask` is set in i."""
        return self.b.icmp_unsigned("!=", self.iand(i, mask), self.i(0))

    def signbit(self, x: ir.Value) -> ir.Value:
        return self.b.icmp_signed("<", self.bits(x), self.i(0))

    # -- calls -------------------------------------------------------------------------------------------------------

    def intrinsic(self, name: str, *operands: Operand) -> ir.Value:
        """`llvm.<name>` overloaded on this shape, all operands and the result of this type."""
        values = [self.f(x) for x in operands]
        callee = declare(self.b, f"llvm.{name}.{overload(self.type)}", self.type, [self.type] * len(values))
        return self.b.call(callee, values)

    def libm(self, name: str, *operands: Operand) -> ir.Value:
        """The C library's `name` (the caller adds the `f` of float32 names), lane by lane."""
        values = [self.f(x) for x in operands]
        element = element_type(self.type)
        callee = declare(self.b, name, element, [element] * len(values))
        if self.count is None:
            return self.b.call(callee, values)
        result: ir.Value = ir.Constant(self.type, ir.Undefined)
        for lane in range(self.count):
            index = I32(lane)
            result = self.b.insert_element(
                result, self.b.call(callee, [self.b.extract_element(v, index) for v in values]), index
            )
        return result

    def patch_lanes(self, mask: ir.Value, fast: ir.Value, name: str, *operands: ir.Value) -> ir.Value:
        """`fast`, but the C library's `name(operands)` in lanes where `mask` is set: a cold loop, entered if any is.

        A lane's value depends on its own operands only.  Leaves the builder in a new block.
        """
        b = self.b
        element = element_type(self.type)
        callee = declare(b, name, element, [element] * len(operands))
        entry, function = b.block, b.function
        cold, done = function.append_basic_block("cold"), function.append_basic_block("patched")
        branch = b.cbranch(self.any(mask), cold, done)
        branch.set_weights([1, 10000])
        b.position_at_end(cold)
        if self.count is None:
            slow = b.call(callee, operands)
            b.branch(done)
        else:
            lane = b.phi(I32)
            lane.add_incoming(I32(0), entry)
            partial = b.phi(self.type)
            partial.add_incoming(fast, entry)
            value = b.call(callee, [b.extract_element(x, lane) for x in operands])
            all_lanes = b.insert_element(partial, value, lane)
            following = b.add(lane, I32(1))
            lane.add_incoming(following, cold)
            partial.add_incoming(all_lanes, cold)
            finish = function.append_basic_block("cold.end")
            b.cbranch(b.icmp_unsigned("<", following, I32(self.count)), cold, finish)
            b.position_at_end(finish)
            slow = b.select(mask, all_lanes, fast)
            cold = finish
            b.branch(done)
        b.position_at_end(done)
        result = b.phi(self.type)
        result.add_incoming(fast, entry)
        result.add_incoming(slow, cold)
        return result

    def ldexp(self, x: ir.Value, n: ir.Value) -> ir.Value | None:
        """x * 2^n for integral float32 n, rounded once, by one instruction per register where the target has it.

        None where it does not: the caller then scales by integer arithmetic on its own representation of n.
        """
        if "avx512f" not in self.features or not self.single or self.count not in (16, 32, 64):
            return None
        part = ir.VectorType(F32, 16)
        callee = declare(
            self.b, "llvm.x86.avx512.mask.scalef.ps.512", part, [part, part, part, I16, I32]
        )

        def scale(px: ir.Value, pn: ir.Value) -> ir.Value:
            return self.b.call(callee, [px, pn, splat(part, 0.0), I16(-1), I32(4)])

        return self.in_parts(16, scale, x, n)

    def fixup_lanes(self) -> int:
        """Of one instruction of `fixup`; 0 where the target has none for this shape."""
        bits, count = 32 if self.single else 64, self.count or 1
        lanes = min(count, 512 // bits)
        needed = {"avx512f"} if lanes * bits == 512 else {"avx512f", "avx512vl"}
        return lanes if needed <= self.features and lanes * bits >= 128 and not count & (count - 1) else 0

    def fixup(self, x: ir.Value, result: ir.Value, **responses: int) -> ir.Value:
        """`result` with the lanes replaced where x is of a kind (of KINDS) that `responses` names, by one instruction per register (`vfixupimm`).

        Selections need a comparison and a blend for each kind, and wait for a mask on its way from one to the other (the maximum of a row in the
        cache takes 2.0 ns per 64 elements on a Zen 4, 1.5 by this). Needs `fixup_lanes`.
        """
        lanes, suffix = self.fixup_lanes(), "ps" if self.single else "pd"
        part, integer = ir.VectorType(element_type(self.type), lanes), ir.VectorType(element_type(self.int), lanes)
        table = splat(integer, sum(how << 4 * KINDS.index(kind) for kind, how in responses.items()))
        mask = ir.IntType(max(8, lanes))
        bits = lanes * element_type(self.int).width
        rounding = [I32(4)] if bits == 512 else []
        callee = declare(
            self.b, f"llvm.x86.avx512.mask.fixupimm.{suffix}.{bits}", part,
            [part, part, integer, I32, mask, *[I32 for _ in rounding]],
        )  # fmt: skip

        def fix(px: ir.Value, py: ir.Value) -> ir.Value:
            return self.b.call(callee, [py, px, table, I32(0), mask(-1), *rounding])

        return self.in_parts(lanes, fix, x, result)

    def in_parts(self, width: int, emit: Callable[..., ir.Value], *operands: ir.Value) -> ir.Value:
        """`emit` on consecutive slices of `width` lanes (a power-of-two fraction of the lanes), joined again."""
        count: Any = self.count
        if count == width:
            return emit(*operands)
        index = ir.VectorType(I32, width)

        def part(x: ir.Value, start: int) -> ir.Value:
            return self.b.shuffle_vector(
                x, ir.Constant(x.type, ir.Undefined), ir.Constant(index, list(range(start, start + width)))
            )

        parts = [emit(*[part(x, start) for x in operands]) for start in range(0, count, width)]
        while len(parts) > 1:
            size = parts[0].type.count * 2
            order = ir.Constant(ir.VectorType(I32, size), list(range(size)))
            parts = [self.b.shuffle_vector(x, y, order) for x, y in zip(parts[::2], parts[1::2])]
        return parts[0]
