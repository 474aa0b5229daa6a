"""The tile of a pointwise or reduction kernel: which dimensions it spans, and how large it is.

    choice = choose_tile(frame, lanes, gpu=True)                # analytic
    tiles = loop_tiles(frame, choice)                           # GPUs: what else is worth measuring, the model's choice first
    choice = resized(frame, choice, tiles[3])                   # the choice with another size

The dimension along which most bytes are contiguous is the tile's second one; the size follows from what has to be in flight at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product as pairs
from typing import Any

from ...ir import Dim, TensorType
from ...ir.expr import free_symbols, product
from ...ir.ranges import split_linear
from .frame import Frame
from .gpu_tiles import COLUMNS, GpuTile

__all__ = ["TileChoice", "choose_tile", "loop_tiles", "resized"]

LINE_ELEMENTS = 16
"""Of 4 bytes in a cache line."""
MANY = (384, 768)
"""Rows of a sum of columns (or even ones: no masks), and programs, from which two warps are enough for each."""
LARGEST = 16384
"""Elements of a tile: 32 registers of each thread of 16 warps for one value."""


@dataclass(frozen=True)
class TileChoice:
    """The shape of the kernel: which frame dimensions are t0 and t1, the tile's size, and how much one program covers."""

    vector: str | None
    row: str | None
    shape: tuple[int, int]
    chunk: int              # elements of the vector dimension per program, when it is an outer one
    warps: int = 0          # of a program on a GPU; 0: as many as the tile's size suggests
    gathered: bool = False  # sums rows that data names, along the vector dimension
    rows: int = 1           # of a program that works on several in turns (`row_pipeline.py`)


def choose_tile(frame: Frame, lanes: int, *, gpu: bool) -> TileChoice:
    """An analytic choice: contiguous bytes decide the vector dimension; body size decides how many registers a tile takes."""
    scores: dict[str, float] = {}
    gathered = {} if gpu else _gathered(frame)
    for f, size in frame.sizes.items():
        extent = size if isinstance(size, int) else 1 << 16
        score = 0.0
        for x in frame.accesses:
            c = split_linear(x.offset, f)
            weight = float(x.weight if isinstance(x.weight, int) else 1 << 20) * x.bytes
            if c is None:
                score -= weight * 0.25
            elif c[0] == 1:
                score += weight * (2.0 if x.is_store else 1.0)
            elif c[0] != 0:
                score -= weight * 0.5
        score += gathered.get(f, 0.0)
        scores[f] = score * min(extent, lanes) / lanes + 1e-3 * min(extent, lanes) / lanes
    if not scores:
        return TileChoice(None, None, (1, 1), 1)
    vector = max(scores, key=lambda f: (scores[f], f))
    size = frame.sizes[vector]
    heavy = sum(len(op.body) for op in frame.members)
    if gpu:
        return _gpu_tile(frame, vector, size)
    panel = isinstance(size, int) and size % LINE_ELEMENTS == 0  # of a product's packed operand: whole lines
    across = None if frame.inner else _transposed(frame, vector, LINE_ELEMENTS if panel else 64)
    if across is not None and not (isinstance(size, int) and size < LINE_ELEMENTS):
        # Whole lines of what is read along the other dimension are used while they are in the first cache, where a row of lines would not stay.
        columns = max(lanes, LINE_ELEMENTS)  # lines of what is written are whole too
        return TileChoice(vector, across, (LINE_ELEMENTS, columns), max(columns, 256 // columns * columns))
    named = bool(gathered.get(vector)) and vector not in frame.inner and bool(frame.inner)
    width = lanes * (2 if heavy > 24 else 16 if named else 4)
    if isinstance(size, int):
        size = max(size, 1)
        while width > lanes and width >= 2 * size:
            width //= 2
        if size < lanes:
            width = 1 << max(0, (size - 1).bit_length())
            width = size if width > size else width
    return TileChoice(vector, None, (1, width), max(width, 4096 // width * width), gathered=named)


def _gathered(frame: Frame) -> dict[str, float]:
    """Bytes that gathers read along each dimension side by side: the columns of rows of a table, which data names."""
    found: dict[str, float] = {}
    for op in frame.members:
        for inner in op.body:
            if inner.name != "tensor.extract":
                continue
            last = inner.operands[-1].defining_op
            source = op.operands[inner.operands[0].index].type  # type: ignore[attr-defined]
            assert isinstance(source, TensorType)
            if last is None or last.name != "tensor.index" or source.layout[-1] != 1:
                continue
            f = str(frame.position[op][last["dim"]])
            points = product(op["dims"])
            if f in frame.sizes:
                found[f] = found.get(f, 0.0) + float(points if isinstance(points, int) else 1 << 20) * source.dtype.bytes
    return found


def _gpu_tile(frame: Frame, vector: str, size: Dim) -> TileChoice:
    """Power-of-two tiles of 1024 to 4096 elements; whole rows when they are short enough."""
    extent = size if isinstance(size, int) else 1 << 16
    others = [f for f in frame.sizes if f != vector and (f in frame.inner) != (vector in frame.inner)] if frame.inner else []
    warps = 0
    if vector in frame.inner:
        # Long rows of 16 bits (a vocabulary's logits): 152 us in steps of 8192 by eight warps, 165 in steps of 4096.
        narrow = all(x.bytes <= 2 for x in frame.accesses if vector in free_symbols(x.offset))
        width = min(1 << max(0, (extent - 1).bit_length()), 8192 if extent <= 8192 or narrow else 4096)
        rows, warps = max(1, min(16, 1024 // width)), 8 if extent > 8192 and narrow else 0
    elif frame.inner:
        rows, width, warps = _columns(frame)
        width = min(1 << max(0, (extent - 1).bit_length()), width)
        rows = max(rows, 512 * warps // width)
    else:
        width = min(1 << max(0, (extent - 1).bit_length()), 1024)
        points = product(frame.sizes.values())
        if isinstance(points, int) and points >= 1 << 22 and all(x.bytes <= 2 for x in frame.accesses):
            rows, warps = max(1, 2048 // width), 4  # 32 bytes of each tensor to a thread: more of 16-bit numbers under way (111 us for 120)
        else:
            rows = max(1, 1024 // width)
        others = [f for f in frame.sizes if f != vector]
        across = _transposed(frame, vector)
        if across is not None:  # both ways of walking memory see runs of 64 elements
            return TileChoice(vector, across, (64, 64), 64, 8)
    row = max(others, key=lambda f: (frame.sizes[f] if isinstance(frame.sizes[f], int) else 1 << 16, f), default=None)  # type: ignore[arg-type,return-value]
    if row is not None and isinstance(frame.sizes[row], int):
        rows = min(rows, 1 << max(0, (int(frame.sizes[row]) - 1).bit_length()))  # type: ignore[arg-type]
    return TileChoice(vector, row if rows > 1 else None, (rows if row is not None else 1, width), width, warps)


def _columns(frame: Frame) -> tuple[int, int, int]:
    """(rows, columns, warps) of the tile of a sum of columns, in so many programs that their loads hide each other's wait (BatchNorm's statistics of
    103 MB: 67 us with one program of 32 x 256 to a multiprocessor). As measured: 16 elements to a thread of four warps, of two where there are many
    programs of many rows; for one sum alone, which is nothing but loads, 32. Where there is little to do, as in adding up parts, waiting is all: then
    a program takes few columns, and all of their elements at once."""
    points = product(frame.sizes.values())
    if not isinstance(points, int) or points >= 1 << 18:
        if sum(bool(op["reductions"]) for op in frame.members) == 1:
            return 64, COLUMNS, 4
        rows = product(frame.sizes[f] for f in frame.inner)
        many = isinstance(points, int) and isinstance(rows, int) and (rows >= MANY[0] or rows % 32 == 0) and points // (rows * COLUMNS) >= MANY[1]
        return (16, COLUMNS, 2) if many else (32, COLUMNS, 4)
    longest = max((n for f in frame.inner if isinstance(n := frame.sizes[f], int)), default=1)
    rows = max(64, min(512, 1 << (longest - 1).bit_length()))
    width = max(16, min(32, 8192 // rows))
    return rows, width, max(4, rows * width // 1024)


def _transposed(frame: Frame, vector: str, least: int = 64) -> str | None:
    """Another dimension along which a large access that does not walk `vector` contiguously does so; None if either is short: of fewer than 64,
    or `least` along `vector`."""
    def walks(x: Any, f: str) -> bool:
        linear = split_linear(x.offset, f)
        return linear is not None and linear[0] == 1
    points = [x for x in frame.accesses if not walks(x, vector) and vector in free_symbols(x.offset)]
    for f in frame.sizes:
        long = all(not isinstance(frame.sizes[d], int) or frame.sizes[d] >= (64 if d == f else least) for d in (f, vector))  # type: ignore[operator]
        if f != vector and long and any(walks(x, f) for x in points):
            return f
    return None

# -- what else to measure ----------------------------------------------------------------------------------------------------------


def loop_tiles(frame: Frame, choice: TileChoice) -> list[GpuTile]:
    """Sizes for a kernel that is shaped like `choice`, nearest first (`step` is what a program covers of the second dimension); [] where
    there is nothing to choose."""
    if choice.vector is None:
        return []
    rows, columns = choice.shape
    first = GpuTile(rows, columns, choice.chunk, choice.warps or default_warps(rows * columns), 1)
    inner = choice.vector in frame.inner
    most = [_most(frame.sizes[f]) if f is not None else 1 for f in (_row(frame, choice), choice.vector)]
    found: dict[GpuTile, float] = {}
    for r, c, warps in pairs((1, 2, 4, 8, 16, 32, 64, 128), (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, LARGEST), (1, 2, 4, 8, 16)):
        each = r * c // (32 * warps)  # elements of a thread
        if r > most[0] or c > most[1] or not 4 <= each <= 64 or r * c > LARGEST or (r * c < 512 and (r, c) != choice.shape):
            continue
        if inner and c < most[1] and c < 512:
            continue  # a row in many short steps
        tile = GpuTile(r, c, c if choice.chunk == columns or c > choice.chunk else choice.chunk, warps, 1)
        found[tile] = _distance(tile, first)
    ordered = sorted(found, key=lambda t: (found[t], t.rows, t.columns, t.warps))
    return list(dict.fromkeys([first, *ordered]))


def resized(frame: Frame, choice: TileChoice, tile: GpuTile) -> TileChoice:
    """The choice with another size."""
    row = choice.row or (_row(frame, choice) if tile.rows > 1 else None)
    return replace(choice, row=row, shape=(tile.rows, tile.columns), chunk=tile.step, warps=tile.warps)


def default_warps(elements: int) -> int:
    """Of a program with a tile of so many elements, eight to a thread (as the backend has it)."""
    return max(1, min(16 if elements >= 8192 else 8, elements // 256))


def _most(size: Dim) -> int:
    """The power of two that holds a dimension."""
    return 1 << max(0, (size - 1).bit_length()) if isinstance(size, int) else 1 << 16


def _distance(a: GpuTile, b: GpuTile) -> float:
    """How far apart two tiles are, in doublings; the number of warps counts half."""
    def doublings(x: int, y: int) -> int:
        return abs(x.bit_length() - y.bit_length())
    return doublings(a.rows, b.rows) + doublings(a.columns, b.columns) + 0.5 * doublings(a.warps, b.warps)


def _row(frame: Frame, choice: TileChoice) -> str | None:
    """The dimension that a tile's rows walk: the largest of those that are summed beside an outer vector, or not summed beside an inner one."""
    if choice.row is not None:
        return choice.row
    if frame.inner:
        others = [f for f in frame.sizes if f != choice.vector and (f in frame.inner) != (choice.vector in frame.inner)]
    else:
        others = [f for f in frame.sizes if f != choice.vector]
    return max(others, key=lambda f: (_extent(frame.sizes[f]), f), default=None)


def _extent(size: Dim) -> int:
    return size if isinstance(size, int) else 1 << 16
