"""Which blocks each model part holds.

Entry points: `even_split(layers, parts)`, `best_split(...)` (dynamic programming), `part_blocks(config, plan, split)`.
The embedding joins the first part and the head the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import groupby

import numpy as np

from .model import ModelConfig
from .plan import Plan
from .schedules import SCHEDULES

__all__ = ["MemoryLimit", "PartLayout", "best_split", "even_split", "part_blocks", "part_ranks"]


@dataclass(frozen=True)
class PartLayout:
    """Per part: run-length block kinds, and the pipeline rank that holds it."""

    runs: tuple[tuple[tuple[str, int], ...], ...]
    ranks: tuple[int, ...]


def even_split(layers: int, parts: int) -> tuple[int, ...]:
    """Blocks per part as even as possible; the parts that hold the embedding and the head are the first to get fewer."""
    base, extra = divmod(layers, parts)
    order = [*range(1, parts - 1), 0, parts - 1] if parts > 1 else [0]
    more = set(order[:extra])
    return tuple(base + (i in more) for i in range(parts))


def part_ranks(schedule: str, pp: int, parts: int) -> tuple[int, ...]:
    """The rank of each part (of the downward direction, when there are two)."""
    if SCHEDULES[schedule].placement == "vee":
        return tuple(min(i, parts - 1 - i) for i in range(parts))
    return tuple(i % pp for i in range(parts))


def part_blocks(config: ModelConfig, plan: Plan, split: tuple[int, ...]) -> PartLayout:
    """Lay the model's blocks on parts by `split` (blocks per part, embedding and head not counted)."""
    return _part_blocks(config, plan.schedule, plan.pp, split)


@lru_cache(maxsize=1 << 14)
def _part_blocks(config: ModelConfig, schedule: str, pp: int, split: tuple[int, ...]) -> PartLayout:
    kinds = config.blocks
    runs, start = [], 1
    for i, count in enumerate(split):
        first = 0 if i == 0 else start
        last = start + count + (1 if i == len(split) - 1 else 0)
        runs.append(tuple((kind, len(list(group))) for kind, group in groupby(kinds[first:last])))
        start += count
    return PartLayout(tuple(runs), part_ranks(schedule, pp, len(split)))


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that a part's blocks may take. per_block: bytes of each block if it lies on that part, (parts, blocks);
    capacity: bytes left for blocks on each part.
    """

    per_block: tuple[tuple[float, ...], ...]
    capacity: tuple[float, ...]


def best_split(times: tuple[tuple[float, ...], ...], first: float, last: float,
               limit: MemoryLimit | None = None) -> tuple[int, ...] | None:
    """Blocks per part such that the slowest part is as fast as possible; among those, the most even (least sum of squares).

    times[part][block]: seconds of a block on that part's device, shape (parts, blocks). first and last: seconds of
    embedding and head on the first and last part. Dynamic programming over (part, blocks placed), O(parts * blocks^2).
    Returns None when `limit` admits no split.
    """
    return _best_split(times, first, last, limit)


@lru_cache(maxsize=4096)
def _best_split(times: tuple[tuple[float, ...], ...], first: float, last: float,
                limit: MemoryLimit | None) -> tuple[int, ...] | None:
    parts, blocks = len(times), len(times[0])
    if all(len(set(row)) == 1 for row in set(times)) and (limit is None or all(len(set(r)) == 1 for r in set(limit.per_block))):
        return _split_equal_blocks(times, first, last, limit)
    tables = {row: _segments(row) for row in set(times)}
    segments = [tables[row] for row in times]
    segments[0] = segments[0] + first
    segments[-1] = segments[-1] + last
    if limit is not None:
        held = {row: _segments(row) for row in set(limit.per_block)}
        for p in range(parts):
            segments[p] = np.where(held[limit.per_block[p]] <= limit.capacity[p], segments[p], np.inf)
    slowest = _minimise(segments, blocks, np.maximum)[0][blocks]
    if not np.isfinite(slowest):
        return None
    # Second pass: the most even split whose slowest part is no slower.
    squared = {id(s): np.where(s <= slowest * (1 + 1e-12), s * s, np.inf) for s in segments}
    squares = [squared[id(s)] for s in segments]
    best, choices = _minimise(squares, blocks, np.add)
    split, end = [], blocks
    for choice in reversed(choices):
        start = int(choice[end])
        split.append(end - start)
        end = start
    return tuple(reversed(split)) if np.isfinite(best[blocks]) else None


def _split_equal_blocks(times: tuple[tuple[float, ...], ...], first: float, last: float,
                        limit: MemoryLimit | None) -> tuple[int, ...] | None:
    """All blocks are alike: give the next one to the part that is then least loaded. Exact, because costs are convex."""
    parts = len(times)
    most = [len(times[0])] * parts
    if limit is not None:
        most = [int(c // row[0]) if row[0] > 0 else len(row) for row, c in zip(limit.per_block, limit.capacity, strict=True)]
    load = [(first if p == 0 else 0.0) + (last if p == parts - 1 else 0.0) for p in range(parts)]
    heap = [(load[p] + times[p][0], p) for p in range(parts) if most[p] > 0]
    heapify(heap)
    split = [0] * parts
    for _ in times[0]:
        if not heap:
            return None
        loaded, p = heappop(heap)
        split[p] += 1
        if split[p] < most[p]:
            heappush(heap, (loaded + times[p][0], p))
    return tuple(split)


def _segments(weights: tuple[float, ...]) -> np.ndarray:
    """(j, i) -> sum of weights[i:j]; infinite for j < i. Shape (blocks + 1, blocks + 1)."""
    prefix = np.concatenate([[0.0], np.cumsum(weights)])
    return np.asarray((prefix[:, None] - prefix[None, :]) + _below_diagonal(len(prefix)))


@lru_cache(maxsize=64)
def _below_diagonal(size: int) -> np.ndarray:
    return np.where(np.tri(size, dtype=bool), 0.0, np.inf)


def _minimise(segments: list[np.ndarray], blocks: int, join: np.ufunc) -> tuple[np.ndarray, list[np.ndarray]]:
    """Best cost of placing the first j blocks on the parts so far, and per part the start of its segment."""
    best = np.full(blocks + 1, np.inf)
    best[0] = 0.0
    choices = []
    for table in segments:
        joined = join(best, table)
        choice = joined.argmin(axis=1)
        best = joined[np.arange(blocks + 1), choice]
        choices.append(choice)
    return best, choices
