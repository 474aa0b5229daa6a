"""The tile of a pointwise or reduction kernel on a GPU, from how memory is kept busy.

    choice = gpu_tile(frame, vector, target)

A multiprocessor of a Hopper GPU gets some 32 bytes a nanosecond from memory, and a load takes 600 to 900 ns: 30 KB must be under way at any time
(Little's law), twice that where programs also compute, reduce and store. Threads load 16 bytes at once, so 2048 threads that have two loads each
under way do; what is left to choose is how many warps a program has, which wait for each other, and what stays in registers.

Rows that fit the registers of eight warps are read once. Longer rows are read in steps, whose loads are under way together as the loop is unrolled;
if they are read again, the rows that all multiprocessors work on should still lie in the L2 cache, so that few large programs are better than many.
Constants are from `benchmarks/gpu_loop_fit.py` (benchmarks/NOTES.md has the table), on shapes of which half were held out.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir import Dim, Target
from ...ir.expr import free_symbols, product
from ...ir.ranges import split_linear
from .frame import Access, Frame, is_expensive, make_online
from .gpu_tiles import COLUMNS
from .tile_choice import TileChoice

__all__ = ["gpu_tile", "transposed"]

PROGRAM = 4096
"""Bytes of each operand that a program of four warps takes: two loads of 16 bytes for each thread."""
WHOLE = 32768
"""Bytes of the longest row that is kept in registers: 128 for each thread of eight warps."""
MANY_OPERANDS = 4
"""From so many large operands and results on, a load of each is enough for a thread."""
MULTIPROCESSORS, L2 = 132, 50 << 20
"""Of an H100, where the target does not say."""
PASSES_IN_L2 = 0.75
"""The part of the L2 cache that rows may fill which will be read again."""
LARGE = 1 << 24
"""Points from which a pointwise kernel runs for many rounds of programs."""
UNROLL, LONGEST_BODY = 4, 60
"""Steps under way at a time, and operations of a body that is not unrolled: code grows, and compile time with it."""
MANY = (384, 768)
"""Rows of a sum of columns (or even ones: no masks), and programs, from which two warps are enough for each."""
FEW = 16
"""So many times smaller than the largest operand is what does not count."""


def gpu_tile(frame: Frame, vector: str, target: Target | None = None) -> TileChoice:
    """The tile whose second dimension walks `vector`."""
    processors, l2 = (target.multiprocessors or MULTIPROCESSORS, target.l2 or L2) if target is not None else (MULTIPROCESSORS, L2)
    across = None if frame.inner else transposed(frame, vector)
    if across is not None:
        return _transposing(frame, vector, across)
    row = _row(frame, vector)
    limit = _power(frame.sizes[row]) if row is not None else 1
    if vector in frame.inner:
        made = _rows(frame, vector, row, processors, l2)
    elif frame.inner:
        made = _columns(frame, vector)
    else:
        made = _points(frame, vector, limit, processors)
    rows, columns, warps, unroll = made
    rows = min(rows, limit)
    return TileChoice(vector, row if rows > 1 else None, (rows, columns), columns, warps, unroll)


def _rows(frame: Frame, vector: str, row: str | None, processors: int, l2: int) -> tuple[int, int, int, int]:
    """(rows, columns, warps, unrolled steps) where rows are reduced."""
    size, wide = frame.sizes[vector], _bytes(frame, vector)
    if not isinstance(size, int):
        return (1, 8192, 8, 1) if wide <= 2 else (1, 4096, 8, 1)
    width = _power(size)
    if width * wide <= WHOLE and len(frame.inner) == 1:
        rows, there = max(1, min(32, PROGRAM // (width * wide))), product(frame.sizes[f] for f in frame.outer)
        while rows > 1 and isinstance(there, int) and there < rows * processors:
            rows //= 2
        elements = rows * width
        return rows, width, max(1, min(elements // 256, max(4, min(8, elements * wide // 1024)))), 1
    passes, moments = _passes(frame)
    if passes == 1 and not moments:  # nothing but loads
        width = min(width, 8192)
        return 1, width, max(4, width // 512), 1
    unroll = UNROLL if sum(len(op.body) for op in frame.members) <= LONGEST_BODY else 1
    inner = product(frame.sizes[f] for f in frame.inner)
    resident = 4 * processors * inner * wide if isinstance(inner, int) else 0  # by four programs of 16 warps
    if not moments and isinstance(resident, int) and resident > PASSES_IN_L2 * l2:
        width = min(width, 8192)
        return 1, width, max(4, width // 512), min(2, unroll)
    if width <= 1024:  # the whole is walked by an outer loop: several rows make a program of eight warps
        width = min(width, 512)
        return 4, width, max(4, width // 64), unroll
    width = min(width, 4096)  # accumulators of moments take three registers for each element of a step
    return 1, width, width // 256, unroll


def _points(frame: Frame, vector: str, limit: int, processors: int) -> tuple[int, int, int, int]:
    """The same of a pointwise kernel, of which programs hold at most `limit` rows."""
    wide, points, width = _bytes(frame, vector), product(frame.sizes.values()), _power(frame.sizes[vector])
    largest = max((x.weight for x in frame.accesses if isinstance(x.weight, int)), default=0)
    operands = sum(not isinstance(x.weight, int) or x.weight * FEW > largest for x in frame.accesses)
    each = PROGRAM // wide
    if wide >= 4 or not isinstance(points, int) or points < LARGE and points < 2 * processors * 2 * each:
        each, warps = 1024, 4
    elif points < LARGE:
        each, warps = 2 * each, 8
    elif operands >= MANY_OPERANDS:
        warps = 8
    else:
        warps = 4
        if limit == 1 and any(is_expensive(op) for op in frame.members):
            each = 2 * each  # functions take their time: more is under way meanwhile
    if limit > 1:
        width = min(width, max(512, each // limit))
    width = min(width, each)
    return max(1, each // width), width, warps, 1


def _columns(frame: Frame, vector: str) -> tuple[int, int, int, int]:
    """The same of a sum of columns, in so many programs that their loads hide each other's wait (BatchNorm's statistics of 103 MB: 67 us with one
    program of 32 x 256 to a multiprocessor). As measured: 16 elements to a thread of four warps, of two where there are many programs of many rows;
    for one sum alone, which is nothing but loads, 32, and four steps under way. Where there is little to do, as in adding up parts, waiting is all:
    then a program takes few columns, and all of their elements at once."""
    points, unroll = product(frame.sizes.values()), 1
    if not isinstance(points, int) or points >= 1 << 18:
        rows, width, warps = 32, COLUMNS, 4
        if sum(bool(op["reductions"]) for op in frame.members) == 1:
            rows, unroll = 64, UNROLL if _bytes(frame, vector) <= 2 else 1
        else:
            summed = product(frame.sizes[f] for f in frame.inner)
            many = isinstance(points, int) and isinstance(summed, int) and (summed >= MANY[0] or summed % 32 == 0)
            if many and points // (summed * COLUMNS) >= MANY[1]:  # type: ignore[operator]
                rows, warps = 16, 2
    else:
        longest = max((n for f in frame.inner if isinstance(n := frame.sizes[f], int)), default=1)
        rows = max(64, min(512, 1 << (longest - 1).bit_length()))
        width = max(16, min(32, 8192 // rows))
        warps = max(4, rows * width // 1024)
    width = min(_power(frame.sizes[vector]), width)
    return max(rows, 512 * warps // width), width, warps, unroll


def _transposing(frame: Frame, vector: str, across: str) -> TileChoice:
    """Both ways of walking memory see runs of 64 elements, and of 128 where there are many."""
    if all(isinstance(n := frame.sizes[f], int) and n >= 1024 for f in (vector, across)):
        return TileChoice(vector, across, (128, 64), 64, 16)
    return TileChoice(vector, across, (64, 64), 64, 8)


def _passes(frame: Frame) -> tuple[int, bool]:
    """How often a row that does not fit the registers is read, and whether squares about its mean are summed."""
    copy = replace(frame, stage=dict(frame.stage), online={}, moments={})
    make_online(copy)
    return 1 + max(copy.stage[op] for op in copy.members if op["reductions"] or copy.is_full(op)), bool(copy.moments)


def _bytes(frame: Frame, vector: str) -> int:
    """Of an element of the widest large operand along the vector dimension; of results where nothing is read."""
    walked = [x for x in frame.accesses if vector in free_symbols(x.offset)]
    largest = max((x.weight for x in walked if isinstance(x.weight, int)), default=0)

    def counts(x: Access) -> bool:
        return not isinstance(x.weight, int) or x.weight * FEW > largest

    return max((x.bytes for x in walked if counts(x) and not x.is_store), default=max((x.bytes for x in walked), default=4))


def transposed(frame: Frame, vector: str, least: int = 64) -> str | None:
    """Another dimension along which a large access that does not walk `vector` contiguously does so; None if either is short: of fewer than 64,
    or `least` along `vector`."""
    def walks(x: Access, f: str) -> bool:
        linear = split_linear(x.offset, f)
        return linear is not None and linear[0] == 1
    points = [x for x in frame.accesses if not walks(x, vector) and vector in free_symbols(x.offset)]
    for f in frame.sizes:
        long = all(not isinstance(frame.sizes[d], int) or frame.sizes[d] >= (64 if d == f else least) for d in (f, vector))  # type: ignore[operator]
        if f != vector and long and any(walks(x, f) for x in points):
            return f
    return None


def _row(frame: Frame, vector: str) -> str | None:
    """The dimension that a tile's rows walk: the largest of those that are summed beside an outer vector, or not summed beside an inner one."""
    others = [f for f in frame.sizes if f != vector and (not frame.inner or (f in frame.inner) != (vector in frame.inner))]
    return max(others, key=lambda f: (_extent(frame.sizes[f]), f), default=None)


def _extent(size: Dim) -> int:
    return size if isinstance(size, int) else 1 << 16


def _power(size: Dim) -> int:
    """The power of two that holds a dimension."""
    return 1 << max(0, (_extent(size) - 1).bit_length())
