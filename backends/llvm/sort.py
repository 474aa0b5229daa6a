"""`tile.sort`: the first elements of a row in sorted order, values and places.

    order(source, n, records)              a record of every element, sorted (`records.py`)
    select(source, n, keep, records)       records of the first `keep`, sorted; rows of which few are wanted
    statistic(source, n, rank, records)    the place of one element in that order (`order_statistic.py`)

`select` reads the row once, against a bound that starts as an element of a sorted sample, chosen so that a few more than `keep` are likely to be
within it. What is within enters a buffer; a full buffer is sorted, its first `keep` stay and the last of them is the new bound. If the sample led
to fewer than `keep`, the row is read again without a bound, so only time depends on luck.

A row that is in order already, or the other way round, is seen by comparing neighbours (`in_order.py`). Values are taken from the row by their
places, so that they keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llvmlite import ir

from ...ir.core import Operation
from ...ir.types import element_type
from .in_order import in_order
from .intrinsics import call
from .keys import WIDTH, Keys
from .order_statistic import order_statistic
from .record_order import record_first, record_sort
from .records import function, loop
from .values import I64, PTR, chunk_type, memory_type, splat, stack_slot, width_of

if TYPE_CHECKING:
    from .kernel import KernelEmitter

__all__ = ["sort_rows"]

SAMPLES = (64, 256)
"""Elements of a sample: usually, and of long rows of which the first would expect more than a few elements that are kept."""
FEW = 4
SAMPLED = 256
"""Rows shorter than this are read without a sample's bound."""
BUFFER = 4
"""Records of the selection's buffer, in multiples of what is kept."""
SHORTEST, SHORT = 128, 512
"""Rows of up to so many elements are sorted whole instead, up to the second number if the buffer would hold all of them and
a network sorts them: a sample costs more."""
LONGEST = (1 << 31) - 1
"""Elements of a row: places and counters have 32 bits. Longer ones of constant size are left to the library; others make the call fail."""
SLACK = 320
"""Records of room more in each buffer: for a sample, and for what enters before the buffer is found full."""


def sort_rows(k: KernelEmitter, op: Operation) -> None:
    """Emits the op: operands are the row's buffer, the buffers of results, then index scalars."""
    b, scalars = k.b, k.scalars
    outs = int(op["values"]) + int(op["places"])
    source, *buffers = (k.env[v] for v in op.operands[:1 + outs])
    start, n, keep, *layout = (k.instantiate(k.resolver.of(v)) for v in op.operands[1 + outs:])
    dtype = element_type(op.operands[0].type)
    keys = Keys(dtype, op["largest"])
    record = keys.record()
    whole = n == keep
    bound = BUFFER * keep + SLACK
    pick = op["pick"]
    partly = not pick and not whole and not (isinstance(n, int) and isinstance(keep, int) and n <= 2 * keep)
    room = (bound if partly else n) + SLACK
    work = k.scratch.private(("sort", room * record.bytes), 2 * room * record.bytes)
    row = scalars.address(source, memory_type(dtype), start)
    length, count = scalars.emit(n), scalars.emit(keep)
    if not isinstance(n, int):
        fits = b.icmp_signed("<=", length, I64(LONGEST))
        k.report(op, fits)
        length, count = (b.select(fits, x, I64(0)) for x in (length, count))
    spare = scalars.address(work, ir.IntType(8), room * record.bytes)
    if pick:
        length = b.select(b.icmp_signed("<", length, I64(1)), I64(1), length)
        rank = b.sub(b.select(b.icmp_signed("<", length, count), length, count), I64(1))
        rank = b.select(b.icmp_signed("<", rank, I64(0)), I64(0), rank)
        place = b.call(order_statistic(k.module, keys, pick == "median"), [row, length, rank, work, spare])
        record.store(b, [place] * record.words, work, I64(0))
        made, count = work, I64(1)
    elif partly:
        made = b.call(_select(k.module, keys), [row, length, count, work, spare])
    else:
        made = b.call(_order(k.module, keys), [row, length, work, spare])
    targets = []
    for buffer, v in zip(buffers, op.operands[1:1 + outs], strict=True):
        into, step = layout[:2]
        del layout[:2]
        targets.append((scalars.address(buffer, memory_type(element_type(v.type)), into), scalars.emit(step)))
    values, places = targets[0] if op["values"] else None, targets[-1] if op["places"] else None

    def write(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        place = record.place(b, record.load(b, made, i))
        if places is not None:
            b.store(place, b.gep(places[0], [b.mul(i, places[1])], source_etype=I64))
        if values is not None:
            element = b.load(b.gep(row, [place], source_etype=keys.memory), typ=keys.memory)
            b.store(element, b.gep(values[0], [b.mul(i, values[1])], source_etype=keys.memory))
        return []

    loop(b, I64(0), count, 1, [], write, "write")


def _order(module: ir.Module, keys: Keys) -> ir.Function:
    """ptr order(ptr source, i64 n, ptr records, ptr spare)"""
    record = keys.record()
    sort = record_sort(module, record)

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        source, n, records, spare = args
        _unless_in_order(b, keys, source, n, n, records)
        keys.all_records(b, source, n, records)
        return b.call(sort, [records, spare, n])

    return function(module, f"sort.order.{keys.name}", PTR, [PTR, I64, PTR, PTR], emit)


def _unless_in_order(b: ir.IRBuilder, keys: Keys, source: ir.Value, n: ir.Value, keep: ir.Value, records: ir.Value) -> None:
    """Returns the places of the first `keep` in `records` if the row is in order, either way."""
    record = keys.record()
    first = b.call(in_order(b.module, keys), [source, n])
    ready, following = b.append_basic_block("ready"), b.append_basic_block("unordered")
    b.cbranch(b.icmp_signed(">=", first, I64(0)), ready, following)
    b.position_at_end(ready)
    step = b.select(b.icmp_signed("==", first, I64(0)), I64(1), I64(-1))

    def place(i: ir.Value, at: list[ir.Value]) -> list[ir.Value]:
        record.store(b, [at[0]] * record.words, records, i)
        return [b.add(at[0], step)]

    loop(b, I64(0), keep, 1, [first], place, "place")
    b.ret(records)
    b.position_at_end(following)


def _select(module: ir.Module, keys: Keys) -> ir.Function:
    """ptr select(ptr source, i64 n, i64 keep, ptr records, ptr spare); both buffers have room for BUFFER * keep + 2 * SLACK records."""
    read = _read_within(module, keys)
    first = record_first(module, keys.record())

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        source, n, keep, records, spare = args
        _unless_in_order(b, keys, source, n, keep, records)
        short, long = b.append_basic_block("short"), b.append_basic_block("long")
        few = b.and_(b.icmp_signed("<=", n, b.mul(keep, I64(BUFFER))), b.icmp_signed("<=", n, I64(SHORT)))
        b.cbranch(b.or_(few, b.icmp_signed("<=", n, I64(SHORTEST))), short, long)
        b.position_at_end(short)
        keys.all_records(b, source, n, records)
        b.ret(b.call(first, [records, spare, n, keep]))
        b.position_at_end(long)
        bound = b.call(_sampled_bound(module, keys), args)
        found = b.call(read, [*args, bound])
        before, again, end = b.block, b.append_basic_block("again"), b.append_basic_block("end")
        b.cbranch(b.icmp_signed("<", found, keep), again, end)
        b.position_at_end(again)
        every = b.call(read, [*args, ir.Constant(keys.type, (1 << (keys.type.width - 1)) - 1)])
        b.branch(end)
        b.position_at_end(end)
        count = b.phi(I64)
        count.add_incoming(found, before)
        count.add_incoming(every, again)
        return b.call(first, [records, spare, count, keep])

    return function(module, f"sort.select.{keys.name}", PTR, [PTR, I64, I64, PTR, PTR], emit)


def _sampled_bound(module: ir.Module, keys: Keys) -> ir.Function:
    """A key that likely a few more than `keep` of the row are within: of a sample in which m of those are expected, the one of rank
    m + 3 sqrt(m) + 2. The largest key for short rows, and where that is more than the sample has."""
    record = keys.record()
    sort = record_sort(module, record)
    every = ir.Constant(keys.type, (1 << (keys.type.width - 1)) - 1)

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        source, n, keep, records, spare = args
        double = ir.DoubleType()
        few = b.icmp_signed("<", b.mul(keep, I64(SAMPLES[0])), b.mul(n, I64(FEW)))
        size = b.select(b.or_(few, b.icmp_signed("<", n, I64(16 * SAMPLES[1]))), I64(SAMPLES[0]), I64(SAMPLES[1]))
        expected = b.fdiv(b.sitofp(b.mul(keep, size), double), b.sitofp(n, double))
        spread = b.fmul(call(b, "llvm.sqrt.f64", double, [expected]), double(3))
        rank = b.add(b.fptosi(b.fadd(expected, spread), I64), I64(2))
        before, sample, end = b.block, b.append_basic_block("sample"), b.append_basic_block("end")
        long = b.and_(b.icmp_signed(">=", n, I64(SAMPLED)), b.icmp_signed("<", rank, b.lshr(size, I64(1))))
        b.cbranch(long, sample, end)
        b.position_at_end(sample)
        stride = b.sdiv(n, size)

        def take(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            record.store(b, keys.words(b, keys.load(b, source, b.mul(i, stride), 1), i), records, i)
            return []

        loop(b, I64(0), size, 1, [], take, "take")
        made = b.call(sort, [records, spare, size])
        bound = keys.key_of(b, record.load(b, made, rank))
        b.branch(end)
        last = b.block
        b.position_at_end(end)
        result = b.phi(keys.type)
        result.add_incoming(every, before)
        result.add_incoming(bound, last)
        return result

    return function(module, f"sort.bound.{keys.name}", keys.type, [PTR, I64, I64, PTR, PTR], emit)


def _read_within(module: ir.Module, keys: Keys) -> ir.Function:
    """i64 read(ptr source, i64 n, i64 keep, ptr records, ptr spare, key bound): leaves records that are within the bound in `records`, among them the
    first `keep` if there are as many; gives their number."""
    record = keys.record()
    first = record_first(module, record)
    w, unroll = WIDTH, 4
    smallest = ir.Constant(keys.type, -(1 << (keys.type.width - 1)))

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        source, n, keep, records, spare, first_bound = args
        capacity = b.mul(keep, I64(BUFFER))
        state = {"count": stack_slot(b, I64), "bound": stack_slot(b, keys.type)}
        b.store(I64(0), state["count"])
        b.store(first_bound, state["bound"])
        out = b.append_basic_block("out")

        def flush() -> None:
            """Keeps the first `keep`. Elements to come are later than all of these, so they have to be less than the last; if nothing is, done."""
            made = b.call(first, [records, spare, b.load(state["count"], typ=I64), keep])
            with b.if_then(b.icmp_unsigned("!=", made, records)):
                call(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [records, made, b.mul(keep, I64(record.bytes)), ir.IntType(1)(0)])
            b.store(keep, state["count"])
            last = keys.key_of(b, record.load(b, records, b.sub(keep, I64(1))))
            more = b.append_basic_block("more")
            b.cbranch(b.icmp_signed("==", last, smallest), out, more)
            b.position_at_end(more)
            b.store(b.sub(last, keys.type(1)), state["bound"])

        def enter(i: ir.Value, key: ir.Value, mask: ir.Value) -> None:
            """The lanes whose bit in the i64 mask is set."""
            slot = stack_slots[width_of(key)]
            b.store(key, slot)
            start = b.block
            head, body, end = (b.append_basic_block(f"lane.{x}") for x in ("head", "body", "end"))
            count = b.load(state["count"], typ=I64)
            b.branch(head)
            b.position_at_end(head)
            left, at = b.phi(I64), b.phi(I64)
            left.add_incoming(mask, start)
            at.add_incoming(count, start)
            b.cbranch(b.icmp_unsigned("!=", left, I64(0)), body, end)
            b.position_at_end(body)
            lane = call(b, "llvm.cttz.i64", I64, [left, ir.IntType(1)(1)])
            one = b.load(b.gep(slot, [lane], source_etype=keys.type), typ=keys.type)
            record.store(b, keys.words(b, one, b.add(i, lane)), records, at)
            left.add_incoming(b.and_(left, b.sub(left, I64(1))), b.block)
            at.add_incoming(b.add(at, I64(1)), b.block)
            b.branch(head)
            b.position_at_end(end)
            b.store(at, state["count"])

        stack_slots = {c: stack_slot(b, chunk_type(keys.type, c), 64) for c in (1, w)}

        def some(width: int, copies: int) -> Callable[[ir.Value, list[ir.Value]], list[ir.Value]]:
            def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                bound = b.load(state["bound"], typ=keys.type)
                starts = [b.add(i, I64(c * width)) for c in range(copies)]
                loaded = [keys.load(b, source, at, width) for at in starts]
                masks = []
                for key in loaded:
                    within = b.icmp_signed("<=", key, splat(b, bound, width))
                    bits = within if width == 1 else b.bitcast(within, ir.IntType(width))
                    masks.append(b.zext(bits, I64))
                some_of = masks[0]
                for m in masks[1:]:
                    some_of = b.or_(some_of, m)
                with b.if_then(b.icmp_unsigned("!=", some_of, I64(0)), likely=False):
                    for at, key, m in zip(starts, loaded, masks, strict=True):
                        enter(at, key, m)
                    with b.if_then(b.icmp_signed(">", b.load(state["count"], typ=I64), capacity), likely=False):
                        flush()
                return []
            return body

        done, = loop(b, I64(0), b.sub(n, I64(unroll * w - 1)), unroll * w, [], some(w, unroll), "read")
        loop(b, done, n, 1, [], some(1, 1), "rest")
        b.branch(out)
        b.position_at_end(out)
        return b.load(state["count"], typ=I64)

    return function(module, f"sort.read.{keys.name}", I64, [PTR, I64, I64, PTR, PTR, keys.type], emit)
