"""Independent steps of a GPU program on two streams (the "parallel wall").

The branches of a block, each a chain of kernels too small to fill the device, run one after the other on one stream. `merge-launches` makes
one kernel of small ones that stand side by side; here chains of several are launched on two streams, if the model says that it pays.

Before: host functions with `host.alloc` (`bufferize` has run). After: some launches, library calls and copies have `stream = 1`, between a
`host.wait` that makes stream 1 wait for the caller's and one that makes the caller's wait for stream 1, which comes before the function or the
native segment ends. `plan-memory` does not give a step memory that one which may run at the same time uses (`stream_order.py`), and `check-plan`
proves it on its own. In a CUDA graph, the waits are edges.

A region is a run of neighbouring steps. Those that depend on each other through memory (views count as what they are views of) form a
component; components are dealt out to the two streams, the longest first. The model: a step takes LAUNCH seconds during which the device does
nothing else on its stream, and then keeps `share` of the device for as long as its bytes or operations take; two streams need as long as the
longer one, or as the device needs for all that work, or as the host needs to launch it all. Regions are chosen to gain most in sum (dynamic
programming over where they begin and end); each has to gain GAIN and a tenth. They are made of at most WINDOW steps and ROOM bytes of results,
which are all kept to the region's end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir import Target
from ..ir.builder import Builder
from ..ir.core import Operation, Value
from ..ir.expr import product
from ..ir.passes import Pass, PassContext, register
from .library import library_shape
from .library_cost import BYTES, LAUNCH, TILE, memory_rate, peak_rate
from .side_by_side import buffers_of
from .stream_order import STEPS

__all__ = ["StepCost", "TwoStreams", "lanes", "region_gain", "step_cost"]

HOST = 4.5e-6
"""Seconds that the host needs for a launch where launches are not replayed."""
HOST_WAIT = 1e-6
"""The same of an event and of a wait."""
WAIT = 1.5e-6
"""Seconds that a stream stands still for an event of the other one, or for an edge between branches of a CUDA graph."""
GAIN, GAIN_SHARE = 3e-6, 0.1
"""The least that a region must gain, in seconds and of what it takes on one stream: kernels that fill the device are in each other's way."""
CHAIN = 8
"""Steps of a chain that is rather launched on a stream of its own than merged with another one step by step."""
WINDOW = 192
"""Steps of a region: two encoders of twelve layers fit in."""
ROOM = 64 << 20


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step on the device after its launch, the share of the device that it keeps busy, and bytes that it makes."""

    busy: float
    share: float
    bytes: int = 0

    @property
    def seconds(self) -> float:
        """With its launch."""
        return LAUNCH + self.busy


def step_cost(op: Operation, kernels: Mapping[str, Operation], target: Target) -> StepCost | None:
    """Of a launch, library call or copy of known sizes, on buffers or on tensors; None: nothing is known."""
    made = sum(v.type.numel * v.type.dtype.bytes for v in _written(op))  # type: ignore[attr-defined]
    if not isinstance(made, int):
        return None
    if op.name == "host.copy":
        return StepCost(2 * made / memory_rate(target), min(1.0, made / (1 << 20)), made)
    if op.name in ("host.library", "tensor.library"):
        shape = op["shape"] if op.name == "host.library" else library_shape(op, target)
        return _library_cost(shape, target, made)
    kernel = kernels.get(op["kernel"].name) if op.name in ("host.launch", "tile.launch") else None
    if kernel is None:
        return None
    programs, moved, flops = product(kernel["grid"]), kernel["bytes"], kernel["flops"]
    if not (isinstance(programs, int) and isinstance(moved, int) and isinstance(flops, int)):
        return None
    share = min(1.0, max(1, programs) / max(1, target.multiprocessors))
    rate = peak_rate(target, "bf16" if any(o.name == "tile.dot" for o in kernel.walk()) else "f32")
    return StepCost(max(moved / memory_rate(target), flops / rate) / share, share, made)


def _written(op: Operation) -> Sequence[Value]:
    """Results of a step; not the temporary memory of a library call, which those of one stream share."""
    if op.name in ("tile.launch", "tensor.library"):
        return op.results
    if op.name == "host.copy":
        return op.operands[1:]
    if op.name == "host.library":
        return [op.operands[op["roles"].index("d")]]
    return op.operands[len(op.operands) - op["outputs"]:] if op.name == "host.launch" else ()


def _library_cost(shape: Mapping[str, Any], target: Target, made: int) -> StepCost | None:
    sizes = shape.get("sizes", ())
    if len(sizes) != 4 or not all(isinstance(n, int) for n in sizes):
        return None
    batch, m, n, k = sizes
    tiles = batch * -(-m // TILE) * -(-n // TILE)
    share = min(1.0, max(0.125, tiles / max(1, target.multiprocessors)))  # few tiles are split along K
    kind = shape["types"]["a"]
    moved = batch * (m * k + k * n) * BYTES.get(kind, 4) + made
    return StepCost(max(moved / memory_rate(target), 2.0 * batch * m * n * k / peak_rate(target, kind, library=True)) / share, share, made)


def region_gain(streams: Sequence[Sequence[StepCost]], replayed: bool) -> float:
    """Seconds that two streams gain over one."""
    steps = [c for s in streams for c in s]
    alone = sum(c.seconds for c in steps)
    work = LAUNCH + sum(c.busy * c.share for c in steps)
    together = max(*(sum(c.seconds for c in s) for s in streams), work) + 2 * WAIT
    if not replayed:
        alone, together = max(alone, len(steps) * HOST), max(together, len(steps) * HOST + 4 * HOST_WAIT)
    return alone - together


@register
@dataclass(frozen=True)
class TwoStreams(Pass):
    """See the module docstring. `replayed`: launches are replayed from CUDA graphs, and the host's part is done once."""

    name: ClassVar[str] = "two-streams"
    replayed: bool = False

    def run(self, module: Operation, ctx: PassContext) -> None:
        kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        count = 0
        for func in [op for op in module.body if op.name == "func"]:
            for region in _Finder(func, kernels, ctx.target, self.replayed).regions():
                region.build()
                count += 1
                ctx.remark("done", f"{len(region.streams[0])} and {len(region.streams[1])} steps on two streams: modelled to gain "
                                   f"{1e6 * region.gain:.1f} us", region.steps[0].op.location)
        if not count:
            ctx.remark("declined", "nothing gains by running on a second stream")


@dataclass(frozen=True, eq=False)
class _Step:
    """A step that may be moved to another stream, number `at` of its run; numbers of the buffers that it reads and writes."""

    at: int
    op: Operation
    cost: StepCost
    reads: frozenset[int]
    writes: frozenset[int]


@dataclass(frozen=True, eq=False)
class _Region:
    """Neighbouring steps, and how they are dealt out."""

    steps: Sequence[_Step]
    streams: tuple[Sequence[_Step], Sequence[_Step]]
    longest: tuple[Sequence[_Step], Sequence[_Step]]
    """The longest component on each."""
    gain: float

    def build(self) -> None:
        """Moves the steps together, in the order in which they are modelled to begin, between two waits."""
        block = self.steps[0].op.parent
        assert block is not None
        first, end = self.steps[0].op, self.steps[-1].op.next
        assert end is not None, "a function ends with 'return'"
        moved, between, op = {s.op for s in self.steps}, [], first
        while op is not end:
            between.append(op)
            op = op.next  # type: ignore[assignment]
        for other in between:  # what only says where buffers are
            if other not in moved:
                other.move_before(first)
        Builder(block, first, first.location).create("host.wait", (), {"stream": 1, "on": 0})
        begins: list[tuple[float, int, _Step]] = []
        for number, stream in enumerate(self.streams):
            at = 0.0
            for s in stream:
                begins.append((at, number, s))
                at += s.cost.seconds
        for _, number, s in sorted(begins, key=lambda b: b[:2]):
            s.op.move_before(end)
            if number:
                s.op.attributes["stream"] = 1
        Builder(block, end, first.location).create("host.wait", (), {"stream": 0, "on": 1})
        for stream in self.streams:
            _share_workspace([s.op for s in stream if s.op.name == "host.library"])


def _share_workspace(products: Sequence[Operation]) -> None:
    """Products of one stream run one after the other: one block of temporary memory is enough for those that want as much."""
    first: dict[object, Value] = {}
    for op in products:
        at = op["roles"].index("workspace")
        shared = first.setdefault(op.operands[at].type, op.operands[at])
        op.set_operands([*op.operands[:at], shared, *op.operands[at + 1:]])


def lanes(func: Operation, kernels: Mapping[str, Operation], target: Target, replayed: bool) -> dict[Operation, tuple[int, int]]:
    """Launches of a function of `tile.launch` in regions whose chains, of at least CHAIN steps, are worth two streams: (region, stream) of each.

    `merge-launches` does not make one kernel of two that are on different streams, which would tie the chains together.
    """
    found: dict[Operation, tuple[int, int]] = {}
    for number, region in enumerate(_Finder(func, kernels, target, replayed).regions()):
        if all(len(stream) >= CHAIN for stream in region.longest):
            found.update({s.op: (number, i) for i, stream in enumerate(region.streams) for s in stream})
    return found


_VALUE_STEPS = ("tile.launch", "tensor.library", "tensor.extern", "tensor.assign", "loop")


def _touched(op: Operation) -> tuple[Sequence[Value], Sequence[Value]]:
    """What a step reads and what it writes: memory, or before there is memory, values."""
    return (op.operands, op.results) if op.name in _VALUE_STEPS else buffers_of(op)


class _Finder:
    """The regions of one function."""

    def __init__(self, func: Operation, kernels: Mapping[str, Operation], target: Target, replayed: bool):
        self.func, self.kernels, self.target, self.replayed = func, kernels, target, replayed
        self.numbers: dict[Value, int] = {}

    def regions(self) -> list[_Region]:
        found: list[_Region] = []
        for run in self._runs():
            found += self._best(run)
        return found

    def _runs(self) -> list[list[_Step]]:
        """Steps that nothing parts: no operator call, and nothing whose cost is unknown."""
        runs: list[list[_Step]] = [[]]
        for op in self.func.body:
            if op.name not in (*STEPS, *_VALUE_STEPS) or op.attributes.get("cached"):
                continue
            cost = step_cost(op, self.kernels, self.target) if op.name not in ("host.loop", "host.extern", "loop", "tensor.extern") else None
            if cost is None:
                runs.append([])
                continue
            reads, writes = (frozenset(self.numbers.setdefault(v, len(self.numbers)) for v in side) for side in _touched(op))
            runs[-1].append(_Step(len(runs[-1]), op, cost, reads, writes))
        return [r for r in runs if len(r) > 1]

    def _best(self, steps: list[_Step]) -> list[_Region]:
        """Regions that do not overlap, of the largest gain in sum."""
        gains = [0.0] * (len(steps) + 1)  # of the steps up to there
        last: list[_Region | None] = [None] * (len(steps) + 1)
        ending: list[list[_Region]] = [[] for _ in range(len(steps) + 1)]
        for begin in range(len(steps) - 1):
            for region in self._from(steps, begin):
                ending[begin + len(region.steps)].append(region)
        for end in range(1, len(steps) + 1):
            gains[end] = gains[end - 1]
            for region in ending[end]:
                total = gains[region.steps[0].at] + region.gain
                if total > gains[end]:
                    gains[end], last[end] = total, region
        chosen, end = [], len(steps)
        while end > 0:
            best = last[end]
            if best is None:
                end -= 1
            else:
                chosen.append(best)
                end = best.steps[0].at
        return chosen[::-1]

    def _from(self, steps: list[_Step], begin: int) -> list[_Region]:
        """Regions that gain and begin with this step. Each ends before a step in which components meet, or where there is no room for more."""
        found: list[_Region] = []
        parent: dict[int, int] = {}  # step -> another one of its component
        writer: dict[int, int] = {}  # buffer -> the step that wrote it last
        readers: dict[int, list[int]] = {}  # and those that have read it since

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        def take(end: int) -> None:
            members: dict[int, list[_Step]] = {}
            for i in parent:
                members.setdefault(root(i), []).append(steps[i])
            if len(members) > 1:
                region = self._dealt(steps[begin:end], list(members.values()))
                if region.gain >= max(GAIN, GAIN_SHARE * sum(s.cost.seconds for s in region.steps)):
                    found.append(region)

        held, end = 0, begin
        while end < min(len(steps), begin + WINDOW):
            step = steps[end]
            held += step.cost.bytes
            if held > ROOM:
                break
            before = {root(writer[v]) for v in (*step.reads, *step.writes) if v in writer}
            before |= {root(i) for v in step.writes for i in readers.get(v, ())}
            if len(before) > 1:
                take(end)
            parent[end] = end
            for other in before:
                parent[other] = end
            for v in step.reads:
                readers.setdefault(v, []).append(end)
            for v in step.writes:
                writer[v], readers[v] = end, []
            end += 1
        take(end)
        return found

    def _dealt(self, steps: Sequence[_Step], components: Sequence[Sequence[_Step]]) -> _Region:
        """The longest component first, each to the stream with less to do."""
        streams: tuple[list[_Step], list[_Step]] = ([], [])
        total = [0.0, 0.0]
        ordered = sorted(components, key=lambda c: -sum(s.cost.seconds for s in c))
        for c in ordered:
            to = 0 if total[0] <= total[1] else 1
            streams[to].extend(c)
            total[to] += sum(s.cost.seconds for s in c)
        first, second = (sorted(s, key=lambda step: step.at) for s in streams)
        gain = region_gain([[s.cost for s in first], [s.cost for s in second]], self.replayed)
        return _Region(steps, (first, second), (ordered[0], ordered[1]), gain)
