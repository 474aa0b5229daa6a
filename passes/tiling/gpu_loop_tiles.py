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

from collections.abc import Sequence
from dataclasses import replace

from ...ir import Dim, Target
from ...ir.expr import free_symbols, product
from ...ir.ranges import split_linear
from ..structured import EXPENSIVE, body_ops
from .frame import Access, Frame, is_expensive, make_moments, make_online
from .gpu_tiles import COLUMNS
from .tile_choice import TileChoice

__all__ = ["LOAD", "gpu_tile", "rows_aligned", "transposed"]

LOAD = 16
"""Bytes that a thread loads at once."""
PROGRAM = 4096
"""Bytes of each operand that a program of four warps takes: two loads of 16 bytes for each thread."""
WHOLE = 16384
"""Bytes of the longest row that is kept in registers: 64 for each thread of eight warps. Of longer ones the second reading is from the caches."""
RAGGED = 0.75
"""The filled part of a row's tile up to which each thread has two more loads, for some have none."""
SHORT = 8
"""Steps of 4096 elements below which a row with moments is read in steps of 2048, so that some are left to be under way together."""
MULTIPROCESSORS, L2 = 132, 50 << 20
"""Of an H100, where the target does not say."""
PASSES_IN_L2 = 0.75
"""The part of the L2 cache that rows may fill which will be read again."""
CHEAP = frozenset({"arith.exp", "arith.exp2", "arith.sigmoid"})
"""Functions of a few instructions in kernels of 16 bits."""
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
    return TileChoice(vector, row if rows > 1 else None, (rows, columns), columns, warps, unroll=unroll)


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
        warps = 4 if _is_random(frame) else max(4, min(8, elements * wide // 1024))
        ragged = size <= RAGGED * width and (not isinstance(there, int) or there >= rows * 4 * processors)
        return rows, width, max(1, min(elements // 256, warps // 2 if ragged else warps)), 1
    passes, moments = _passes(frame)
    if passes == 1 and not moments:  # nothing but loads
        if not rows_aligned(frame, vector):  # of single elements
            width = min(width, 2048)
            return 1, width, max(1, width // 256), UNROLL
        alone = sum(bool(op["reductions"]) for op in frame.members) == 1 and not any(is_expensive(op) for op in frame.members)
        if wide <= 2 and alone:  # nothing to compute: four loads of a thread are under way
            width = min(width, 4096)
            return 1, width, max(4, width // 256), UNROLL
        width = min(width, 8192)
        return 1, width, max(4, width // 512), 1
    unroll = UNROLL if sum(len(op.body) for op in frame.members) <= LONGEST_BODY else 1
    inner = product(frame.sizes[f] for f in frame.inner)
    resident = 4 * processors * inner * wide if isinstance(inner, int) else 0  # by four programs of 16 warps
    if not moments and isinstance(resident, int) and resident > PASSES_IN_L2 * l2:
        width = min(width // 2, 8192 if wide <= 2 else 16384)
        return 1, width, max(4, width // 512 if wide <= 2 else width // 2048), unroll if wide <= 2 else min(2, unroll)
    if width <= 1024:  # the whole is walked by an outer loop: several rows make a program of eight warps
        width = min(width, 512)
        return 4, width, max(4, width // 64), unroll
    programs = product(frame.sizes[f] for f in frame.outer)  # two of 16 warps have room, and all should be there if nothing is read again
    crowd = passes == 1 and isinstance(programs, int) and programs > 2 * processors
    short = moments and (crowd or isinstance(inner, int) and inner < SHORT * 4096)
    width = min(width, 2048 if short else 4096)  # accumulators of moments take three registers for each element of a step
    return 1, width, width // 256, unroll


def _points(frame: Frame, vector: str, limit: int, processors: int) -> tuple[int, int, int, int]:
    """The same of a pointwise kernel, of which programs hold at most `limit` rows."""
    wide, points, width = _bytes(frame, vector), product(frame.sizes.values()), _power(frame.sizes[vector])
    heavy = any(is_expensive(op) and any(o.name in EXPENSIVE - CHEAP for o in body_ops(op)) for op in frame.members)
    each = PROGRAM // wide
    if wide >= 4 or not isinstance(points, int) or points < LARGE and points < 2 * processors * 2 * each:
        each, warps = 1024, 4
    elif points < LARGE:
        each, warps = 2 * each, 8
    elif _is_random(frame):  # random numbers, of which neighbours in a thread share the work
        return 1, min(width, 2 * each), 4, 1
    elif heavy:
        each, warps = each if limit > 1 else 2 * each, 4  # functions take their time: more is under way meanwhile
    else:
        warps = 4 if _large_loads(frame) < 2 else 8  # two loads for each thread
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
    copy = replace(frame, stage=dict(frame.stage), online={}, moments={}, means={})
    make_online(copy)
    make_moments(copy)
    return 1 + max(copy.stage[op] for op in copy.members if op["reductions"] or copy.is_full(op)), bool(copy.moments)


def _is_random(frame: Frame) -> bool:
    """Something is mixed from positions, as random numbers are."""
    bodies = [{o.name for o in op.body} for op in frame.members]
    return any("arith.xor" in names for names in bodies) and any("tensor.index" in names for names in bodies)


def _large(accesses: Sequence[Access]) -> list[Access]:
    largest = max((x.weight for x in accesses if isinstance(x.weight, int)), default=0)
    return [x for x in accesses if not isinstance(x.weight, int) or x.weight * FEW > largest]


def _large_loads(frame: Frame) -> int:
    return len({(x.value, x.offset) for x in _large(frame.accesses) if not x.is_store})


def rows_aligned(frame: Frame, vector: str) -> bool:
    """Each run along the vector dimension begins where a load of 16 bytes may."""
    along = [x for x in frame.accesses if vector in free_symbols(x.offset)]
    starts = [(x.bytes, split_linear(x.offset, f)) for x in along for f in free_symbols(x.offset) if f != vector]
    return all(s is not None and isinstance(s[0], int) and s[0] * size % LOAD == 0 for size, s in starts)


def _bytes(frame: Frame, vector: str) -> int:
    """Of an element of the widest large operand along the vector dimension; of results where nothing is read."""
    walked = [x for x in frame.accesses if vector in free_symbols(x.offset)]
    return max((x.bytes for x in _large(walked) if not x.is_store), default=max((x.bytes for x in walked), default=4))


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
