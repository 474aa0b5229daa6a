"""Offsets for blocks with known lifetimes, in as little memory as possible (dynamic storage allocation, NP-hard).

    fit([Block(size=64, start=0, end=3), ...], effort=200).offsets

Best fit places the blocks one after the other, each into the tightest hole among the placed blocks that live at the same time
(lowest offset if no hole suits). The order decides the quality: by size (Pisarchyk and Lee 2020, "greedy by size"), by area, by
lifetime; then hill climbing swaps orders (deterministic) while the result is above the lower bound and tries are left.
Few blocks are also searched exactly: some order of lowest-fit placement is always optimal, so orders are enumerated
depth-first and cut off by the best size so far.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "Fit", "fit", "peak"]

EXACT_BLOCKS = 9
EXACT_STEPS = 50_000


@dataclass(frozen=True)
class Block:
    """`size` units, alive from time `start` to time `end`, both inclusive."""

    size: int
    start: int
    end: int


@dataclass(frozen=True)
class Fit:
    """One offset per block, the total size, and the largest live size at any time (no fit can be smaller)."""

    offsets: tuple[int, ...]
    size: int
    lower_bound: int


def peak(blocks: Sequence[Block]) -> int:
    """The largest sum of sizes alive at one time."""
    events = sorted([(b.start, 1, b.size) for b in blocks] + [(b.end + 1, 0, -b.size) for b in blocks])
    live = most = 0
    for _, _, change in events:
        live += change
        most = max(most, live)
    return most


def fit(blocks: Sequence[Block], effort: int = 200) -> Fit:
    """The best placement found; at least as good as greedy-by-size best fit."""
    bound = peak(blocks)
    overlaps = _overlaps(blocks)
    n = len(blocks)

    def length(i: int) -> int:
        return blocks[i].end - blocks[i].start + 1

    orders = [sorted(range(n), key=key) for key in (
        lambda i: (-blocks[i].size, -length(i), i), lambda i: (-blocks[i].size * length(i), i),
        lambda i: (-length(i), -blocks[i].size, i),
        lambda i: (blocks[i].start, -blocks[i].size, i), lambda i: (-len(overlaps[i]), -blocks[i].size, i))]
    best_order, best, best_size = orders[0], [0] * n, -1
    for order in orders:
        offsets = _place(blocks, overlaps, order)
        size = _extent(blocks, offsets)
        if best_size < 0 or size < best_size:
            best_order, best, best_size = order, offsets, size
        if best_size == bound:
            break
    if best_size > bound and n <= EXACT_BLOCKS:
        found = _exact(blocks, overlaps, best_size, bound)
        if found is not None:
            best, best_size = found, _extent(blocks, found)
    elif best_size > bound:
        best, best_size = _climb(blocks, overlaps, best_order, best, best_size, bound, effort)
    return Fit(tuple(best), best_size, bound)


def _overlaps(blocks: Sequence[Block]) -> list[list[int]]:
    """For each block, the others that are alive at the same time."""
    found: list[list[int]] = [[] for _ in blocks]
    live: list[int] = []
    for i in sorted(range(len(blocks)), key=lambda i: blocks[i].start):
        live = [j for j in live if blocks[j].end >= blocks[i].start]
        for j in live:
            found[i].append(j)
            found[j].append(i)
        live.append(i)
    return found


def _extent(blocks: Sequence[Block], offsets: Sequence[int]) -> int:
    return max((o + b.size for o, b in zip(offsets, blocks, strict=True)), default=0)


def _place(blocks: Sequence[Block], overlaps: Sequence[Sequence[int]], order: Sequence[int]) -> list[int]:
    """Best fit: the smallest hole that takes the block, else the end of what is there."""
    offsets = [-1] * len(blocks)
    for i in order:
        size = blocks[i].size
        placed = sorted((offsets[j], offsets[j] + blocks[j].size) for j in overlaps[i] if offsets[j] >= 0)
        at, tightest, top = -1, -1, 0
        for low, high in placed:
            hole = low - top
            if hole >= size and (tightest < 0 or hole < tightest):
                at, tightest = top, hole
            top = max(top, high)
        offsets[i] = at if at >= 0 else top
    return offsets


def _climb(blocks: Sequence[Block], overlaps: Sequence[Sequence[int]], order: list[int], offsets: list[int], size: int,
           bound: int,
           effort: int) -> tuple[list[int], int]:
    """Moves a block that reaches the top forward in the order, or swaps two at random; keeps what is not worse."""
    choose = random.Random(len(blocks))
    budget = min(effort, max(1, 2_000_000 // max(1, sum(map(len, overlaps)) + len(blocks))))
    best, best_size = offsets, size
    for _ in range(budget):
        if best_size == bound:
            break
        trial = list(order)
        tops = [k for k, i in enumerate(trial) if offsets[i] + blocks[i].size == size]
        if tops and choose.random() < 0.7:
            k = choose.choice(tops)
            trial.insert(choose.randrange(k + 1), trial.pop(k))
        else:
            a, b = choose.randrange(len(trial)), choose.randrange(len(trial))
            trial[a], trial[b] = trial[b], trial[a]
        placed = _place(blocks, overlaps, trial)
        reached = _extent(blocks, placed)
        if reached <= size:
            order, offsets, size = trial, placed, reached
            if size < best_size:
                best, best_size = placed, size
    return best, best_size


def _exact(blocks: Sequence[Block], overlaps: Sequence[Sequence[int]], above: int, bound: int) -> list[int] | None:
    """An optimal placement smaller than `above`, or None if there is none (or the step limit was reached first).

    In an optimal placement all blocks can be pushed down until each rests on 0 or on another; placing blocks by ascending
    offset, each at the lowest place above those below it, finds it. So it is enough to enumerate orders of non-decreasing
    offset.
    """
    n = len(blocks)
    offsets = [-1] * n
    best: list[int] | None = None
    best_size, steps = above, 0

    def place(count: int, floor: int, size: int) -> None:
        nonlocal best, best_size, steps
        if count == n:
            best, best_size = list(offsets), size
            return
        for i in range(n):
            if offsets[i] >= 0 or best_size == bound:
                continue
            steps += 1
            if steps > EXACT_STEPS:
                return
            at = max((offsets[j] + blocks[j].size for j in overlaps[i] if offsets[j] >= 0), default=0)
            top = max(size, at + blocks[i].size)
            if at < floor or top >= best_size:
                continue
            offsets[i] = at
            place(count + 1, at, top)
            offsets[i] = -1

    place(0, 0, 0)
    return best
