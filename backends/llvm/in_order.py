"""Rows that are in order already: of sorted numbers, of equal ones, of masks.

    first = in_order(source, n)         0: every key is at least the one before; n - 1: every one is less; -1: neither

Of a row in no order, the first few elements are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from .keys import Keys
from .records import function, loop
from .values import I64, PTR

__all__ = ["in_order"]

WIDTH = 8
"""Elements that are compared with their neighbours at once."""
SHORTEST = 5
"""Rows shorter than this are not looked at: sorting them takes less."""


def in_order(module: ir.Module, keys: Keys) -> ir.Function:
    """i64 in_order(ptr source, i64 n)"""

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        source, n = args
        no, long, rises, falls = (b.append_basic_block(x) for x in ("no", "long", "rises", "falls"))
        b.cbranch(b.icmp_signed("<", n, I64(SHORTEST)), no, long)
        b.position_at_end(no)
        b.ret(I64(-1))
        b.position_at_end(long)
        # The ends tell which way: of a row in no order this is a second look at nothing.
        b.cbranch(b.icmp_signed("<=", keys.load(b, source, I64(0), 1), keys.load(b, source, I64(1), 1)), rises, falls)
        for block, relation, first in ((rises, "<=", I64(0)), (falls, ">", None)):
            b.position_at_end(block)

            def compare(width: int, relation: str = relation) -> object:
                def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                    holds = b.icmp_signed(relation, keys.load(b, source, i, width), keys.load(b, source, b.add(i, I64(1)), width))
                    if width > 1:
                        holds = b.icmp_unsigned("==", b.bitcast(holds, ir.IntType(width)), ir.IntType(width)((1 << width) - 1))
                    following = b.append_basic_block("following")
                    b.cbranch(holds, following, no)
                    b.position_at_end(following)
                    return []
                return body

            last = b.sub(n, I64(1))
            done = I64(0)
            for width in (WIDTH, WIDTH // 2, 1):
                done, = loop(b, done, b.sub(last, I64(width - 1)), width, [], compare(width), f"neighbours.{width}")  # type: ignore[arg-type]
            b.ret(last if first is None else first)
        return None

    return function(module, f"sort.in_order.{keys.name}", I64, [PTR, I64], emit)
