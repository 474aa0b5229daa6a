"""Discrete-event execution of a pipeline schedule: when every operation runs, bubbles, and memory over time.

Entry points: `simulate(schedule, costs)` for a full run, `pipeline_time(...)` for the search (many micro-batches are
extrapolated from the steady state, which is exact once the schedule repeats).

Rules: a rank runs its operations in order, one at a time. F of a stage waits for the same micro-batch's F of the stage
before, B for the B of the stage after (the last stage's for its own F); W follows its B in the list. A result that goes
to another rank takes the boundary's p2p time, one message after the other on each channel (two ranks, forward or
backward); with `blocking` the sender waits for the message to arrive.

The order of events does not depend on costs, so it is worked out once per schedule (`_compile`): operations become nodes,
sorted by level such that a level depends on earlier ones only, and a run evaluates a level at a time with numpy. A schedule
whose order contradicts its dependencies has no such sorting: that is reported as a deadlock, naming the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .schedules import Op, Schedule, build_schedule

__all__ = ["Interval", "PipelineCosts", "PipelineRun", "PipelineTime", "alive_counts", "peak_activations", "pipeline_time",
           "simulate"]


@dataclass(frozen=True)
class PipelineCosts:
    """Seconds and bytes per model part (indexed by part) and per boundary between part i and i + 1.

    hidden_*: the share of forward/backward seconds that an overlapped operation does not pay. activation: bytes one
    micro-batch keeps on the part. weight_fraction: the share of them that waits for W when backward is split. slowdown:
    per rank, 1.0 is nominal.
    """

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    activation: tuple[float, ...] = ()
    p2p: tuple[float, ...] = ()
    hidden_forward: tuple[float, ...] = ()
    hidden_backward: tuple[float, ...] = ()
    weight_fraction: float = 0.5
    blocking: bool = False
    slowdown: tuple[float, ...] = ()


@dataclass(frozen=True)
class Interval:
    """An operation and when it ran, in seconds."""

    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class PipelineRun:
    """The result. busy (seconds) and peak_bytes (activations) are per rank."""

    seconds: float
    busy: tuple[float, ...]
    peak_bytes: tuple[float, ...]
    timeline: tuple[tuple[Interval, ...], ...]

    @property
    def bubble(self) -> float:
        """The share of rank-seconds spent waiting."""
        total = self.seconds * len(self.busy)
        return 1.0 - sum(self.busy) / total if total else 0.0

    def memory(self, rank: int, costs: PipelineCosts, schedule: Schedule) -> list[tuple[float, float]]:
        """Activation bytes of `rank` over time as (second, bytes after it)."""
        points, held = [(0.0, 0.0)], 0.0
        for item in self.timeline[rank]:
            before, after = _deltas(item.op, costs, schedule)
            points += [(item.start, held + before), (item.end, held + before + after)]
            held += before + after
        return points


def _deltas(op: Op, costs: PipelineCosts, schedule: Schedule) -> tuple[float, float]:
    """Bytes taken when `op` starts and given back (negative) when it ends."""
    size = costs.activation[schedule.part_of[op.stage]] if costs.activation else 0.0
    after = {"F": 0.0, "BW": -1.0, "B": costs.weight_fraction - 1.0, "W": -costs.weight_fraction}[op.kind]
    return (size if op.kind == "F" else 0.0), after * size


def simulate(schedule: Schedule, costs: PipelineCosts, timeline: bool = True) -> PipelineRun:
    """Run `schedule` under `costs`. Raises ValueError when sizes disagree and RuntimeError on a deadlock."""
    parts = schedule.parts
    for name in ("forward", "backward_input", "backward_weight"):
        if len(getattr(costs, name)) != parts:
            raise ValueError(f"{name} has {len(getattr(costs, name))} entries, the schedule has {parts} parts")
    program = _compile(schedule)
    start, end, free = program.run(costs)
    ops, ranks = program.ops, schedule.ranks
    busy = np.bincount(program.rank, weights=end - start, minlength=ranks)
    log: tuple[tuple[Interval, ...], ...] = ()
    if timeline:
        log = tuple(tuple(_intervals([(ops[n], start[n], end[n]) for n in row], program, costs)) for row in program.by_rank)
    return PipelineRun(float(free.max()), tuple(busy.tolist()), tuple(_peaks(schedule, costs)), log)


@dataclass(frozen=True)
class _Program:
    """A schedule ready to run. Nodes are operations (an overlapped pair is one node) numbered by level.

    Messages have the number 2 * node + slot; the last one is always at time 0. previous: the node before on the rank, the
    last node number for none. needs: two messages per node. after: the message before on the same channel. crosses: the
    message goes to another rank. boundary: the smaller part of the two that a message joins. kinds and stages: rows of
    the duration table and stages of the node's one or two operations.
    """

    ops: tuple[tuple[Op, ...], ...]
    levels: tuple[tuple[int, int], ...]
    rank: np.ndarray
    previous: np.ndarray
    needs: np.ndarray
    after: np.ndarray
    crosses: np.ndarray
    boundary: np.ndarray
    kinds: np.ndarray
    stages: np.ndarray
    by_rank: tuple[tuple[int, ...], ...]
    part_of: np.ndarray
    rank_of: np.ndarray

    def durations(self, costs: PipelineCosts) -> np.ndarray:
        """Seconds per node and term, shape (nodes, 2)."""
        table = _duration_table(costs)
        slow = np.array(costs.slowdown)[self.rank_of] if costs.slowdown else np.ones(len(self.rank_of))
        per_stage = np.concatenate([table[:, self.part_of] * slow, np.zeros((1, len(self.part_of)))])
        return np.asarray(per_stage[self.kinds, self.stages])

    def run(self, costs: PipelineCosts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(start, end, time at which the rank is free again) per node."""
        nodes = len(self.ops)
        seconds = self.durations(costs).sum(axis=1)
        p2p = np.where(self.crosses, np.array(costs.p2p)[self.boundary], 0.0) if costs.p2p else np.zeros((nodes, 2))
        start, end, free = np.zeros(nodes), np.zeros(nodes), np.zeros(nodes + 1)
        arrival = np.zeros(2 * nodes + 2)
        messages = arrival.reshape(-1, 2)
        for a, b in self.levels:
            begin = np.maximum(free[self.previous[a:b]], arrival[self.needs[a:b]].max(axis=1))
            done = begin + seconds[a:b]
            start[a:b], end[a:b] = begin, done
            sent = np.where(self.crosses[a:b], np.maximum(done[:, None], arrival[self.after[a:b]]), done[:, None]) + p2p[a:b]
            messages[a:b] = sent
            free[a:b] = np.where(self.crosses[a:b], sent, done[:, None]).max(axis=1) if costs.blocking else done
        return start, end, free[:-1]


_KINDS = ("F", "B", "W", "BW")


def _duration_table(costs: PipelineCosts) -> np.ndarray:
    """Seconds by (kind, overlapped) in rows 2 * kind + overlapped, and part."""
    forward, backward, weight = (np.array(x) for x in (costs.forward, costs.backward_input, costs.backward_weight))
    ahead = np.array(costs.hidden_forward) if costs.hidden_forward else 0.0
    back = np.array(costs.hidden_backward) if costs.hidden_backward else 0.0
    return np.stack([forward, forward - ahead, backward, backward - back, weight, weight, backward + weight,
                     backward - back + weight])


def _intervals(nodes: Sequence[tuple[tuple[Op, ...], float, float]], program: _Program, costs: PipelineCosts) -> list[Interval]:
    """One interval per operation; the halves of a pair follow each other inside the pair's time."""
    table, slow = _duration_table(costs), costs.slowdown
    found = []
    for ops, start, end in nodes:
        at = float(start)
        for op in ops:
            stage = op.stage
            seconds = table[2 * _KINDS.index(op.kind) + op.overlapped, program.part_of[stage]]
            seconds *= slow[program.rank_of[stage]] if slow else 1.0
            last = op is ops[-1]
            found.append(Interval(op, at, float(end) if last else at + float(seconds)))
            at += float(seconds)
    return found


def _peaks(schedule: Schedule, costs: PipelineCosts) -> list[float]:
    """Activation bytes at every rank's peak: the order of operations alone decides."""
    if not costs.activation:
        return [0.0] * schedule.ranks
    parts, counts = _alive(schedule, costs.weight_fraction)
    size = np.array(costs.activation)[parts]
    peaks: list[float] = (counts * size[:, None, :]).sum(axis=2).max(axis=1).tolist()
    return peaks


@lru_cache(maxsize=128)
def _alive(schedule: Schedule, weight_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(the parts of every rank, shape (ranks, parts per rank); how many micro-batches of each are alive at the moments that may be
    the peak, shape (ranks, moments, parts per rank)). Moments at which no part has more alive than at another are left out.
    """
    change = np.array([0.0, weight_fraction - 1.0, -weight_fraction, -1.0])
    found = []
    for ops in schedule.ops:
        kinds = np.array([_KINDS.index(op.kind) for op in ops])
        parts, local = np.unique(np.array([schedule.part_of[op.stage] for op in ops]), return_inverse=True)
        here = np.eye(len(parts))[local]
        given = change[kinds][:, None] * here
        moments = np.unique(np.cumsum((kinds == 0)[:, None] * here + given, axis=0) - given, axis=0)
        more = moments[None, :, :] - moments[:, None, :]
        beaten = ((more >= -1e-9).all(axis=2) & (more > 1e-9).any(axis=2)).any(axis=1)
        found.append((parts, moments[~beaten]))
    wide, tall = max(len(p) for p, _ in found), max(len(m) for _, m in found)
    part_table, counts = np.zeros((schedule.ranks, wide), dtype=np.int64), np.zeros((schedule.ranks, tall, wide))
    for rank, (parts, most) in enumerate(found):
        part_table[rank, :len(parts)] = parts
        counts[rank, :len(most), :len(parts)] = most
    return part_table, counts


@lru_cache(maxsize=128)
def _compile(schedule: Schedule) -> _Program:
    """Sort the schedule's operations by level. Raises RuntimeError on a deadlock."""
    units = [_units(ops) for ops in schedule.ops]
    first_id = np.concatenate([[0], np.cumsum([len(u) for u in units])]).tolist()
    total = first_id[-1]
    following = {before: stage for stage, before in enumerate(schedule.previous) if before >= 0}
    dummy = 2 * total
    # Messages by who receives them (kind, stage, micro-batch as one number), known once their sender has been placed.
    many, stages = schedule.micro_batches, len(schedule.rank_of)
    inbox = [-1] * (2 * stages * many)
    level = [0] * (total + 1)
    previous, needs = [total] * total, [(dummy, dummy)] * total
    after, crosses, boundary = [dummy] * (2 * total), [False] * (2 * total), [0] * (2 * total)
    channel: dict[tuple[int, int, bool], int] = {}
    cursor, pending, queued = [0] * schedule.ranks, list(range(schedule.ranks)), [True] * schedule.ranks
    rank_of, part_of, before = schedule.rank_of, schedule.part_of, schedule.previous
    while pending:
        rank = pending.pop()
        queued[rank] = False
        row, base = units[rank], first_id[rank]
        while cursor[rank] < len(row):
            unit, node = row[cursor[rank]], base + cursor[rank]
            wanted, ready = [dummy, dummy], True
            for slot, op in enumerate(unit):
                kind, stage = op[0], op[1]
                if kind != "W" and (kind != "F" or before[stage] >= 0):
                    wanted[slot] = inbox[((kind != "F") * stages + stage) * many + op[2]]
                    ready = ready and wanted[slot] >= 0
            if not ready:
                break
            needs[node] = (wanted[0], wanted[1])
            if cursor[rank]:
                previous[node] = node - 1
            level[node] = 1 + max(level[previous[node]], level[wanted[0] >> 1], level[wanted[1] >> 1])
            cursor[rank] += 1
            for slot, op in enumerate(unit):
                kind, stage = op[0], op[1]
                if kind == "W" or (kind != "F" and before[stage] < 0):
                    continue
                # The last stage's F is its own backward's input (the loss).
                forward = kind == "F" and stage in following
                target = following[stage] if forward else stage if kind == "F" else before[stage]
                message = 2 * node + slot
                inbox[((not forward) * stages + target) * many + op[2]] = message
                other = rank_of[target]
                if other != rank:
                    lane = (rank, other, forward)
                    after[message], channel[lane] = channel.get(lane, dummy), message
                    crosses[message] = True
                    boundary[message] = min(part_of[stage], part_of[target])
                    if not queued[other]:
                        queued[other] = True
                        pending.append(other)
    stuck = [str(tuple(units[r][cursor[r]][0])) for r in range(schedule.ranks) if cursor[r] < len(units[r])]
    if stuck:
        raise RuntimeError(f"schedule {schedule.name} deadlocks; ranks wait at {', '.join(stuck[:8])}")
    flat = [unit for row in units for unit in row]
    order = np.argsort(np.array(level[:total]), kind="stable")
    new = np.empty(total + 1, dtype=np.int64)
    new[order], new[total] = np.arange(total), total
    renamed = np.concatenate([np.stack([2 * new[:total], 2 * new[:total] + 1], axis=1).ravel(), [dummy]])
    sizes = np.bincount(np.array(level[:total]))[1:]
    ends = np.cumsum(sizes)
    code = {(kind, beside): 2 * i + beside for i, kind in enumerate(_KINDS) for beside in (False, True)}
    kinds = np.array([(code[u[0][0], u[0][3]], code[u[1][0], u[1][3]] if len(u) == 2 else 8) for u in flat])
    return _Program(
        ops=tuple(flat[n] for n in order), levels=tuple(zip((ends - sizes).tolist(), ends.tolist(), strict=True)),
        rank=np.repeat(np.arange(schedule.ranks), [len(u) for u in units])[order], previous=new[np.array(previous)][order],
        needs=renamed[np.array(needs)][order], after=renamed[np.array(after).reshape(-1, 2)][order], crosses=np.array(crosses).reshape(-1, 2)[order],
        boundary=np.array(boundary).reshape(-1, 2)[order], kinds=kinds[order],
        stages=np.array([(u[0][1], u[-1][1]) for u in flat])[order],
        by_rank=tuple(tuple(new[first_id[r]:first_id[r + 1]].tolist()) for r in range(schedule.ranks)),
        part_of=np.array(schedule.part_of), rank_of=np.array(schedule.rank_of))


def _units(ops: Sequence[Op]) -> list[tuple[Op, ...]]:
    """Operations with every overlapped F joined to the BW after it."""
    units: list[tuple[Op, ...]] = []
    for op in ops:
        if op.kind == "BW" and op.overlapped and units and units[-1][-1].kind == "F" and units[-1][-1].overlapped:
            units[-1] = (units[-1][0], op)
        else:
            units.append((op,))
    return units


@dataclass(frozen=True)
class PipelineTime:
    """What the search keeps of a run: seconds, mean busy seconds of a rank, peak activation bytes per rank."""

    seconds: float
    busy: float
    peak_bytes: tuple[float, ...]


def pipeline_time(name: str, ranks: int, micro_batches: int, interleave: int, costs: PipelineCosts) -> PipelineTime:
    """A run of a schedule, for the search.

    Beyond a few times the pipeline's depth the schedule repeats every `ranks` micro-batches, so two shorter runs give its
    period and the rest is added. Peak memory is reached before that.
    """

    def run(m: int) -> PipelineTime:
        done = simulate(build_schedule(name, ranks, m, interleave), costs, timeline=False)
        return PipelineTime(done.seconds, sum(done.busy) / ranks, done.peak_bytes)

    short = _short(ranks, micro_batches)
    if micro_batches <= short + 2 * ranks:
        return run(micro_batches)
    first, second = run(short), run(short + 2 * ranks)
    periods = (micro_batches - short - 2 * ranks) / (2 * ranks)
    peak = second.peak_bytes
    if name == "gpipe":  # keeps every micro-batch
        peak = tuple(b + (b - a) * periods for a, b in zip(first.peak_bytes, second.peak_bytes, strict=True))
    return PipelineTime(second.seconds + periods * (second.seconds - first.seconds),
                        second.busy + periods * (second.busy - first.busy), peak)


def _short(ranks: int, micro_batches: int) -> int:
    """Micro-batches after which a schedule repeats, with the same remainder over ranks."""
    return 4 * ranks + micro_batches % ranks


def peak_activations(name: str, ranks: int, micro_batches: int, interleave: int, costs: PipelineCosts) -> tuple[float, ...]:
    """Activation bytes at every rank's peak, without running: the order of operations alone decides."""
    few = micro_batches if name == "gpipe" else min(micro_batches, _short(ranks, micro_batches))
    return tuple(_peaks(build_schedule(name, ranks, few, interleave), costs))


@lru_cache(maxsize=1024)
def alive_counts(name: str, ranks: int, micro_batches: int, interleave: int) -> np.ndarray:
    """Per rank, micro-batches alive at the peak of the part that has fewest: at least so many times a block's activations are kept
    for every block of the rank, however the rank's blocks lie on its parts. Shape (ranks,).
    """
    few = micro_batches if name == "gpipe" else min(micro_batches, _short(ranks, micro_batches))
    schedule = build_schedule(name, ranks, few, interleave)
    parts, counts = _alive(schedule, PipelineCosts((), (), ()).weight_fraction)
    width = len(set(parts[0].tolist()))
    return np.asarray(counts[:, :, :width].min(axis=2).max(axis=1))
