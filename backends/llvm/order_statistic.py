"""The element of a given rank in a row's stable sorted order, by brackets: `place = statistic(source, n, rank, records, spare)`.

    lo, hi = two keys between which the element is likely to lie
    less, upto = how many keys are below lo, and how many at most hi        a pass over the row
    if less <= rank < upto, and not most of the row:
        records of the keys from lo to hi, sorted                           another pass; few enter
        the one of rank - less

The first bracket is for rows that are almost in order, either way: the keys some places before and behind where the element would be if they were, of
each the middle one of three. The second one comes from a sorted sample of the row, three deviations of its rank wide. If neither holds, all of the
row is sorted. Of equal bounds nothing is: records are made in the order of places.
Floyd and Rivest, Expected Time Bounds for Selection, CACM 18 (1975), from whom the sample is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from .intrinsics import call
from .keys import Keys
from .record_order import record_first, record_sort
from .records import function, loop
from .values import I64, PTR, chunk_type, splat, stack_slot

__all__ = ["SLACK", "order_statistic"]

WIDTH, COPIES = 8, 2
"""Elements of a vector, and vectors that are counted side by side."""
SHORTEST = 16
"""Rows shorter than this are sorted at once."""
NEAR = 64
"""The first bracket holds two of so many parts of a row that is in order."""
SAMPLED, LONG = 256, 4096
"""Elements from which a sample is worth sorting, and from which it is the larger one."""
SAMPLES = (64, 256)
SLACK = 320
"""Records of room more than the row has elements: for what sorting writes behind the end."""


def order_statistic(module: ir.Module, keys: Keys, nan_first: bool) -> ir.Function:
    """i64 statistic(ptr source, i64 n, i64 rank, ptr records, ptr spare), 0 <= rank < n; both buffers have room for n + SLACK records.

    `nan_first`: of a row with a NaN its first one, whatever the rank.
    """
    record, smallest, largest = keys.record(), _end(keys, -1), _end(keys, 1)
    first, count, collect = record_first(module, record), _count(module, keys), _collect(module, keys)

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        source, n, rank, records, spare = args
        counts = stack_slot(b, ir.ArrayType(I64, 2))
        low, high = stack_slot(b, keys.type), stack_slot(b, keys.type)
        settle, whole, near, sampled = (b.append_basic_block(x) for x in ("settle", "whole", "near", "sampled"))

        def counted(i: int) -> ir.Value:
            return b.load(b.gep(counts, [I64(i)], source_etype=I64), typ=I64)

        def unless_nan(greatest: ir.Value) -> None:
            nan, following = b.append_basic_block("nan"), b.append_basic_block("numbers")
            b.cbranch(b.icmp_signed("==", greatest, _nan(keys)), nan, following)
            b.position_at_end(nan)
            b.call(collect, [source, n, _nan(keys), _nan(keys), records])
            b.ret(record.place(b, record.load(b, records, I64(0))))
            b.position_at_end(following)

        def attempt(lo: ir.Value, hi: ir.Value, most: ir.Value, failed: ir.Block) -> None:
            b.store(lo, low)
            b.store(hi, high)
            greatest = b.call(count, [source, n, lo, hi, counts])
            if nan_first:
                unless_nan(greatest)
            less, upto = counted(0), counted(1)
            inside = b.and_(b.icmp_signed("<=", less, rank), b.icmp_signed("<", rank, upto))
            few = b.or_(b.icmp_signed("==", lo, hi), b.icmp_signed("<=", b.sub(upto, less), most))
            b.cbranch(b.and_(inside, few), settle, failed)

        b.cbranch(b.icmp_signed("<", n, I64(SHORTEST)), whole, near)
        b.position_at_end(near)
        distance = b.add(b.sdiv(n, I64(NEAR)), I64(2))
        before, behind = b.sub(rank, distance), b.add(rank, distance)
        ends = [b.select(beyond, end, _middle(b, keys, source, n, at)) for beyond, end, at in (
            (b.icmp_signed("<", before, I64(0)), smallest, before), (b.icmp_signed(">=", behind, n), largest, behind))]
        lo, hi = _ordered(b, *ends)
        again = b.append_basic_block("again")
        attempt(lo, hi, b.add(b.sdiv(n, I64(4)), I64(SHORTEST)), again)

        b.position_at_end(again)
        b.cbranch(b.icmp_signed("<", n, I64(SAMPLED)), whole, sampled)
        b.position_at_end(sampled)
        lo, hi = _sample(b, keys, *args)
        attempt(lo, hi, b.sub(n, b.sdiv(n, I64(4))), whole)

        b.position_at_end(whole)
        if nan_first:
            unless_nan(b.call(count, [source, n, smallest, smallest, counts]))
        keys.all_records(b, source, n, records)
        made = b.call(first, [records, spare, n, b.add(rank, I64(1))])
        b.ret(record.place(b, record.load(b, made, rank)))

        b.position_at_end(settle)
        lo, hi, among = b.load(low, typ=keys.type), b.load(high, typ=keys.type), b.sub(rank, counted(0))
        found = b.call(collect, [source, n, lo, hi, records])
        equal, different = b.append_basic_block("equal"), b.append_basic_block("different")
        b.cbranch(b.icmp_signed("==", lo, hi), equal, different)
        b.position_at_end(equal)
        b.ret(record.place(b, record.load(b, records, among)))
        b.position_at_end(different)
        made = b.call(first, [records, spare, found, b.add(among, I64(1))])
        b.ret(record.place(b, record.load(b, made, among)))

    name = f"sort.statistic.{keys.name}{'.nan' if nan_first else ''}"
    return function(module, name, I64, [PTR, I64, I64, PTR, PTR], emit)


def _end(keys: Keys, sign: int) -> ir.Constant:
    """The smallest (-1) or largest (1) number of the keys' type."""
    half = 1 << (keys.type.width - 1)
    return ir.Constant(keys.type, -half if sign < 0 else half - 1)


def _nan(keys: Keys) -> ir.Constant:
    """The key of every NaN, where the smallest come first."""
    return _end(keys, 1) if keys.bits == keys.type.width else ir.Constant(keys.type, (1 << keys.bits) - 1)


def _ordered(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    swapped = b.icmp_signed("<", y, x)
    return b.select(swapped, y, x), b.select(swapped, x, y)


def _middle(b: ir.IRBuilder, keys: Keys, source: ir.Value, n: ir.Value, at: ir.Value) -> ir.Value:
    """The middle one of the keys at, before and behind a place that may be outside of the row."""
    last = b.sub(n, I64(1))
    three = []
    for step in (-1, 0, 1):
        place = b.add(at, I64(step))
        place = b.select(b.icmp_signed("<", place, I64(0)), I64(0), b.select(b.icmp_signed(">", place, last), last, place))
        three.append(keys.load(b, source, place, 1))
    x, y = _ordered(b, *three[:2])
    _, z = _ordered(b, x, three[2])
    return _ordered(b, y, z)[0]


def _sample(b: ir.IRBuilder, keys: Keys, source: ir.Value, n: ir.Value, rank: ir.Value, records: ir.Value,
            spare: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The keys in a sorted sample three deviations, and two, before and behind where the element is expected."""
    record, double = keys.record(), ir.DoubleType()
    size = b.select(b.icmp_signed("<", n, I64(LONG)), I64(SAMPLES[0]), I64(SAMPLES[1]))
    stride = b.sdiv(n, size)

    def take(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        record.store(b, keys.words(b, keys.load(b, source, b.mul(i, stride), 1), i), records, i)
        return []

    loop(b, I64(0), size, 1, [], take, "take")
    made = b.call(record_sort(b.module, record), [records, spare, size])
    share = b.fdiv(b.sitofp(rank, double), b.sitofp(n, double))
    expected = b.fmul(share, b.sitofp(size, double))
    spread = b.fmul(call(b, "llvm.sqrt.f64", double, [b.fmul(expected, b.fsub(double(1), share))]), double(3))
    ends = []
    for beyond, sign in ((_end(keys, -1), -1), (_end(keys, 1), 1)):
        at = b.fptosi(b.fadd(expected, spread) if sign > 0 else b.fsub(expected, spread), I64)
        at = b.add(at, I64(2 * sign))
        outside = b.or_(b.icmp_signed("<", at, I64(0)), b.icmp_signed(">=", at, size))
        key = keys.key_of(b, record.load(b, made, b.select(outside, I64(0), at)))
        ends.append(b.select(outside, beyond, key))
    return ends[0], ends[1]


def _count(module: ir.Module, keys: Keys) -> ir.Function:
    """key count(ptr source, i64 n, key lo, key hi, ptr counts): how many keys are below lo and how many at most hi; gives the largest."""

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        source, n, lo, hi, counts = args

        def some(width: int, copies: int) -> Callable[[ir.Value, list[ir.Value]], list[ir.Value]]:
            t = chunk_type(keys.type, width)

            def body(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                made = []
                for c in range(copies):
                    less, upto, most = carried[3 * c:3 * c + 3]
                    key = keys.load(b, source, b.add(i, I64(c * width)), width)
                    made.append(b.sub(less, b.sext(b.icmp_signed("<", key, splat(b, lo, width)), t)))
                    made.append(b.sub(upto, b.sext(b.icmp_signed("<=", key, splat(b, hi, width)), t)))
                    made.append(b.select(b.icmp_signed(">", key, most), key, most))
                return made
            return body

        zero = ir.Constant(keys.type, 0)
        start = [splat(b, x, WIDTH) for x in (zero, zero, _end(keys, -1))] * COPIES
        step = WIDTH * COPIES
        done, *vectors = loop(b, I64(0), b.sub(n, I64(step - 1)), step, start, some(WIDTH, COPIES), "count")
        kinds = ("add", "add", "smax")
        held = []
        for j, kind in enumerate(kinds):
            total: ir.Value = vectors[j]
            for other in vectors[j + 3::3]:
                total = b.add(total, other) if kind == "add" else b.select(b.icmp_signed(">", total, other), total, other)
            held.append(call(b, f"llvm.vector.reduce.{kind}.v{WIDTH}i{keys.type.width}", keys.type, [total]))
        _, less, upto, most = loop(b, done, n, 1, held, some(1, 1), "rest")
        for j, x in enumerate((less, upto)):
            b.store(x if keys.type == I64 else b.sext(x, I64), b.gep(counts, [I64(j)], source_etype=I64))
        return most

    return function(module, f"sort.count.{keys.name}", keys.type, [PTR, I64, keys.type, keys.type, PTR], emit)


def _collect(module: ir.Module, keys: Keys) -> ir.Function:
    """i64 collect(ptr source, i64 n, key lo, key hi, ptr records): a record of each key from lo to hi, in order of places; gives their number."""
    record = keys.record()

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        source, n, lo, hi, records = args
        slot = stack_slot(b, chunk_type(keys.type, WIDTH), 64)

        def some(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            key = keys.load(b, source, i, WIDTH)
            within = b.and_(b.icmp_signed(">=", key, splat(b, lo, WIDTH)), b.icmp_signed("<=", key, splat(b, hi, WIDTH)))
            bits = b.zext(b.bitcast(within, ir.IntType(WIDTH)), I64)
            before = b.block
            fill, head, lane, after = (b.append_basic_block(f"lane.{x}") for x in ("fill", "head", "body", "end"))
            b.cbranch(b.icmp_unsigned("!=", bits, I64(0)), fill, after)
            b.position_at_end(fill)
            b.store(key, slot)
            b.branch(head)
            b.position_at_end(head)
            left, at = b.phi(I64), b.phi(I64)
            left.add_incoming(bits, fill)
            at.add_incoming(carried[0], fill)
            b.cbranch(b.icmp_unsigned("!=", left, I64(0)), lane, after)
            b.position_at_end(lane)
            j = call(b, "llvm.cttz.i64", I64, [left, ir.IntType(1)(1)])
            one = b.load(b.gep(slot, [j], source_etype=keys.type), typ=keys.type)
            record.store(b, keys.words(b, one, b.add(i, j)), records, at)
            left.add_incoming(b.and_(left, b.sub(left, I64(1))), lane)
            at.add_incoming(b.add(at, I64(1)), lane)
            b.branch(head)
            b.position_at_end(after)
            count = b.phi(I64)
            count.add_incoming(carried[0], before)
            count.add_incoming(at, head)
            return [count]

        def one(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            key = keys.load(b, source, i, 1)
            record.store(b, keys.words(b, key, i), records, carried[0])
            within = b.and_(b.icmp_signed(">=", key, lo), b.icmp_signed("<=", key, hi))
            return [b.add(carried[0], b.zext(within, I64))]

        done, found = loop(b, I64(0), b.sub(n, I64(WIDTH - 1)), WIDTH, [I64(0)], some, "collect")
        _, found = loop(b, done, n, 1, [found], one, "rest")
        return found

    return function(module, f"sort.collect.{keys.name}", I64, [PTR, I64, keys.type, keys.type, PTR], emit)
