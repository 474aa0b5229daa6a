"""Pipeline schedules as explicit per-rank lists of operations.

Entry point: `build_schedule(name, ranks, micro_batches, interleave)`. The lists say only the order on each rank; when
each operation runs follows from costs and dependencies in `simulator.py`, and so do bubbles and peak memory.

A schedule has stages (a contiguous part of the model at a place). Usually stage i holds part i. DualPipe keeps two
copies of the model that run in opposite directions, so it has two stages per part. Stage i takes its input from
`previous[i]` (-1: the data).

Operations: F forward, B backward for the input only, W backward for the weights only, BW both in one. An `overlapped` F
and the overlapped BW after it are one unit (DualPipe): they start together, end together, and hide each other's
communication.

Sources: GPipe (Huang 2019), 1F1B (PipeDream-flush, Narayanan 2021), interleaved 1F1B (Narayanan SC'21), ZB-H1 (Qi 2023,
"Zero Bubble Pipeline Parallelism"), ZB-V (Qi 2024), DualPipe and DualPipeV (DeepSeek-V3 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

__all__ = ["SCHEDULES", "Op", "Schedule", "ScheduleTraits", "build_schedule", "schedule_problem"]


class Op(NamedTuple):
    """One operation: kind (F, B, W, BW), stage, micro-batch, and whether it is half of an overlapped pair."""

    kind: str
    stage: int
    micro_batch: int
    overlapped: bool = False


@dataclass(frozen=True)
class Schedule:
    """Operations per rank. rank_of, part_of and previous are indexed by stage."""

    name: str
    ranks: int
    micro_batches: int
    parts: int
    rank_of: tuple[int, ...]
    part_of: tuple[int, ...]
    previous: tuple[int, ...]
    ops: tuple[tuple[Op, ...], ...]


@dataclass(frozen=True)
class ScheduleTraits:
    """What a schedule needs: parts per rank (0: the caller's interleave), copies of the parameters, and whether
    it splits backward.
    """

    parts_per_rank: int
    copies: int
    splits_backward: bool
    build: Callable[[int, int, int], list[list[Op]]]
    placement: str  # loop: stage i on rank i mod p; vee: down and up again; both: two directions


def _gpipe(p: int, m: int, _v: int) -> list[list[Op]]:
    return [[Op("F", r, i) for i in range(m)] + [Op("BW", r, i) for i in range(m)] for r in range(p)]


def _one_f_one_b(p: int, m: int, _v: int) -> list[list[Op]]:
    lists = []
    for r in range(p):
        warm = min(p - 1 - r, m)
        ops = [Op("F", r, i) for i in range(warm)]
        for i in range(m - warm):
            ops += [Op("F", r, warm + i), Op("BW", r, i)]
        lists.append(ops + [Op("BW", r, i) for i in range(m - warm, m)])
    return lists


def _interleaved(p: int, m: int, v: int) -> list[list[Op]]:
    """Megatron's order: micro-batches go in groups of p through chunk 0, then the same group through chunk 1, and so on."""
    total = m * v

    def step(k: int, forward: bool) -> tuple[int, int]:
        """(chunk, micro-batch) of the k-th forward or backward on any rank."""
        group, inside = divmod(k, p * v)
        chunk = inside // p
        return (chunk if forward else v - 1 - chunk), group * p + inside % p

    lists = []
    for r in range(p):
        warm = min((p - r - 1) * 2 + (v - 1) * p, total)
        ops = []
        for k in range(total + warm):
            if k < total:
                chunk, i = step(k, True)
                ops.append(Op("F", chunk * p + r, i))
            if k >= warm:
                chunk, i = step(k - warm, False)
                ops.append(Op("BW", chunk * p + r, i))
        lists.append(ops)
    return lists


def _zb_h1(p: int, m: int, _v: int) -> list[list[Op]]:
    """1F1B with W put off: rank r starts W only after r further B, so that B goes up the pipeline sooner and W fills the
    tail.

    Every rank then keeps at most p micro-batches alive between F and W, as rank 0 does under 1F1B.
    """
    lists = []
    for r in range(p):
        warm, delay = min(p - 1 - r, m), r
        ops = [Op("F", r, i) for i in range(warm)]
        for i in range(m):
            if warm + i < m:
                ops.append(Op("F", r, warm + i))
            ops.append(Op("B", r, i))
            if i >= delay and warm + i < m:
                ops.append(Op("W", r, i - delay))
            elif warm + i >= m:
                # Cool-down: each B is followed by a W as long as some are left, which fills the wait for the next B.
                done = sum(o.kind == "W" for o in ops)
                if done <= i:
                    ops.append(Op("W", r, done))
        done = sum(o.kind == "W" for o in ops)
        lists.append(ops + [Op("W", r, i) for i in range(done, m)])
    return lists


class _Writer:
    """Writes operations of one rank with a counter per (kind, chunk), and remembers which W are owed, oldest first."""

    def __init__(self, stages: tuple[int, int], micro_batch_of: Callable[[int, int], int]) -> None:
        self.ops: list[Op] = []
        self.stages, self.micro_batch_of = stages, micro_batch_of
        self.count: dict[tuple[str, int], int] = {}
        self.owed: list[tuple[int, int]] = []

    def write(self, kind: str, chunk: int, overlapped: bool = False) -> None:
        key = ("F" if kind == "F" else "B", chunk)
        i = self.count.get(key, 0)
        self.count[key] = i + 1
        self.ops.append(Op(kind, self.stages[chunk], self.micro_batch_of(chunk, i), overlapped))
        if kind == "B":
            self.owed.append((chunk, i))

    def weight(self) -> None:
        """The oldest W that is owed; nothing when none is."""
        if self.owed:
            chunk, i = self.owed.pop(0)
            self.ops.append(Op("W", self.stages[chunk], self.micro_batch_of(chunk, i)))

    def done(self, kind: str, chunk: int) -> int:
        return self.count.get((kind, chunk), 0)


def _zb_v(p: int, m: int, _v: int) -> list[list[Op]]:
    """The V schedule of Qi 2024: rank r holds stages r and 2p-1-r; W follows its B at once but in warm-down."""
    lists = []
    for r in range(p):
        w = _Writer((r, 2 * p - 1 - r), lambda _chunk, i: i)
        for _ in range(2 * (p - r) - 1):
            w.write("F", 0)
        for _ in range(r):
            w.write("F", 1)
            w.write("F", 0)
        for _ in range(p - r):
            w.write("F", 1)
            w.write("B", 1)
            w.weight()
        while w.done("F", 1) < m or w.done("F", 0) < m:
            if w.done("F", 0) < m:
                w.write("F", 0)
            w.write("B", 0)
            w.weight()
            w.write("F", 1)
            w.write("B", 1)
            w.weight()
        for _ in range(r):
            w.write("B", 0)
            w.write("B", 1)
        for _ in range(p - r):
            w.write("B", 0)
            w.weight()
        while w.owed:
            w.weight()
        lists.append(w.ops)
    return lists


def _dual_steps(w: _Writer, r: int, half: int, m: int) -> list[Op]:
    """The eight steps of DualPipe on a rank at distance r from its end of `half` ranks; m micro-batches per chunk."""
    for _ in range((half - r - 1) * 2):
        w.write("F", 0)
    for _ in range(r + 1):
        w.write("F", 0)
        w.write("F", 1)
    for _ in range(half - r - 1):
        w.write("B", 1)
        w.weight()
        w.write("F", 1)
    for i in range(m - 2 * half + r + 1):
        # The first pair of the rank where the directions meet runs one after the other, which shortens the bubble.
        beside = not (i == 0 and r == half - 1)
        w.write("F", 0, beside)
        w.write("BW", 1, beside)
        w.write("F", 1, True)
        w.write("BW", 0, True)
    for _ in range(half - r - 1):
        w.write("BW", 1)
        w.write("F", 1, True)
        w.write("BW", 0, True)
    split = False
    for i in range(r + 1):
        split = split or (i == (r + 1) // 2 and r % 2 == 1)
        w.write("B" if split else "BW", 1)
        split = split or (i == (r + 1) // 2 and r % 2 == 0)
        w.write("B" if split else "BW", 0)
    for _ in range(half - r - 1):
        w.weight()
        w.write("B", 0)
    while w.owed:
        w.weight()
    return w.ops


def _dualpipe_v(p: int, m: int, _v: int) -> list[list[Op]]:
    return [_dual_steps(_Writer((r, 2 * p - 1 - r), lambda _chunk, i: i), r, p, m) for r in range(p)]


def _dualpipe(p: int, m: int, _v: int) -> list[list[Op]]:
    """Two directions.

    Stage s < p runs down the ranks on even micro-batches, stage p + s (part s on rank p-1-s) on odd ones.
    """
    lists = []
    for r in range(p):
        lower = r >= p // 2
        down, up = r, p + (p - 1 - r)
        near, far = (up, down) if lower else (down, up)

        def micro_batch(chunk: int, i: int, lower: bool = lower) -> int:
            return 2 * i + (1 if (chunk == 0) == lower else 0)

        lists.append(_dual_steps(_Writer((near, far), micro_batch), min(r, p - 1 - r), p // 2, m // 2))
    return lists


SCHEDULES: dict[str, ScheduleTraits] = {
    "gpipe": ScheduleTraits(1, 1, False, _gpipe, "loop"),
    "1f1b": ScheduleTraits(1, 1, False, _one_f_one_b, "loop"),
    "interleaved": ScheduleTraits(0, 1, False, _interleaved, "loop"),
    "zb-h1": ScheduleTraits(1, 1, True, _zb_h1, "loop"),
    "zb-v": ScheduleTraits(2, 1, True, _zb_v, "vee"),
    "dualpipe-v": ScheduleTraits(2, 1, True, _dualpipe_v, "vee"),
    "dualpipe": ScheduleTraits(1, 2, True, _dualpipe, "both"),
}


def schedule_problem(name: str, ranks: int, micro_batches: int, interleave: int = 1) -> str | None:
    """Why this schedule cannot be built with these numbers, or None."""
    if name not in SCHEDULES:
        return f"schedule '{name}' is unknown; allowed: {', '.join(SCHEDULES)}"
    if ranks < 1 or micro_batches < 1 or interleave < 1:
        return "ranks, micro-batches and interleave must be at least 1"
    if name != "interleaved" and interleave != 1:
        return f"{name} takes no interleave (got {interleave})"
    rules = {
        "interleaved": (interleave > 1 and ranks > 1 and micro_batches % ranks == 0,
                        f"interleaved needs interleave > 1 and micro-batches in multiples of the {ranks} ranks"),
        "zb-v": (micro_batches >= 2 * ranks - 1, f"zb-v needs at least {2 * ranks - 1} micro-batches"),
        "dualpipe-v": (micro_batches >= 2 * ranks, f"dualpipe-v needs at least {2 * ranks} micro-batches"),
        "dualpipe": (ranks % 2 == 0 and micro_batches % 2 == 0 and micro_batches >= 2 * ranks,
                     f"dualpipe needs even ranks and an even number of at least {2 * ranks} micro-batches"),
    }
    fine, message = rules.get(name, (True, ""))
    return None if fine else f"{message} (got {micro_batches} micro-batches, interleave {interleave})"


@lru_cache(maxsize=256)
def build_schedule(name: str, ranks: int, micro_batches: int, interleave: int = 1) -> Schedule:
    """The schedule's operations per rank. Raises ValueError with `schedule_problem`'s reason when it does not exist."""
    problem = schedule_problem(name, ranks, micro_batches, interleave)
    if problem:
        raise ValueError(problem)
    traits = SCHEDULES[name]
    parts = ranks * (traits.parts_per_rank or interleave)
    ops = tuple(tuple(o) for o in traits.build(ranks, micro_batches, interleave))
    if traits.placement == "both":
        down = tuple(range(ranks))
        return Schedule(name, ranks, micro_batches, parts, down + down[::-1], down + down,
                        tuple(s - 1 if s not in (0, ranks) else -1 for s in range(2 * ranks)), ops)
    rank_of = tuple(s % ranks if traits.placement == "loop" else min(s, parts - 1 - s) for s in range(parts))
    return Schedule(name, ranks, micro_batches, parts, rank_of, tuple(range(parts)), tuple(range(-1, parts - 1)), ops)
