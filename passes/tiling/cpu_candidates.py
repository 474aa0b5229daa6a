"""Alternatives to the model's choice of tiles on CPUs: what `mode="max-autotune"` measures (a few), and what `benchmarks/regret.py` does (many).

Each function gives the model's choice first, as what it comes to or, for limits that the model works out itself, as 0; `few` then names
the changes that have been seen to pay, the best guess first, and otherwise all combinations follow. The panels that operands were packed in
fix the columns of a tile: only its rows vary then.
Another tile may sum in another order, so that the last bits of a result change; the same tile always gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from ...ir import Operation, Target
from .cpu_tiles import fits_registers
from .frame import Frame
from .loop_tiles import TileChoice

__all__ = ["CpuTile", "contraction_candidates", "loop_candidates", "stream_candidates"]


@dataclass(frozen=True)
class CpuTile:
    """rows x columns of a register tile, and the limits of what one program works through; 0 stands for the model's.

    In a product: rows of the left operand, steps of K between visits to the sums in memory, columns. In a stream: rows, steps of the stream.
    In a loop: elements of the vector dimension (`block_columns`); its `columns` are the elements of one step, its `rows` those of a pipeline.
    """

    rows: int
    columns: int
    block_rows: int = 0
    block_steps: int = 0
    block_columns: int = 0


def contraction_candidates(op: Operation, tile: tuple[int, int, int], target: Target, *, few: bool = True) -> list[CpuTile]:
    """Of a product whose register tile by the model is `tile`."""
    first = CpuTile(tile[0], tile[1])
    deep = op.attributes.get("_packed") in ("matrices", "pairs")
    most = 14 if target.vector_registers >= 32 else 6
    heights = [r for r in range(2, most + 1) if fits_registers(target, r, tile[1])] if tile[0] > 1 and not deep else []
    if few:
        lower = [r for r in heights if tile[0] // 2 < r < tile[0]]
        return _unique(first, [replace(first, block_columns=4 * tile[1]), replace(first, block_steps=512), replace(first, block_rows=4 * tile[0]),
                               replace(first, block_columns=32 * tile[1]), *(replace(first, rows=r) for r in lower[-1:])])
    return _unique(first, (CpuTile(rows, tile[1], times * rows, steps, across * tile[1]) for rows, times, steps, across in product(
        dict.fromkeys([tile[0], *heights[-2:]]), (0, 4, 12, 40), (0, 256, 512, 2048), (0, 1, 4, 32))))


def stream_candidates(tile: tuple[int, int], fixed: bool, *, few: bool = True) -> list[CpuTile]:
    """Of a stream; `fixed`: an operand is packed in panels of the tile's columns."""
    rows, columns = tile
    first = CpuTile(rows, columns)
    heights = [r for r in (rows - 2, rows - 1) if r > 1]
    if few:
        return _unique(first, [replace(first, block_rows=8 * rows), replace(first, block_steps=8 * columns),
                               CpuTile(rows, columns, 8 * rows, 8 * columns), replace(first, block_rows=2 * rows),
                               replace(first, block_steps=2 * columns)])
    widths = [columns] if fixed else [columns, columns // 2]
    return _unique(first, (CpuTile(r, c, times * r, along * c) for r, c, times, along in product(
        [rows, *heights], widths, (0, 1, 2, 8, 16), (0, 1, 2, 8, 16))))


def loop_candidates(frame: Frame, choice: TileChoice, lanes: int, *, few: bool = True) -> list[CpuTile]:
    """Of a pointwise or reduction group. Where the vector dimension is shorter than a register there is nothing to choose."""
    width = choice.shape[1]
    if choice.vector is None or width < lanes or width % lanes:
        return []
    size, outer = frame.sizes[choice.vector], choice.vector not in frame.inner
    first = CpuTile(choice.rows, width, block_columns=choice.chunk)
    widths = [w for w in (width, 2 * width, width // 2, lanes, 4 * width) if lanes <= w <= 8 * lanes and (not isinstance(size, int) or w < 2 * size)]
    chunks = [choice.chunk] if not outer else [choice.chunk, 4 * choice.chunk, choice.chunk // 4, 16 * choice.chunk]
    if few:
        others = [(w, choice.chunk) for w in widths[1:]] + [(width, c) for c in chunks[1:3]]
    else:
        others = list(product(widths, chunks))
    alone = [CpuTile(1, 4 * lanes, block_columns=choice.chunk)] if choice.rows > 1 else []
    return _unique(first, [*alone, *(CpuTile(choice.rows, w, block_columns=max(w, c // w * w)) for w, c in others)])


def _unique(first: CpuTile, others: Iterable[CpuTile]) -> list[CpuTile]:
    return list(dict.fromkeys([first, *others]))
