"""Sorting records of two words by the network of one: what keys of 64 bits differ in seldom takes all of those.

    sorted = sort(records, spare, n)                 either of the two buffers; n <= MOST

A key's distance from the smallest of the row, without as many of its lowest bits as leave no room beside the place among the records, is a word.
Where bits were left out, neighbours in the network's order may be the wrong way round: each record is put where it belongs on its way out, which
moves few unless keys stand in clusters far from each other; then digits are sorted instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from .intrinsics import call
from .network import BLOCK, network_sort
from .records import LANES, Record, digit_sort, function, loop, places_from
from .values import I1, I64, PTR, shuffle, splat, stack_slot

__all__ = ["MOST", "narrow_sort"]

PLACE = 10
MOST = 1 << PLACE
MOVES = 4
"""Records that may be moved by one place, in multiples of their number."""
ROOM = MOST + BLOCK


def narrow_sort(module: ir.Module, r: Record) -> ir.Function:
    """ptr narrow(ptr records, ptr spare, i64 n): n at most MOST; both buffers have room for LANES more."""
    network, digits = network_sort(module), digit_sort(module, r)

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        records, spare, n = args
        words = stack_slot(b, ir.ArrayType(I64, ROOM), 64)
        least, most = _extremes(b, r, records, n)
        bits = b.sub(I64(64), call(b, "llvm.ctlz.i64", I64, [b.sub(most, least), I1(0)]))
        beyond = b.add(bits, I64(PLACE - 63))
        left_out = b.select(b.icmp_signed(">", beyond, I64(0)), beyond, I64(0))

        def word(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            distance = b.lshr(b.sub(_keys(b, r, records, i), splat(b, least, LANES)), splat(b, left_out, LANES))
            made = b.or_(b.shl(distance, splat(b, I64(PLACE), LANES)), places_from(b, i, LANES))
            b.store(made, b.gep(words, [i], source_etype=I64), align=8)
            return []

        loop(b, I64(0), n, LANES, [], word, "word")
        b.call(network, [words, n])
        clustered, end = b.append_basic_block("clustered"), b.append_basic_block("end")

        def settle(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            """Record i in the words' order goes to its place among those before."""
            largest, moved = carried
            mine = r.load(b, records, b.and_(b.load(b.gep(words, [i], source_etype=I64), typ=I64), I64(MOST - 1)))
            before = b.block
            wrong, following = b.append_basic_block("wrong"), b.append_basic_block("right")
            b.cbranch(b.icmp_signed("<", mine[0], largest), wrong, following)
            b.position_at_end(wrong)
            at = _shifted(b, r, spare, i, mine[0])
            total = b.add(moved, b.sub(i, at))
            last = b.block
            b.cbranch(b.icmp_signed(">", total, b.mul(n, I64(MOVES))), clustered, following)
            b.position_at_end(following)
            place, count = b.phi(I64), b.phi(I64)
            for phi, straight, turned in ((place, i, at), (count, moved, total)):
                phi.add_incoming(straight, before)
                phi.add_incoming(turned, last)
            r.store(b, mine, spare, place)
            return [b.select(b.icmp_signed("<", mine[0], largest), largest, mine[0]), count]

        loop(b, I64(0), n, 1, [I64(-(1 << 63)), I64(0)], settle, "settle")
        b.branch(end)
        b.position_at_end(clustered)
        b.ret(b.call(digits, [records, spare, n]))
        b.position_at_end(end)
        b.ret(spare)

    return function(module, f"sort.narrow.{r.bits}", PTR, [PTR, PTR, I64], emit)


def _keys(b: ir.IRBuilder, r: Record, records: ir.Value, i: ir.Value) -> ir.Value:
    """The first words of records i, i + 1, ..."""
    both = b.load(r.at(b, records, i), typ=ir.VectorType(I64, 2 * LANES), align=8)
    return shuffle(b, both, range(0, 2 * LANES, 2))


def _extremes(b: ir.IRBuilder, r: Record, records: ir.Value, n: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The smallest and the largest key of n > 0."""
    first = b.load(r.at(b, records, I64(0)), typ=I64)

    def both(key: Callable[[ir.Value], ir.Value]) -> Callable[[ir.Value, list[ir.Value]], list[ir.Value]]:
        def body(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            x = key(i)
            return [b.select(b.icmp_signed(relation, x, held), x, held) for relation, held in zip("<>", carried, strict=True)]
        return body

    done, *lanes = loop(b, I64(0), b.sub(n, I64(LANES - 1)), LANES, [splat(b, first, LANES)] * 2, both(lambda i: _keys(b, r, records, i)), "extremes")
    held = [call(b, f"llvm.vector.reduce.s{kind}.v{LANES}i64", I64, [v]) for kind, v in zip(("min", "max"), lanes, strict=True)]
    _, least, most = loop(b, done, n, 1, held, both(lambda i: b.load(r.at(b, records, i), typ=I64)), "rest")
    return least, most


def _shifted(b: ir.IRBuilder, r: Record, sorted_: ir.Value, end: ir.Value, key: ir.Value) -> ir.Value:
    """Moves the records before `end` whose keys are larger up by one; gives the place that is free then. The last of them is larger."""
    start = b.block
    move, after = b.append_basic_block("move"), b.append_basic_block("moved")
    b.branch(move)
    b.position_at_end(move)
    i = b.phi(I64)
    i.add_incoming(end, start)
    before = b.sub(i, I64(1))
    r.store(b, r.load(b, sorted_, before), sorted_, i)
    # The record in front of the first one is never read: the place is tested first.
    front = b.append_basic_block("front")
    b.cbranch(b.icmp_signed(">", before, I64(0)), front, after)
    b.position_at_end(front)
    larger = b.icmp_signed(">", b.load(r.at(b, sorted_, b.sub(before, I64(1))), typ=I64), key)
    i.add_incoming(before, front)
    b.cbranch(larger, move, after)
    b.position_at_end(after)
    return before
