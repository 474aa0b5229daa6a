"""Sorting records by counting: functions of a module that other code calls, each made when it is first asked for.

A record is a key with the place that it came from, so that no two are equal: every way of sorting is then stable. Of types of up to 32 bits it is one
word, (key << 32) | place, of wider ones two, key and place. Keys are integers in signed order.

    sorted = sort(records, spare, n)        either of the two buffers

Short runs are sorted by counting how many records go before each one (n^2 / lanes comparisons and no branch); long ones by their digits of eight
bits, the lowest first. What lies between is for `network.py`; `record_order.py` chooses.
All digits are counted in one pass, and those that are the same everywhere (the upper ones of small numbers) are skipped.
Knuth, The Art of Computer Programming 3, 5.2 (comparison counting) and 5.2.5 (radix sorting).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from .intrinsics import call
from .values import I1, I8, I32, I64, PTR, sequence, shuffle, splat, stack_slot

__all__ = ["LANES", "Record", "counted_sort", "digit_sort", "function", "loop", "places_from"]

TOGETHER = 4
"""Records whose places are counted in one pass over the others."""
LANES = 4
"""Records that are compared at once, a vector of 256 bits (on other machines several or part of one)."""
DIGIT = 8
RADIX = 1 << DIGIT


@dataclass(frozen=True)
class Record:
    """`bits`: of the keys, 8, 16, 32 or 64."""

    bits: int

    @property
    def words(self) -> int:
        return 2 if self.bits > 32 else 1

    @property
    def bytes(self) -> int:
        return 8 * self.words

    def digit(self, b: ir.IRBuilder, key: ir.Value, n: int) -> ir.Value:
        """Digit n of a record's first word, 0 the lowest. The highest holds the sign, unless keys of fewer bits are never negative."""
        at = n * DIGIT + (32 if self.words == 1 else 0)
        value = b.and_(b.lshr(key, I64(at)), I64(RADIX - 1))
        signed = self.bits >= 32 and n == self.digits - 1
        return b.xor(value, I64(RADIX // 2)) if signed else value

    @property
    def digits(self) -> int:
        return self.bits // DIGIT

    def at(self, b: ir.IRBuilder, base: ir.Value, i: ir.Value, word: int = 0) -> ir.Value:
        """Where word `word` of record i is."""
        if self.words == 1:
            return b.gep(base, [i], source_etype=I64)
        return b.gep(base, [b.add(b.shl(i, I64(1)), I64(word))], source_etype=I64)

    def load(self, b: ir.IRBuilder, base: ir.Value, i: ir.Value) -> list[ir.Value]:
        return [b.load(self.at(b, base, i, w), typ=I64) for w in range(self.words)]

    def store(self, b: ir.IRBuilder, words: Sequence[ir.Value], base: ir.Value, i: ir.Value) -> None:
        for w, value in enumerate(words):
            b.store(value, self.at(b, base, i, w))

    def place(self, b: ir.IRBuilder, words: Sequence[ir.Value]) -> ir.Value:
        return words[1] if self.words == 2 else b.and_(words[0], I64(0xFFFFFFFF))


Body = Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]]


def loop(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, carried: Sequence[ir.Value], body: Body, name: str = "each") -> list[ir.Value]:
    """for (i = start; i < stop; i += step), with carried values; leaves the builder behind it. Gives `i` and the carried
    values of the last test."""
    before = b.block
    head, inside, after = (b.append_basic_block(f"{name}.{x}") for x in ("head", "body", "end"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start, before)
    phis = [b.phi(v.type) for v in carried]
    for phi, v in zip(phis, carried, strict=True):
        phi.add_incoming(v, before)
    b.cbranch(b.icmp_signed("<", i, stop), inside, after)
    b.position_at_end(inside)
    following = body(i, list(phis))
    i.add_incoming(b.add(i, I64(step), flags=("nsw",)), b.block)
    for phi, v in zip(phis, following, strict=True):
        phi.add_incoming(v, b.block)
    b.branch(head)
    b.position_at_end(after)
    return [i, *phis]


def function(module: ir.Module, name: str, result: ir.Type, operands: Sequence[ir.Type],
             emit: Callable[[ir.IRBuilder, Sequence[ir.Value]], ir.Value | None]) -> ir.Function:
    """The internal function `name`, whose body `emit` makes (giving what it returns) if it is not there yet."""
    found = module.globals.get(name)
    if found is not None:
        return found
    f = ir.Function(module, ir.FunctionType(result, list(operands)), name)
    f.linkage = "internal"
    for attribute in ("nounwind", "noinline"):
        f.attributes.add(attribute)
    b = ir.IRBuilder(f.append_basic_block("entry"))
    value = emit(b, f.args)
    if not b.block.is_terminated:
        b.ret_void() if value is None else b.ret(value)
    return f


def counted_sort(module: ir.Module, r: Record) -> ir.Function:
    """ptr counted(ptr records, ptr spare, i64 n): each record's place is the number of those before it. The result is in `spare`."""
    w = LANES
    vector = ir.VectorType(I64, w)

    def words_at(b: ir.IRBuilder, base: ir.Value, j: ir.Value) -> list[ir.Value]:
        """The words of records j to j + lanes, each word a vector."""
        if r.words == 1:
            return [b.load(r.at(b, base, j), typ=vector, align=8)]
        both = b.load(r.at(b, base, j), typ=ir.VectorType(I64, 2 * w), align=8)
        return [shuffle(b, both, range(k, 2 * w, 2)) for k in range(2)]

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        records, spare, n = args

        def pad(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            r.store(b, [I64((1 << 63) - 1)] * r.words, records, i)
            return []

        loop(b, n, b.add(n, I64(w)), 1, [], pad, "pad")

        def place(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            mine = [r.load(b, records, b.add(i, I64(k))) for k in range(TOGETHER)]
            splats = [[splat(b, x, w) for x in m] for m in mine]

            def compare(j: ir.Value, counts: list[ir.Value]) -> list[ir.Value]:
                theirs = words_at(b, records, j)
                made = []
                for count, m in zip(counts, splats, strict=True):
                    before = b.icmp_signed("<", theirs[0], m[0])
                    if r.words == 2:
                        before = b.or_(before, b.and_(b.icmp_signed("==", theirs[0], m[0]), b.icmp_signed("<", theirs[1], m[1])))
                    made.append(b.sub(count, b.sext(before, vector)))
                return made

            _, *counts = loop(b, I64(0), n, w, [ir.Constant(vector, [0] * w)] * TOGETHER, compare, "compare")
            for m, count in zip(mine, counts, strict=True):
                at = call(b, f"llvm.vector.reduce.add.v{w}i64", I64, [count])
                r.store(b, m, spare, at)  # those behind the end go behind the end
            return []

        loop(b, I64(0), n, TOGETHER, [], place, "place")
        return spare

    return function(module, f"sort.counted.{r.bits}", PTR, [PTR, PTR, I64], emit)


def digit_sort(module: ir.Module, r: Record) -> ir.Function:
    """ptr digits(ptr records, ptr spare, i64 n): gives the buffer where they are then; n < 2^31."""

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        records, spare, n = args
        counters = stack_slot(b, ir.ArrayType(I32, r.digits * RADIX), 64)
        call(b, "llvm.memset.p0.i64", ir.VoidType(), [counters, I8(0), I64(4 * r.digits * RADIX), I1(0)])

        def counter(digit: int, value: ir.Value) -> ir.Value:
            return b.gep(counters, [b.add(value, I64(digit * RADIX))], source_etype=I32)

        def count(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            key = b.load(r.at(b, records, i), typ=I64)
            for d in range(r.digits):
                at = counter(d, r.digit(b, key, d))
                b.store(b.add(b.load(at, typ=I32), I32(1)), at)
            return []

        loop(b, I64(0), n, 1, [], count, "count")
        source, target = records, spare
        for d in range(r.digits):
            sort, following = b.append_basic_block(f"digit{d}"), b.append_basic_block(f"digit{d}.end")
            first = b.load(counter(d, r.digit(b, b.load(source, typ=I64), d)), typ=I32)
            before = b.block
            b.cbranch(b.icmp_unsigned("==", b.zext(first, I64), n), following, sort)
            b.position_at_end(sort)

            def begin(i: ir.Value, carried: list[ir.Value], d: int = d) -> list[ir.Value]:
                at = counter(d, i)
                size = b.load(at, typ=I32)
                b.store(carried[0], at)
                return [b.add(carried[0], size)]

            loop(b, I64(0), I64(RADIX), 1, [I32(0)], begin, "begin")

            def scatter(i: ir.Value, _: list[ir.Value], d: int = d, source: ir.Value = source, target: ir.Value = target) -> list[ir.Value]:
                words = r.load(b, source, i)
                at = counter(d, r.digit(b, words[0], d))
                place = b.load(at, typ=I32)
                b.store(b.add(place, I32(1)), at)
                r.store(b, words, target, b.zext(place, I64))
                return []

            loop(b, I64(0), n, 1, [], scatter, "scatter")
            b.branch(following)
            last = b.block
            b.position_at_end(following)
            swapped = []
            for x, y in ((source, target), (target, source)):
                phi = b.phi(PTR)
                phi.add_incoming(x, before)
                phi.add_incoming(y, last)
                swapped.append(phi)
            source, target = swapped
        return source

    return function(module, f"sort.digits.{r.bits}", PTR, [PTR, PTR, I64], emit)


def places_from(b: ir.IRBuilder, first: ir.Value, width: int) -> ir.Value:
    """first, first + 1, ... as a chunk of i64."""
    return first if width == 1 else b.add(splat(b, first, width), sequence(I64, tuple(range(width))))
