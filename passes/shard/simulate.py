"""Discrete-event execution of a pipeline schedule: when every operation runs, bubbles, and memory over time.

Entry points: `simulate(schedule, costs)` for a full run, `pipeline_time(...)` for the search (many micro-batches are
extrapolated from the steady state, which is exact once the schedule repeats).

Rules: a rank runs its operations in order, one at a time. F of a stage waits for the same micro-batch's F of the stage
before, B for the B of the stage after and for its own F, W for its B. A result that goes to another rank takes the
boundary's p2p time, one message after the other on each channel (pair of ranks and direction); with `blocking` the sender
waits for the message to leave. A schedule whose order contradicts its dependencies never finishes: that is reported as a
deadlock, naming the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .schedules import Op, Schedule, build_schedule

__all__ = ["Interval", "PipelineCosts", "PipelineRun", "pipeline_time", "simulate"]


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
    """The result. busy, peak_bytes and in_flight are per rank; in_flight counts part-activations alive at the peak."""

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
    return _Run(schedule, costs).run(timeline)


class _Run:
    """State of one simulation: ready times of every (stage, micro-batch) result, clocks of ranks and channels."""

    def __init__(self, schedule: Schedule, costs: PipelineCosts) -> None:
        self.schedule, self.costs = schedule, costs
        stages, m = len(schedule.rank_of), schedule.micro_batches
        self.next_stage = [-1] * stages
        for stage, before in enumerate(schedule.previous):
            if before >= 0:
                self.next_stage[before] = stage
        # Arrival times of inputs: forward_in[stage][micro-batch] and backward_in; None until the producer has run.
        self.forward_in: list[list[float | None]] = [[0.0 if b < 0 else None] * m for b in schedule.previous]
        self.backward_in: list[list[float | None]] = [[None] * m for _ in range(stages)]
        self.channel: dict[tuple[int, int], float] = {}
        self.seconds = self._durations()

    def _durations(self) -> dict[tuple[str, bool], list[float]]:
        """Seconds per (kind, overlapped), indexed by stage."""
        c, s = self.costs, self.schedule
        zero = (0.0,) * s.parts
        hidden_f, hidden_b = c.hidden_forward or zero, c.hidden_backward or zero
        table: dict[tuple[str, bool], Sequence[float]] = {
            ("F", False): c.forward, ("F", True): [f - x for f, x in zip(c.forward, hidden_f, strict=True)],
            ("B", False): c.backward_input, ("B", True): [b - x for b, x in zip(c.backward_input, hidden_b, strict=True)],
            ("W", False): c.backward_weight, ("W", True): c.backward_weight}
        for flag in (False, True):
            table["BW", flag] = [b + w for b, w in zip(table["B", flag], c.backward_weight, strict=True)]
        slow = c.slowdown or (1.0,) * s.ranks
        return {key: [row[part] * slow[rank] for part, rank in zip(s.part_of, s.rank_of, strict=True)]
                for key, row in table.items()}

    def _send(self, source: int, target: int, at: float) -> float:
        """When a message that leaves stage `source` at `at` reaches stage `target`."""
        s, c = self.schedule, self.costs
        a, b = s.rank_of[source], s.rank_of[target]
        if a == b or not c.p2p:
            return at
        seconds = c.p2p[min(s.part_of[source], s.part_of[target])]
        start = max(at, self.channel.get((a, b), 0.0))
        self.channel[a, b] = start + seconds
        return start + seconds

    def run(self, timeline: bool) -> PipelineRun:
        s, blocking = self.schedule, self.costs.blocking
        clock, busy, cursor = [0.0] * s.ranks, [0.0] * s.ranks, [0] * s.ranks
        held, peak = [0.0] * s.ranks, [0.0] * s.ranks
        log: list[list[Interval]] = [[] for _ in range(s.ranks)]
        pending, queued = list(range(s.ranks)), [True] * s.ranks
        while pending:
            rank = pending.pop()
            queued[rank] = False
            ops, now = s.ops[rank], clock[rank]
            while cursor[rank] < len(ops):
                # An overlapped F and the BW after it are one unit: both inputs needed, both results at its end.
                first = ops[cursor[rank]]
                unit = ops[cursor[rank]:cursor[rank] + 2] if first.overlapped and first.kind == "F" else (first,)
                ready = self._ready(unit)
                if ready is None:
                    break
                start = ready if ready > now else now
                for op in unit:
                    began, seconds = now if op is not first else start, self.seconds[op.kind, op.overlapped][op.stage]
                    now = began + seconds
                    busy[rank] += seconds
                    before, after = _deltas(op, self.costs, s)
                    held[rank] += before
                    peak[rank] = max(peak[rank], held[rank])
                    held[rank] += after
                    if timeline:
                        log[rank].append(Interval(op, began, now))
                cursor[rank] += len(unit)
                finished = now
                for op in unit:
                    target, arrival = self._deliver(op, finished)
                    other = s.rank_of[target] if target >= 0 else rank
                    if blocking and other != rank:
                        now = max(now, arrival)
                    if other != rank and not queued[other]:
                        queued[other] = True
                        pending.append(other)
            clock[rank] = now
        stuck = [str(tuple(s.ops[r][cursor[r]])) for r in range(s.ranks) if cursor[r] < len(s.ops[r])]
        if stuck:
            raise RuntimeError(f"schedule {s.name} deadlocks; ranks wait at {', '.join(stuck[:8])}")
        return PipelineRun(max(clock), tuple(busy), tuple(peak), tuple(map(tuple, log)))

    def _ready(self, unit: Sequence[Op]) -> float | None:
        """When all inputs of `unit` are there, or None. A rank's own earlier operations are ordered by its list."""
        latest = 0.0
        for op in unit:
            if op.kind == "W":  # follows its B in the rank's list
                continue
            arrival = (self.forward_in if op.kind == "F" else self.backward_in)[op.stage][op.micro_batch]
            if arrival is None:
                return None
            latest = max(latest, arrival)
        return latest

    def _deliver(self, op: Op, at: float) -> tuple[int, float]:
        """Hand the result to the next stage. Returns it (or -1) and the arrival time."""
        if op.kind == "F":
            target, inbox = self.next_stage[op.stage], self.forward_in
            if target < 0:  # the loss: its gradient is there at once
                self.backward_in[op.stage][op.micro_batch] = at
        elif op.kind in ("B", "BW"):
            target, inbox = self.schedule.previous[op.stage], self.backward_in
        else:
            return -1, at
        if target < 0:
            return -1, at
        arrival = self._send(op.stage, target, at)
        inbox[target][op.micro_batch] = arrival
        return target, arrival


def pipeline_time(name: str, ranks: int, micro_batches: int, interleave: int, costs: PipelineCosts) -> tuple[float,
tuple[float, ...]]:
    """(seconds, peak activation bytes per rank) of a schedule, for the search.

    Beyond a few times the pipeline's depth the schedule repeats every `ranks` micro-batches, so two shorter runs give
    its period and the rest is added. Peak memory is reached before that.
    """
    short = 4 * ranks + micro_batches % ranks
    if micro_batches <= short + 2 * ranks:
        run = simulate(build_schedule(name, ranks, micro_batches, interleave), costs, timeline=False)
        return run.seconds, run.peak_bytes
    first = simulate(build_schedule(name, ranks, short, interleave), costs, timeline=False)
    second = simulate(build_schedule(name, ranks, short + 2 * ranks, interleave), costs, timeline=False)
    if name == "gpipe":  # keeps every micro-batch
        grow = [(b - a) / (2 * ranks) for a, b in zip(first.peak_bytes, second.peak_bytes, strict=True)]
        peak = tuple(b + g * (micro_batches - short - 2 * ranks) for b, g in zip(second.peak_bytes, grow, strict=True))
    else:
        peak = second.peak_bytes
    periods = (micro_batches - short - 2 * ranks) / (2 * ranks)
    return second.seconds + periods * (second.seconds - first.seconds), peak
