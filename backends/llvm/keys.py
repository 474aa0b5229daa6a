"""Keys of elements that are sorted: floats as integers that order alike, -0 as 0 and every NaN as the largest, flipped to sort the other way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from ...ir.types import DType
from .lanes import splat as repeated
from .records import Record, loop, places_from
from .values import I32, I64, chunk_type, width_of

__all__ = ["WIDTH", "Keys"]

WIDTH = 8
"""Elements that are looked at together: a vector of 256 bits of most types; on other machines it is several or part of one."""


@dataclass(frozen=True)
class Keys:
    """How elements of `dtype` become keys. `largest`: the largest come first."""

    dtype: DType
    largest: bool

    @property
    def bits(self) -> int:
        return max(8, self.dtype.bits)

    @property
    def memory(self) -> ir.IntType:
        return ir.IntType(self.bits)

    @property
    def type(self) -> ir.IntType:
        """Of keys: 32 or 64 bits, in signed order."""
        return I64 if self.bits > 32 else I32

    @property
    def name(self) -> str:
        return f"{self.dtype.name}.{'largest' if self.largest else 'smallest'}"

    def record(self) -> Record:
        return Record(self.bits)

    def load(self, b: ir.IRBuilder, source: ir.Value, i: ir.Value, width: int) -> ir.Value:
        """The keys of elements i, i + 1, ..."""
        at = b.gep(source, [i], source_etype=self.memory)
        return self.of(b, b.load(at, typ=chunk_type(self.memory, width), align=self.bits // 8))

    def of(self, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
        """Elements as they are in memory -> keys."""
        bits, t = self.bits, x.type

        def number(value: int) -> ir.Value:
            return repeated(t, value - (1 << bits) if value >> (bits - 1) else value)

        sign = number(1 << (bits - 1))
        if self.dtype.is_float:
            mask = b.ashr(x, number(bits - 1))
            y = b.xor(x, b.lshr(mask, number(1)))
            magnitude = b.and_(x, number((1 << (bits - 1)) - 1))
            y = b.select(b.icmp_unsigned("==", x, sign), number(0), y)
            y = b.select(b.icmp_signed(">", magnitude, number(_infinity(self.dtype))), number((1 << (bits - 1)) - 1), y)
        else:
            y = x if self.dtype.is_signed else b.xor(x, sign)
        if self.largest:
            y = b.not_(y)
        if bits == self.type.width:
            return y
        return b.zext(b.xor(y, sign), chunk_type(self.type, width_of(x)))

    def words(self, b: ir.IRBuilder, key: ir.Value, place: ir.Value) -> list[ir.Value]:
        """The record of a key, or of a vector of keys: a vector of each word."""
        if self.bits > 32:
            return [key, place]
        high = b.shl(b.sext(key, chunk_type(I64, width_of(key))), repeated(chunk_type(I64, width_of(key)), 32))
        return [b.or_(high, place)]

    def all_records(self, b: ir.IRBuilder, source: ir.Value, n: ir.Value, records: ir.Value) -> None:
        """A record of each element, in order."""
        record = self.record()

        def some(width: int) -> Callable[[ir.Value, list[ir.Value]], list[ir.Value]]:
            def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                words = self.words(b, self.load(b, source, i, width), places_from(b, i, width))
                if width > 1 and record.words == 2:
                    lanes = [x for j in range(width) for x in (j, width + j)]
                    words = [b.shuffle_vector(*words, ir.Constant(ir.VectorType(I32, 2 * width), lanes))]
                if width > 1:
                    b.store(words[0], record.at(b, records, i), align=8)
                else:
                    record.store(b, words, records, i)
                return []
            return body

        done, = loop(b, I64(0), b.sub(n, I64(WIDTH - 1)), WIDTH, [], some(WIDTH), "records")
        loop(b, done, n, 1, [], some(1), "record")

    def key_of(self, b: ir.IRBuilder, words: Sequence[ir.Value]) -> ir.Value:
        return words[0] if self.bits > 32 else b.trunc(b.ashr(words[0], I64(32)), I32)


def _infinity(dtype: DType) -> int:
    """The bits of an infinity."""
    return {"f64": 0x7FF0000000000000, "f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[dtype.name]
