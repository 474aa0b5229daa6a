"""What the shape of a pointwise or reduction kernel is, once it is chosen."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TileChoice"]


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
    side: int = 1           # of those, how many each pass takes side by side
    unroll: int = 1         # steps of a loop on a GPU whose loads are under way at a time; 1: as LLVM guesses
