"""Pipelines whose stages have sub-meshes of their own, also unequal ones, as in Alpa (Zheng et al., OSDI 2022, section 5).

Entry points: `search_submeshes(problem)` -> `SubmeshPlan`, `SubmeshPlan.table()`.

The stages lie on consecutive devices in rank order. A stage's sub-mesh is a divisor or a multiple of a node; it chooses its own tensor and data
degrees, recomputation and ZeRO stage, so on mixed clusters a slow node may cut its tensors otherwise than a fast one. Every micro-batch has
`rows` sequences, of which a stage's data ranks take equal shares. What follows the pipeline (gradients, update) is dealt out among the
micro-batches. Dynamic programming over (stages still to come, blocks still to place, devices
still free): for a bound on the slowest stage, the least sum of stage times; the bounds are tried in ascending order until (m - 1) of them
alone take longer than the best pipeline found (Alpa's pruning). The number of stages still to come is how many micro-batches 1F1B keeps alive, so
memory is exact. The winner of each micro-batch size is run by the event simulator.

Plans of `planner.py` have equal stages and can run; these are for planning: a DeviceMesh is rectangular, and so is every executed plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import inf

import numpy as np

from .cluster import Cluster, Device
from .collectives import axis_group, collective_time
from .layer_cost import BlockCost, Placement, block_cost
from .model import ELEMENT
from .partition import PartLayout
from .plan import Plan
from .planner import Infeasible, Problem
from .schedules import build_schedule
from .simulator import PipelineCosts, simulate
from .space import divisors
from .step import stage_memory, tail_seconds

__all__ = ["StageMesh", "SubmeshPlan", "search_submeshes"]

MAX_STAGES = 16
BOUNDS = 16  # on the slowest stage, that are tried


@dataclass(frozen=True)
class StageMesh:
    """One stage. plan: its degrees and policies, as a plan without a pipeline; blocks: how many (embedding and head not counted); seconds:
    forward and backward of a micro-batch; memory: bytes on its fullest device.
    """

    plan: Plan
    device: str
    blocks: int
    seconds: float
    memory: float


@dataclass(frozen=True)
class SubmeshPlan:
    """rows: sequences of a micro-batch, of all data ranks together. seconds: of a step; idle: devices that no stage uses."""

    stages: tuple[StageMesh, ...]
    rows: int
    micro_batches: int
    seconds: float
    idle: int

    @property
    def unequal(self) -> bool:
        """Whether the stages differ in size or in how they cut."""
        return len({(s.plan.dp, s.plan.tp, s.plan.sp) for s in self.stages}) > 1

    def table(self) -> list[tuple[str, ...]]:
        """One row per stage: devices, degrees, blocks, policies, seconds, memory."""
        return [(str(s.plan.devices), s.device, f"dp{s.plan.dp} tp{s.plan.tp}" + ("+sp" if s.plan.sp else ""), str(s.blocks), s.plan.recompute,
                 f"zero{s.plan.zero}", f"{s.seconds:.4g} s", f"{s.memory / 1e9:.1f} GB") for s in self.stages]


@dataclass(frozen=True)
class _Option:
    """A way to run some blocks on a sub-mesh. memory: bytes on its fullest device, without activations between forward and backward. tail: seconds of
    gradient exchange and update after the pipeline. share: of a step's seconds per micro-batch, the tail dealt out among all of them.
    """

    plan: Plan
    cost: BlockCost
    memory: float
    tail: float
    share: float


class _Stages:
    """Options of stages, remembered by what they depend on."""

    def __init__(self, problem: Problem, rows: int, tails: bool = True):
        """tails: whether a stage's gradient exchange and update count when its fastest option is chosen."""
        self.problem, self.rows, self.tails = problem, rows, tails
        self.known: dict[tuple[object, ...], list[_Option]] = {}
        self.costs: dict[tuple[object, ...], BlockCost] = {}

    def best(self, device: Device, size: int, first: int, last: int, alive: int) -> _Option | None:
        """The fastest for blocks first..last (of `config.blocks`, embedding and head counted) on `size` devices that fits, with `alive`
        micro-batches under way.
        """
        runs = _runs(self.problem.config.blocks[first:last])
        key = (id(device), size, runs)
        if key not in self.known:
            self.known[key] = sorted((self._option(plan, device, runs) for plan in self._plans(size)), key=lambda o: (o.share, o.memory))
        room = self.problem.capacity(device)
        return next((o for o in self.known[key] if o.memory + alive * o.cost.saved <= room), None)

    def _plans(self, size: int) -> Iterator[Plan]:
        config, cluster, space = self.problem.config, self.problem.cluster, self.problem.space
        for tp in space.values("tp", tuple(d for d in divisors(size) if d <= cluster.node_size and config.heads % d == 0)):
            if size % tp or self.rows % (size // tp):
                continue
            dp = size // tp
            for sp, recompute, zero in product((True, False) if tp > 1 else (False,), space.values("recompute", space.recompute),
                                               (0, 1) if dp > 1 else (0,)):
                yield Plan(dp=dp, tp=tp, sp=sp, zero=zero, recompute=recompute, micro_batch=self.rows // dp)

    def _option(self, plan: Plan, device: Device, runs: tuple[tuple[str, int], ...]) -> _Option:
        problem = self.problem
        place = Placement.of(plan, problem.cluster, problem.software, device)
        cost = BlockCost.sum((n, self._block(kind, plan, place)) for kind, n in runs)
        layout, m = PartLayout((runs,), (0,)), problem.global_batch // self.rows
        memory = stage_memory(problem.config, plan, layout, 0, 0.0, cost.working, device, problem.software).total
        tail = sum(tail_seconds(problem.config, plan, layout, 0, place, m, [cost]))
        return _Option(plan, cost, memory, tail, cost.total + (tail / m if self.tails else 0.0))

    def _block(self, kind: str, plan: Plan, place: Placement) -> BlockCost:
        key = (kind, plan.dp, plan.tp, plan.sp, plan.recompute, id(place.device))
        if key not in self.costs:
            self.costs[key] = block_cost(self.problem.config, kind, plan.micro_batch, plan.recompute, place)
        return self.costs[key]


def _runs(kinds: Sequence[str]) -> tuple[tuple[str, int], ...]:
    found: list[tuple[str, int]] = []
    for kind in kinds:
        found[-1:] = [(kind, found[-1][1] + 1)] if found and found[-1][0] == kind else [*found[-1:], (kind, 1)]
    return tuple(found)


def _sizes(cluster: Cluster) -> tuple[int, ...]:
    """Divisors of a node, and whole nodes."""
    return (*divisors(cluster.node_size), *(n * cluster.node_size for n in range(2, cluster.nodes + 1)))


def search_submeshes(problem: Problem, max_stages: int = MAX_STAGES) -> SubmeshPlan:
    """The fastest pipeline found. Raises Infeasible when none fits. Tied embeddings count as two, as the stages at the ends both hold one."""
    problem = replace(problem, config=replace(problem.config, tied=False))
    best: SubmeshPlan | None = None
    for rows in divisors(problem.global_batch):
        if rows > problem.space.max_micro_batch * problem.cluster.size:
            break
        found = _for_rows(problem, rows, max_stages, inf if best is None else best.seconds)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
    if best is None:
        raise Infeasible(f"{problem.config.name} does not fit on {problem.cluster.size} devices as a pipeline of sub-meshes (at most {max_stages} "
                         "stages)")
    return best


def _for_rows(problem: Problem, rows: int, max_stages: int, limit: float) -> SubmeshPlan | None:
    found = [_for_choice(problem, _Stages(problem, rows, tails), max_stages, limit) for tails in (True, False)]
    return min((f for f in found if f is not None), key=lambda f: f.seconds, default=None)


def _for_choice(problem: Problem, stages: _Stages, max_stages: int, limit: float) -> SubmeshPlan | None:
    rows, layers, total = stages.rows, problem.config.layers, problem.cluster.size
    m, sizes = problem.global_batch // rows, [s for s in _sizes(problem.cluster) if s <= total]
    times = _times(problem, stages, sizes, min(max_stages, layers, total))
    seconds = np.unique(times[np.isfinite(times)])
    best: SubmeshPlan | None = None
    for bound in np.unique(np.quantile(seconds, np.linspace(0, 1, BOUNDS), method="higher")) if len(seconds) else ():
        if (m - 1) * bound >= min(limit, inf if best is None else best.seconds):
            break
        chain = _chain(np.where(times <= bound, times, inf), sizes, layers, total)
        if chain is None:
            continue
        found = _run(problem, stages, chain, rows, m)
        if best is None or found.seconds < best.seconds:
            best = found
    return best


def _times(problem: Problem, stages: _Stages, sizes: Sequence[int], max_stages: int) -> np.ndarray:
    """Seconds per micro-batch (`_Option.share`): [stages to come][first device][size][first block][end block]. Uniform: device 0 alone."""
    cluster, layers = problem.cluster, problem.config.layers
    starts = 1 if cluster.uniform else cluster.size
    times = np.full((max_stages, starts, len(sizes), layers + 1, layers + 1), inf)
    for start, (b, size) in product(range(starts), enumerate(sizes)):
        if start + size > cluster.size:
            continue
        device = cluster.device_of_range(start, size)
        for alive, i in product(range(max_stages), range(layers)):
            for j in (layers,) if alive == 0 else range(i + 1, layers):  # the last stage holds all that is left
                option = stages.best(device, size, *_edges(i, j, layers), alive + 1)
                if option is not None:
                    times[alive, start, b, i, j] = option.share
    return times


def _edges(i: int, j: int, layers: int) -> tuple[int, int]:
    """Places in `config.blocks` of blocks i to j: the embedding joins the first, the head the last."""
    return (0 if i == 0 else i + 1), (j + 2 if j == layers else j + 1)


def _chain(times: np.ndarray, sizes: Sequence[int], layers: int, total: int) -> list[tuple[int, int, int]] | None:
    """[(devices, first block, end block), ...] with the least sum of times, stages in order; None if there is none.

    least[a][i][d]: the least sum for blocks i.. on the last d devices with a + 1 stages; on a uniform cluster not all devices need be used.
    """
    stages, uniform = len(times), times.shape[1] == 1
    least = np.full((stages, layers + 1, total + 1), inf)
    size_of, end_of = (np.zeros(least.shape, dtype=int) for _ in range(2))
    for a, i, (b, size) in product(range(stages), range(layers), enumerate(sizes)):
        d = np.arange(size, total + 1)
        row = times[a, np.zeros_like(d) if uniform else total - d, b, i]  # (devices, end block)
        if a:
            row = row + least[a - 1][:, d - size].T
        end = row.argmin(axis=1)
        found = row[np.arange(len(d)), end]
        better = found < least[a, i, d]
        least[a, i, d[better]], size_of[a, i, d[better]], end_of[a, i, d[better]] = found[better], size, end[better]
    ends = least[:, 0, :] if uniform else least[:, 0, total:]
    a, d0 = (int(x) for x in np.unravel_index(int(ends.argmin()), ends.shape))
    if not np.isfinite(ends[a, d0]):
        return None
    i, free, chain = 0, d0 if uniform else total, []
    for at in range(a, -1, -1):
        size, j = int(size_of[at, i, free]), int(end_of[at, i, free])
        chain.append((size, i, j))
        i, free = j, free - size
    return chain


def _run(problem: Problem, stages: _Stages, chain: list[tuple[int, int, int]], rows: int, m: int) -> SubmeshPlan:
    """The pipeline by the event simulator, and what follows it on the slowest stage."""
    config, cluster, software = problem.config, problem.cluster, problem.software
    options: list[_Option] = []
    devices: list[Device] = []
    start = 0
    for k, (size, i, j) in enumerate(chain):
        device = cluster.device_of_range(start, size)
        option = stages.best(device, size, *_edges(i, j, config.layers), len(chain) - k)
        assert option is not None
        options.append(option)
        devices.append(device)
        start += size
    costs = PipelineCosts(tuple(o.cost.forward for o in options), tuple(o.cost.backward_input for o in options),
                          tuple(o.cost.backward_weight for o in options), tuple(o.cost.saved for o in options),
                          tuple(_message(problem, a.plan, b.plan, rows) for a, b in pairwise(options)), blocking=not software.overlap_p2p)
    run = simulate(build_schedule("1f1b", len(chain), m, 1), costs, timeline=False)
    tail = max(o.tail for o in options)
    made = tuple(StageMesh(o.plan, d.name, j - i, o.cost.total, o.memory + (len(chain) - k) * o.cost.saved)
                 for k, (o, d, (_, i, j)) in enumerate(zip(options, devices, chain, strict=True)))
    return SubmeshPlan(made, rows, m, run.seconds + tail, cluster.size - sum(size for size, _, _ in chain))


def _message(problem: Problem, sender: Plan, receiver: Plan, rows: int) -> float:
    """Seconds of a micro-batch's activations from one sub-mesh to the next: as many links as the smaller one has devices, and the tensor ranks of the
    receiver gather what they need whole.
    """
    size = ELEMENT[problem.config.dtype] * rows * problem.config.seq * problem.config.hidden
    links = min(sender.devices, receiver.devices)
    seconds = collective_time("p2p", size / links, axis_group(problem.cluster, sender.devices, 2))
    if receiver.tp > 1 and not receiver.sp:
        seconds += collective_time("all_gather", size / receiver.dp, axis_group(problem.cluster, 1, receiver.tp))
    return seconds
