"""Where the time of a compiled graph goes on a GPU: every kernel, library call, copy and operator call by CUDA events.

    graph.profile = Profile()         # a `CudaGraph`
    graph(*args); graph(*args)        # run step by step, without CUDA graphs
    for line in graph.profile.table(): print(line)

Before each call the device is kept busy for as long as the host needed for the call before, so that everything is in the queue when the first step
begins: times are the device's, in the order and with the cache contents of a real call. What two marks with nothing in between
measure is taken off each step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .segments import Segments
from .sizes import compile_size

if TYPE_CHECKING:
    from .cuda import CudaFunction
    from .cuda_graph import CudaGraph

__all__ = ["Clock", "EventClock", "Profile", "StepTime"]

EMPTY_MARKS = 8
CYCLES_PER_SECOND = 2e9
"""Of a device; faster ones wait a little less."""


class Clock(Protocol):
    """Takes the time on a device between marks in its queue."""

    def hold(self, seconds: float) -> None: ...
    def mark(self) -> None: ...
    def intervals(self) -> list[float]: ...


class EventClock:
    """By CUDA events on the current stream."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def hold(self, seconds: float) -> None:
        """Lets the device do nothing for about this long."""
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def intervals(self) -> list[float]:
        """Microseconds between marks; forgets them."""
        torch.cuda.synchronize()
        events, self._events = self._events, []
        return [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]


@dataclass(frozen=True)
class StepTime:
    """All steps of one name: how often they run per call, and their microseconds per call (median over calls). `line` is where the first of them
    comes from."""

    name: str
    kind: str
    count: int
    microseconds: float
    line: str


@dataclass
class Profile:
    """The times of all calls so far: `calls[i][j]` microseconds of step j of call i, `steps[j]` its (kind, name, line)."""

    clock: Clock = field(default_factory=EventClock)
    graph: str = ""
    steps: list[tuple[str, str, str]] = field(default_factory=list)
    calls: list[list[float]] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    """Seconds that the host needed for each call."""

    def run(self, graph: CudaGraph, args: Sequence[Any]) -> list[Any]:
        """A call of `graph`, measured. The first one is not counted: libraries load their kernels in it."""
        self.graph = graph.name
        first = not self.host
        self.steps = []
        segments = Segments(graph.manifest["steps"], lambda name: self._stepwise(graph.cuda.function(name)), graph.manifest["constants"],
                            graph._positions, graph.manifest["inputs"], graph._specs, graph.device, around_extern=self._around_extern)
        self.clock.hold(2 * self.host[-1] if self.host else 0.0)
        start = time.perf_counter()
        for _ in range(EMPTY_MARKS):
            self.clock.mark()
        outputs = graph._run_steps(args, segments)
        self.host.append(time.perf_counter() - start)
        found = self.clock.intervals()
        nothing = min(found[:EMPTY_MARKS - 1])
        # From the last empty mark on: a step, then what the host program does between two steps, and so on.
        times = [max(0.0, t - nothing) for t in found[EMPTY_MARKS:][::2]]
        if not first:
            self.calls.append(times)
        return outputs

    def _step(self, kind: str, name: str, line: str, run: Callable[[], Any]) -> Any:
        self.steps.append((kind, name, line))
        self.clock.mark()
        result = run()
        self.clock.mark()
        return result

    def _stepwise(self, function: CudaFunction) -> Callable[[int, int], int]:
        def run(table: int, symbols: int) -> int:
            stream, plan = function.stream(), function.plan(symbols)
            for i, step in enumerate(function.steps):
                if step[0] == "wait":  # one after the other: everything is on the caller's stream
                    continue
                code = self._step(*_described(step, function), lambda i=i: function.native(table, symbols, stream, plan, 0, i, i + 1))  # type: ignore[misc]
                if code:
                    return int(code)
            return 0
        return run

    def _around_extern(self, target: str, step: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda call: self._step("extern", target, "", lambda: step(call))

    def rows(self) -> list[StepTime]:
        """By name, those that take longest first."""
        medians = [statistics.median(times) for times in zip(*self.calls, strict=True)]
        found: dict[tuple[str, str], list[int]] = {}
        for i, (kind, name, _) in enumerate(self.steps):
            found.setdefault((kind, name), []).append(i)
        made = [StepTime(name, kind, len(which), sum(medians[i] for i in which), self.steps[which[0]][2]) for (kind, name), which in found.items()]
        return sorted(made, key=lambda r: -r.microseconds)

    def table(self, rows: int = 20) -> list[str]:
        """Lines of text: the total, and the steps that take longest."""
        if not self.calls:
            return [f"{self.graph}: no calls were measured"]
        found = self.rows()
        total = sum(r.microseconds for r in found)
        host = 1e6 * statistics.median(self.host)
        lines = [f"{self.graph}: {total:.1f} us on the device in {len(self.steps)} steps (host {host:.0f} us, one by one)"]
        for r in found[:rows]:
            each = r.microseconds / r.count
            lines.append(f"{r.microseconds:9.1f} us {r.count:4d} x {each:8.1f} us  {r.kind:8s} {r.name}{f'  {r.line}' if r.line else ''}")
        if len(found) > rows:
            lines.append(f"{sum(r.microseconds for r in found[rows:]):9.1f} us in {len(found) - rows} more kinds of steps")
        return lines


def _described(step: Sequence[Any], function: CudaFunction) -> tuple[str, str, str]:
    """(kind, name, line) of a native step."""
    line = step[-1] or ""
    if step[0] == "launch":
        return "kernel", step[1], line
    if step[0] == "product":
        sizes = "x".join(str(n) if isinstance(n, int) else "?" for n in step[2]["sizes"])
        roles = "".join(f"+{r}" for r in ("bias", "c") if r in step[1])
        return "library", f"{sizes}{roles}{'' if step[2]['act'] == 'none' else '+' + step[2]['act']}", line
    size = compile_size(step[3], function.library.positions)
    return "copy", f"{size if isinstance(size, int) else '?'} bytes", line
