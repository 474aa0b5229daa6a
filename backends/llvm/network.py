"""Sorting records of one word by a network: which records are compared does not depend on their order, so that nothing is guessed wrongly.

    sort(records, n)                    in place
    first(records, n, keep)             the first `keep` in order, in place; the rest is lost

Both want room for `BLOCK` records more and take a time that the number of records alone decides. Blocks of 32 are sorted in registers; then blocks
are merged in pairs, twice as long each time: both are compared with each other from opposite ends, and what is left are two halves that each rise and
then fall, or the other way round, which comparing at distances of a half, a quarter, ... puts in order. A comparison always leaves the smaller record
at the lower place, so that records behind the end, larger than all, need not be there: whatever would be compared with them is left out.
For the first `keep` alone, blocks stay at the power of two that holds as many, and of each pair the lower half is kept.
Batcher, Sorting networks and their applications, AFIPS 1968; Knuth, The Art of Computer Programming 3, 5.3.4 (the network of eight by columns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from .intrinsics import call
from .records import function, loop
from .values import I64, PTR, shuffle

__all__ = ["BLOCK", "network_first", "network_sort"]

LANES = 4
"""Records of a vector of 256 bits; on other machines it is several or part of one."""
VECTORS = 8
BLOCK = LANES * VECTORS
"""Records that are sorted in registers."""
EIGHT = ((0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (1, 2), (5, 6), (0, 4), (3, 7), (1, 5), (2, 6), (1, 4), (3, 6), (2, 4),
         (3, 5), (3, 4))
"""Sorts eight with 19 comparisons."""
VECTOR = ir.VectorType(I64, LANES)
LAST = (1 << 63) - 1

Vectors = list[ir.Value]


def network_sort(module: ir.Module) -> ir.Function:
    """ptr sort(ptr records, i64 n)"""
    rise, blocks = _merged(module), _blocks(module)

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        records, n = args
        padded = b.call(blocks, [records, n])
        b.call(rise, [records, padded, padded])
        return records

    return function(module, "sort.network", PTR, [PTR, I64], emit)


def network_first(module: ir.Module) -> ir.Function:
    """ptr first(ptr records, i64 n, i64 keep): 0 < keep <= n."""
    rise, blocks, finish = _merged(module), _blocks(module), _finished(module)

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        records, n, keep = args
        padded = b.call(blocks, [records, n])
        size = _while(b, I64(BLOCK), lambda x: b.icmp_signed("<", x, keep), lambda x: b.shl(x, I64(1)), lambda x: None, "size")
        b.call(rise, [records, padded, size])

        def combine(start: ir.Value, _: Vectors) -> Vectors:
            """The lower half of the first block and this one, then in order."""
            there = b.sub(padded, start)
            missing = b.select(b.icmp_signed("<", there, size), b.sub(size, there), I64(0))

            def smaller(i: ir.Value, _: Vectors) -> Vectors:
                theirs = _reversed(b, _load(b, records, b.sub(b.add(start, size), b.add(i, I64(LANES)))))
                _store_whole(b, records, i, _exchange(b, _load(b, records, i), theirs)[0])
                return []

            loop(b, missing, size, LANES, [], smaller, "smaller")
            b.call(finish, [records, size, b.lshr(size, I64(1))])
            return []

        _loop_by(b, size, padded, size, combine, "blocks")
        return records

    return function(module, "sort.first", PTR, [PTR, I64, I64], emit)


def _blocks(module: ir.Module) -> ir.Function:
    """i64 blocks(ptr records, i64 n): fills up to a multiple of BLOCK, which is given, and sorts each block."""

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> ir.Value:
        records, n = args
        padded = b.and_(b.add(n, I64(BLOCK - 1)), I64(-BLOCK))

        def pad(i: ir.Value, _: Vectors) -> Vectors:
            b.store(I64(LAST), b.gep(records, [i], source_etype=I64))
            return []

        loop(b, n, padded, 1, [], pad, "pad")

        def block(start: ir.Value, _: Vectors) -> Vectors:
            made = _sorted_block(b, _load_block(b, records, start))
            _store_block(b, records, start, made)
            return []

        loop(b, I64(0), padded, BLOCK, [], block, "block")
        return padded

    return function(module, "sort.blocks", I64, [PTR, I64], emit)


def _merged(module: ir.Module) -> ir.Function:
    """void merged(ptr records, i64 n, i64 size): merges sorted blocks of BLOCK, of n records in all, until they are of `size` or all are in order."""
    finish = _finished(module)

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        records, n, size = args

        def twice(half: ir.Value) -> None:
            whole = b.shl(half, I64(1))

            def pair(start: ir.Value, _: Vectors) -> Vectors:
                end = b.add(start, whole)
                missing = b.select(b.icmp_signed(">", end, n), b.sub(end, n), I64(0))

                def flip(i: ir.Value, _: Vectors) -> Vectors:
                    low, high = b.add(start, i), b.sub(end, b.add(i, I64(LANES)))
                    x, y = _exchange(b, _load(b, records, low), _reversed(b, _load(b, records, high)))
                    _store_whole(b, records, low, x)
                    _store(b, records, high, _reversed(b, y))
                    return []

                loop(b, missing, half, LANES, [], flip, "flip")
                return []

            _loop_by(b, I64(0), n, whole, pair, "pairs")
            b.call(finish, [records, n, b.lshr(half, I64(1))])

        _while(b, I64(BLOCK), lambda x: b.and_(b.icmp_signed("<", x, size), b.icmp_signed("<", x, n)), lambda x: b.shl(x, I64(1)), twice, "merge")

    return function(module, "sort.merged", ir.VoidType(), [PTR, I64, I64], emit)


def _finished(module: ir.Module) -> ir.Function:
    """void finished(ptr records, i64 n, i64 distance): compares at this distance, at half of it, and so on, all n records."""

    def emit(b: ir.IRBuilder, args: Sequence[ir.Value]) -> None:
        records, n, first = args

        def at(distance: ir.Value) -> None:
            def pair(start: ir.Value, _: Vectors) -> Vectors:
                there = b.sub(n, b.add(start, distance))
                count = b.select(b.icmp_signed("<", there, distance), there, distance)

                def compare(i: ir.Value, _: Vectors) -> Vectors:
                    low = b.add(start, i)
                    high = b.add(low, distance)
                    x, y = _exchange(b, _load(b, records, low), _load(b, records, high))
                    _store_whole(b, records, low, x)
                    _store(b, records, high, y)
                    return []

                loop(b, I64(0), count, LANES, [], compare, "compare")
                return []

            _loop_by(b, I64(0), n, b.shl(distance, I64(1)), pair, "distance")

        _while(b, first, lambda x: b.icmp_signed(">=", x, I64(BLOCK)), lambda x: b.lshr(x, I64(1)), at, "halve")

        def block(start: ir.Value, _: Vectors) -> Vectors:
            _store_block(b, records, start, _cleaned(b, _load_block(b, records, start)))
            return []

        loop(b, I64(0), n, BLOCK, [], block, "block")

    return function(module, "sort.finished", ir.VoidType(), [PTR, I64, I64], emit)


# -- in registers ---------------------------------------------------------------------------------------------------------------------


def _exchange(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The smaller and the larger of each lane."""
    return call(b, f"llvm.smin.v{LANES}i64", VECTOR, [x, y]), call(b, f"llvm.smax.v{LANES}i64", VECTOR, [x, y])


def _reversed(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return shuffle(b, x, range(LANES - 1, -1, -1))


def _two(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(lanes)))


def _halves(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Lower halves of both, and upper ones."""
    return _two(b, x, y, (0, 1, 4, 5)), _two(b, x, y, (2, 3, 6, 7))


def _evens(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Even lanes of both in turns, and odd ones."""
    return _two(b, x, y, (0, 4, 2, 6)), _two(b, x, y, (1, 5, 3, 7))


def _sorted_block(b: ir.IRBuilder, v: Vectors) -> Vectors:
    """Columns of eight in order, turned into four runs, merged."""
    v = list(v)
    for i, j in EIGHT:
        v[i], v[j] = _exchange(b, v[i], v[j])
    upper, lower = _turned(b, v[:4]), _turned(b, v[4:])
    runs = [[upper[i], lower[i]] for i in range(4)]
    while len(runs) > 1:
        runs = [_merge(b, runs[i], runs[i + 1]) for i in range(0, len(runs), 2)]
    return runs[0]


def _turned(b: ir.IRBuilder, v: Vectors) -> Vectors:
    """Four vectors of four as columns."""
    (a, c), (d, e) = _evens(b, v[0], v[1]), _evens(b, v[2], v[3])
    (p, q), (r, s) = _halves(b, a, d), _halves(b, c, e)
    return [p, r, q, s]


def _merge(b: ir.IRBuilder, x: Vectors, y: Vectors) -> Vectors:
    made = [_exchange(b, p, _reversed(b, q)) for p, q in zip(x, reversed(y), strict=True)]
    return _cleaned(b, [low for low, _ in made]) + _cleaned(b, [high for _, high in made])


def _cleaned(b: ir.IRBuilder, v: Vectors) -> Vectors:
    """What rises and falls, in order: an even number of vectors."""
    v = list(v)
    distance = len(v) // 2
    while distance:
        for i in range(len(v)):
            if not i & distance:
                v[i], v[i + distance] = _exchange(b, v[i], v[i + distance])
        distance //= 2
    for i in range(0, len(v), 2):
        low, high = _exchange(b, *_halves(b, v[i], v[i + 1]))      # lanes two apart
        low, high = _exchange(b, *_evens(b, low, high))            # and neighbours
        v[i], v[i + 1] = _halves(b, *_evens(b, low, high))
    return v


# -- memory and loops -----------------------------------------------------------------------------------------------------------------


def _load(b: ir.IRBuilder, records: ir.Value, i: ir.Value) -> ir.Value:
    return b.load(b.gep(records, [i], source_etype=I64), typ=VECTOR, align=8)


def _store(b: ir.IRBuilder, records: ir.Value, i: ir.Value, value: ir.Value) -> None:
    b.store(value, b.gep(records, [i], source_etype=I64), align=8)


class _WholeStore(ir.instructions.StoreInstr):
    """A volatile store. LLVM (20) writes min(x, y) to where x came from by a masked store, which takes AMD's processors 18 operations."""

    def descr(self, buf: list[str]) -> None:
        plain: list[str] = []
        super().descr(plain)
        buf.append("".join(plain).replace("store ", "store volatile ", 1))


def _store_whole(b: ir.IRBuilder, records: ir.Value, i: ir.Value, value: ir.Value) -> None:
    made = _WholeStore(b.block, value, b.gep(records, [i], source_etype=I64))
    made.align = 8
    b._insert(made)


def _load_block(b: ir.IRBuilder, records: ir.Value, start: ir.Value) -> Vectors:
    return [_load(b, records, b.add(start, I64(j * LANES))) for j in range(VECTORS)]


def _store_block(b: ir.IRBuilder, records: ir.Value, start: ir.Value, v: Vectors) -> None:
    for j, value in enumerate(v):
        _store(b, records, b.add(start, I64(j * LANES)), value)


def _loop_by(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: ir.Value, body: Callable[[ir.Value, Vectors], Vectors], name: str) -> None:
    """A loop with a step that is not constant."""
    _while(b, start, lambda i: b.icmp_signed("<", i, stop), lambda i: b.add(i, step), lambda i: body(i, []), name)


def _while(b: ir.IRBuilder, start: ir.Value, test: Callable[[ir.Value], ir.Value], following: Callable[[ir.Value], ir.Value],
           body: Callable[[ir.Value], object], name: str) -> ir.Value:
    """for (x = start; test(x); x = following(x)) body(x); leaves the builder behind it. Gives the last x."""
    before = b.block
    head, inside, after = (b.append_basic_block(f"{name}.{x}") for x in ("test", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    x = b.phi(start.type)
    x.add_incoming(start, before)
    b.cbranch(test(x), inside, after)
    b.position_at_end(inside)
    body(x)
    x.add_incoming(following(x), b.block)
    b.branch(head)
    b.position_at_end(after)
    return x
