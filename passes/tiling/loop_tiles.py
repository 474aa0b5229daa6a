"""The tile of a pointwise or reduction kernel: which dimensions it spans, and how large it is.

    choice = choose_tile(frame, lanes, gpu=True)                # analytic
    tiles = loop_tiles(frame, choice)                           # GPUs: what else is worth measuring, the model's choice first
    choice = resized(frame, choice, tiles[3])                   # the choice with another size

The dimension along which most bytes are contiguous is the tile's second one; the size follows from what has to be in flight at a time.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product as pairs

from ...ir import Dim, Target, TensorType
from ...ir.expr import product
from ...ir.ranges import split_linear
from .frame import Frame
from .gpu_loop_tiles import gpu_tile, transposed
from .gpu_tiles import GpuTile
from .tile_choice import TileChoice

__all__ = ["choose_tile", "loop_tiles", "resized"]

LINE_ELEMENTS = 16
"""Of 4 bytes in a cache line."""
PANEL = 64
"""Most columns of a product's packed operand."""
LARGEST = 32768
"""Elements of a tile: 64 registers of each thread of 16 warps for one value."""


def choose_tile(frame: Frame, lanes: int, *, gpu: bool, target: Target | None = None) -> TileChoice:
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
        return gpu_tile(frame, vector, target)
    panel = isinstance(size, int) and size % LINE_ELEMENTS == 0  # of a product's packed operand: whole lines
    across = None if frame.inner else transposed(frame, vector, LINE_ELEMENTS if panel else 64)
    if across is not None and not (isinstance(size, int) and size < LINE_ELEMENTS):
        # Whole lines of what is read along the other dimension are used while they are in the first cache, where a row of lines would not stay.
        columns = max(lanes, LINE_ELEMENTS)  # lines of what is written are whole too
        # Along a short dimension, the columns of a panel, programs read as many streams of lines as a tile has rows: more are not foreseen.
        short = isinstance(size, int) and size <= PANEL
        return TileChoice(vector, across, (LINE_ELEMENTS, columns), columns if short else max(columns, 256 // columns * columns))
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


# -- what else to measure ----------------------------------------------------------------------------------------------------------


def loop_tiles(frame: Frame, choice: TileChoice) -> list[GpuTile]:
    """Sizes for a kernel that is shaped like `choice`, nearest first (`step` is what a program covers of the second dimension); [] where
    there is nothing to choose."""
    if choice.vector is None:
        return []
    rows, columns = choice.shape
    first = GpuTile(rows, columns, choice.chunk, choice.warps or default_warps(rows * columns), choice.unroll)
    inner = choice.vector in frame.inner
    most = [_most(frame.sizes[f]) if f is not None else 1 for f in (_row(frame, choice), choice.vector)]
    found: dict[GpuTile, float] = {}
    for r, c, warps in pairs((1, 2, 4, 8, 16, 32, 64, 128), (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, LARGEST), (1, 2, 4, 8, 16)):
        each = r * c // (32 * warps)  # elements of a thread
        if r > most[0] or c > most[1] or not 4 <= each <= 64 or r * c > LARGEST or (r * c < 512 and (r, c) != choice.shape):
            continue
        if inner and c < most[1] and c < 512:
            continue  # a row in many short steps
        tile = GpuTile(r, c, c if choice.chunk == columns or c > choice.chunk else choice.chunk, warps, choice.unroll)
        found[tile] = _distance(tile, first)
    if inner and columns < most[1] or len(frame.inner) > 1:
        for steps in (1, 2, 4):
            tile = replace(first, stages=steps)
            found[tile] = _distance(tile, first)
    ordered = sorted(found, key=lambda t: (found[t], t.rows, t.columns, t.warps))
    return list(dict.fromkeys([first, *ordered]))


def resized(frame: Frame, choice: TileChoice, tile: GpuTile) -> TileChoice:
    """The choice with another size."""
    row = choice.row or (_row(frame, choice) if tile.rows > 1 else None)
    return replace(choice, row=row, shape=(tile.rows, tile.columns), chunk=tile.step, warps=tile.warps, unroll=tile.stages)


def default_warps(elements: int) -> int:
    """Of a program with a tile of so many elements, eight to a thread (as the backend has it)."""
    return max(1, min(16 if elements >= 8192 else 8, elements // 256))


def _most(size: Dim) -> int:
    """The power of two that holds a dimension."""
    return 1 << max(0, (size - 1).bit_length()) if isinstance(size, int) else 1 << 16


def _distance(a: GpuTile, b: GpuTile) -> float:
    """How far apart two tiles are, in doublings; numbers of warps and of steps under way count half."""
    def doublings(x: int, y: int) -> int:
        return abs(x.bit_length() - y.bit_length())
    return doublings(a.rows, b.rows) + doublings(a.columns, b.columns) + 0.5 * (doublings(a.warps, b.warps) + doublings(a.stages, b.stages))


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
