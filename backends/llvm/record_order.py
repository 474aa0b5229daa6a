"""Which way so many records are sorted.

    sorted = sort(records, spare, n)                 either of the two buffers
    sorted = first(records, spare, n, keep)          its first `keep` are in order
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from .narrow import MOST, narrow_sort
from .network import network_first, network_sort
from .records import Record, counted_sort, digit_sort, function
from .values import I64, PTR

__all__ = ["record_first", "record_sort"]

COUNTED = {1: 8, 2: 16}
"""Most records that are sorted by comparing each with each, by words of a record: beyond, a network has less to do, or counting digits pays."""
NETWORK = {8: 128, 16: 512, 32: 1024}
"""Most that are sorted by a network, by bits of a key: as many digits of eight bits take as long."""


def record_sort(module: ir.Module, r: Record) -> ir.Function:
    """ptr sort(ptr records, ptr spare, i64 n): sorts n records, gives the buffer where they are then. Both have room for 32 more; n < 2^31."""
    counted, by_digits = counted_sort(module, r), digit_sort(module, r)

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        records, spare, n = args
        end = b.append_basic_block("end")
        made: list[tuple[ir.Value, ir.Block]] = []

        def up_to(most: int, f: ir.Function, operands: Sequence[ir.Value]) -> None:
            few, many = b.append_basic_block("few"), b.append_basic_block("many")
            b.cbranch(b.icmp_signed("<=", n, I64(most)), few, many)
            b.position_at_end(few)
            made.append((b.call(f, operands), b.block))
            b.branch(end)
            b.position_at_end(many)

        up_to(COUNTED[r.words], counted, [records, spare, n])
        if r.words == 1:
            up_to(NETWORK[r.bits], network_sort(module), [records, n])
        else:
            up_to(MOST, narrow_sort(module, r), [records, spare, n])
        made.append((b.call(by_digits, [records, spare, n]), b.block))
        b.branch(end)
        return _whichever(b, end, made)

    return function(module, f"sort.records.{r.bits}", PTR, [PTR, PTR, I64], emit)


def record_first(module: ir.Module, r: Record) -> ir.Function:
    """ptr first(ptr records, ptr spare, i64 n, i64 keep)"""
    sort = record_sort(module, r)

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        records, spare, n, keep = args
        if r.words == 2:
            return b.call(sort, [records, spare, n])
        half = b.and_(b.icmp_signed("<=", b.shl(keep, I64(1)), n), b.icmp_signed("<=", keep, I64(NETWORK[r.bits])))
        first = b.and_(half, b.icmp_signed(">", n, I64(COUNTED[r.words])))
        some, every, end = (b.append_basic_block(x) for x in ("some", "every", "end"))
        b.cbranch(first, some, every)
        made = []
        for block, f, operands in ((some, network_first(module), [records, n, keep]), (every, sort, [records, spare, n])):
            b.position_at_end(block)
            made.append((b.call(f, operands), block))
            b.branch(end)
        return _whichever(b, end, made)

    return function(module, f"sort.first.{r.bits}", PTR, [PTR, PTR, I64, I64], emit)


def _whichever(b: ir.IRBuilder, end: ir.Block, made: Sequence[tuple[ir.Value, ir.Block]]) -> ir.Value:
    """At the beginning of `end`, the pointer of the block that control came from."""
    b.position_at_end(end)
    result = b.phi(PTR)
    for value, block in made:
        result.add_incoming(value, block)
    return result
