"""The search for the fastest plan that fits in memory: branch and bound over plans, dynamic programming over layers.

Entry points: `Problem`, `search(problem)` -> `SearchResult`, `pareto(problem)`.

How it works. `space.skeletons` lists every combination of degrees, micro-batch, recomputation and parameter gathering.
Each gets a lower bound on its step time that holds for any schedule, any split and any ZeRO stage (no bubble, no exposed
reduction). The most promising is expanded into schedules and splits, each with a tighter bound; the most promising of
those is simulated. The search stops when no bound is below the best plan found, so the result is the optimum of the space
under the cost model (`proved`), not a local one. Equal blocks share one cost (cached by kind and shard), equal ranks
share one simulation.

Memory is a constraint, not a penalty: a plan whose fullest device exceeds its limit is not a candidate. When nothing
fits, `Infeasible` says the smallest memory found and what takes it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from time import monotonic

from .cluster import Cluster, Device
from .kernels import memory_time
from .layer_cost import SOFTWARE, BlockCost, Placement, Software, with_gather
from .model import ModelConfig
from .partition import MemoryLimit, PartLayout, best_split, even_split, part_blocks, part_ranks
from .plan import CONTEXT, Plan, plan_problems
from .schedules import SCHEDULES
from .simulator import PipelineCosts, alive_counts, peak_activations, pipeline_time
from .space import Space, schedule_choices, skeletons
from .step import (
    PartCosts,
    StepReport,
    assemble,
    costs_of,
    part_costs,
    pipeline_costs,
    predict_step,
    rank_devices,
    stage_memory,
)

__all__ = ["Infeasible", "Problem", "SearchResult", "pareto", "search"]


@dataclass(frozen=True)
class Problem:
    """What to plan. memory_limit: bytes per device (default: the device's memory). budget_s: stop proving after so many
    seconds.
    """

    config: ModelConfig
    cluster: Cluster
    global_batch: int
    software: Software = SOFTWARE["aicc"]
    space: Space = field(default_factory=Space)
    memory_limit: float | None = None
    budget_s: float = 600.0

    def capacity(self, device: Device) -> float:
        return min(device.memory_bytes, self.memory_limit or float("inf"))


@dataclass(frozen=True)
class SearchResult:
    """The best plan's report, runners-up (one per different set of degrees), and what the search did.

    lower_bound: no plan of the space can be faster under the cost model (memory and bubbles ignored). proved: the search
    ended because no bound was below the best plan. open_bound: what an unfinished proof leaves open (the best plan's own
    time when proved).
    """

    best: StepReport
    alternatives: tuple[StepReport, ...]
    lower_bound: float
    open_bound: float
    proved: bool
    considered: int
    simulated: int
    seconds: float

    @property
    def plan(self) -> Plan:
        return self.best.plan

    @property
    def gap(self) -> float:
        """How far the best plan may be above the lower bound, as a fraction of its time."""
        return 1.0 - self.lower_bound / self.best.seconds


class Infeasible(ValueError):
    """No plan fits. smallest is the plan with the least memory; the message says which part of memory binds."""

    def __init__(self, message: str, smallest: StepReport | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclass
class _State:
    """Mutable state of one search."""

    heap: list[tuple[float, int, Plan, Step]] = field(default_factory=list)
    order: count[int] = field(default_factory=count)
    found: dict[tuple[int, ...], StepReport] = field(default_factory=dict)
    costs: dict[tuple[object, ...], dict[str, BlockCost]] = field(default_factory=dict)
    weights: dict[tuple[object, ...], dict[str, tuple[float, float]]] = field(default_factory=dict)
    static: dict[tuple[object, ...], float] = field(default_factory=dict)
    best: StepReport | None = None
    considered: int = 0
    simulated: int = 0

    def push(self, bound: float, plan: Plan, step: Step) -> None:
        """Put a plan on the heap unless its bound already loses."""
        if self.best is None or bound < self.best.seconds:
            heapq.heappush(self.heap, (bound, next(self.order), plan, step))

    def offer(self, report: StepReport) -> None:
        """Keep the report if it is the fastest of its degrees (ties: least memory)."""
        p = report.plan
        key = (p.dp, p.tp, p.cp, p.ep, p.pp)
        if key not in self.found or _rank(report) < _rank(self.found[key]):
            self.found[key] = report
        if self.best is None or _rank(report) < _rank(self.best):
            self.best = report


Step = Callable[[Problem, Plan, float, _State], None]


def _rank(report: StepReport) -> tuple[float, float, str]:
    return (report.seconds, report.peak_memory, report.plan.label)


def search(problem: Problem) -> SearchResult:
    """The fastest plan that fits. Raises Infeasible when none does or no combination of the pins exists."""
    began, state = monotonic(), _State()
    for plan in skeletons(problem.config, problem.cluster, problem.global_batch, problem.space):
        state.considered += 1
        if plan.cp > 1:
            plan = _cheaper_context(problem, plan, state)
        if _static_bytes(problem, plan, state) <= problem.capacity(problem.cluster.device):
            state.push(_skeleton_bound(problem, plan, state), plan, _expand)
    if not state.considered:
        raise Infeasible(_no_plan(problem))
    lower = state.heap[0][0] if state.heap else 0.0
    _dive(problem, state, began + problem.budget_s / 2)
    proved = True
    while state.heap:
        if state.best is not None and state.heap[0][0] >= state.best.seconds:
            break
        if monotonic() - began > problem.budget_s and state.best is not None:
            proved = False
            break
        bound, _, plan, step = heapq.heappop(state.heap)
        step(problem, plan, bound, state)
    if state.best is None:
        raise _infeasible(problem, state)
    # The search extrapolates long pipelines; the answer is run in full.
    best = predict_step(problem.config, state.best.plan, problem.cluster, problem.global_batch, problem.software)
    others = sorted((r for r in state.found.values() if r is not state.best), key=_rank)
    open_bound = best.seconds if proved else min(best.seconds, state.heap[0][0])
    return SearchResult(best, tuple(others[:20]), min(lower, best.seconds), open_bound, proved, state.considered,
                        state.simulated, monotonic() - began)


def _costs_by_kind(problem: Problem, plan: Plan, device: Device, state: _State) -> dict[str, BlockCost]:
    """Block costs by kind, remembered by what they depend on."""
    gathers = plan.dp if plan.zero == 3 else 0  # the data group matters only to those who gather over it
    key = (gathers, plan.shard, plan.micro_batch, plan.recompute, id(device))
    if key not in state.costs:
        if gathers:
            place = Placement.of(plan, problem.cluster, problem.software, device)
            local = _costs_by_kind(problem, replace(plan, zero=0), device, state)
            state.costs[key] = {kind: with_gather(cost, problem.config, kind, place) for kind, cost in local.items()}
        else:
            state.costs[key] = costs_of(problem.config, plan, problem.cluster, problem.software, device)
    return state.costs[key]


def _cheaper_context(problem: Problem, plan: Plan, state: _State) -> Plan:
    """The plan with the cheaper way for attention to meet the whole sequence, of those that are possible and allowed."""
    ways = [replace(plan, context=way) for way in problem.space.values("context", CONTEXT)]
    ways = [w for w in ways if not plan_problems(w, problem.config, problem.cluster, problem.global_batch)]
    kind, device = problem.config.blocks[1], _fastest(problem.cluster)
    return min(ways, key=lambda w: _costs_by_kind(problem, w, device, state)[kind].total)


def _fastest(cluster: Cluster) -> Device:
    return max((g.device for g in cluster.groups), key=lambda d: max(d.peak_flops.values()))


def _skeleton_bound(problem: Problem, plan: Plan, state: _State) -> float:
    """Seconds that no schedule, split or ZeRO stage of this skeleton can beat: the busiest rank does at least its share
    of the work and at least the blocks that rounding leaves it, on the fastest device, with all-to-all hidden if some
    schedule could hide it.
    """
    config, m = problem.config, plan.micro_batches(problem.global_batch)
    device = _fastest(problem.cluster)
    costs = _costs_by_kind(problem, plan, device, state)

    def least(cost: BlockCost) -> float:
        return cost.total - (sum(cost.hideable(problem.software)) if plan.pp > 1 else 0.0)

    work = sum(n * least(costs[kind]) for kind, n in config.runs)
    middle = min(least(costs[kind]) for kind, _ in config.runs[1:-1])
    copies = 2 if "dualpipe" in problem.space.schedules and plan.pp % 2 == 0 else 1  # two copies halve the rounding
    rounded = -(-config.layers * copies // plan.pp) * middle / copies
    params = config.params() / plan.pp / plan.tp / plan.ep
    shards = params / (plan.dp * plan.cp)
    return m * max(work / plan.pp, rounded) + (0.0 if plan.offload else memory_time(device, problem.software.optimizer_traffic * shards))


def _static_bytes(problem: Problem, plan: Plan, state: _State) -> float:
    """Bytes that the fullest device holds at least: the mean rank's weights under the best ZeRO stage, no activations."""
    key = (plan.dp * plan.cp, plan.tp, plan.ep, plan.pp, plan.zero == 3, plan.offload)
    if key not in state.static:
        layout = PartLayout((problem.config.runs,), (0,))
        leanest = replace(plan, pp=1, schedule="1f1b", zero=3 if plan.zero == 3 else 2)
        m = stage_memory(problem.config, leanest, layout, 0, 0.0, 0.0, problem.cluster.device, problem.software)
        state.static[key] = (m.parameters + m.gradients + m.optimizer) / plan.pp * 0.999 + m.reserved
    return state.static[key]


DIVES = 8  # plans simulated before the search proper
_EASY = ("zb-v", "interleaved", "1f1b")  # schedules with little bubble first; any micro-batch count runs the last


def _dive(problem: Problem, state: _State, deadline: float) -> None:
    """Simulate the most promising skeleton of each of a few tensor and pipeline degrees, so that a search that runs out of its budget has
    something good, and bounds that lose to it need not be kept. The answer of a finished search does not depend on it.
    """
    seen: set[tuple[int, int]] = set()
    for bound, _, plan, _ in heapq.nsmallest(2000, state.heap):
        if len(seen) == DIVES or monotonic() > deadline or (state.best is not None and bound >= state.best.seconds):
            break
        if (plan.tp, plan.pp) in seen:
            continue
        choices = [c for c in schedule_choices(problem.config, plan, problem.global_batch, problem.space)
                   if c.schedule in _EASY and c.interleave <= 2 and _may_fit(problem, c, state)]
        for choice in sorted(choices, key=lambda c: _EASY.index(c.schedule))[:1]:
            before = len(state.found)
            for split in _splits(problem, choice, state)[:1]:
                _simulate(problem, replace(choice, split=split), bound, state)
            if len(state.found) > before:
                seen.add((plan.tp, plan.pp))


def _expand(problem: Problem, plan: Plan, bound: float, state: _State) -> None:
    """Push every schedule of a skeleton that some split might fit into memory."""
    for choice in schedule_choices(problem.config, plan, problem.global_batch, problem.space):
        if _may_fit(problem, choice, state):
            state.push(max(bound, _bubble_bound(problem, choice, state)), choice, _cut)


def _may_fit(problem: Problem, plan: Plan, state: _State) -> bool:
    """Whether memory admits some split: every rank is filled with the blocks that take most, as many as it holds. On a rank with
    several parts, blocks count as if they all lay on the part with fewest micro-batches alive. Never says no to a plan that fits.
    """
    config = problem.config
    counts = alive_counts(plan.schedule, plan.pp, plan.micro_batches(problem.global_batch), plan.interleave)
    devices = rank_devices(plan, problem.cluster)
    device = max(devices, key=problem.capacity) if devices[0] is not devices[-1] else devices[0]
    costs, weights = _costs_by_kind(problem, plan, device, state), _block_weights(problem, plan, device, state)
    copies = SCHEDULES[plan.schedule].copies
    for kind, number in config.runs[1:-1]:
        static, fixed = weights[kind]
        room = problem.capacity(device) - fixed
        if room <= 0 or float((room / (static * copies + counts * costs[kind].saved)).sum()) < number * (1 - 1e-9):
            return False
    return True


def _block_weights(problem: Problem, plan: Plan, device: Device, state: _State) -> dict[str, tuple[float, float]]:
    """By kind of block: bytes of its weights, gradients and optimizer state under the leanest ZeRO stage allowed; bytes that a
    device keeps besides blocks.
    """
    key = (plan.dp * plan.cp, plan.tp, plan.ep, plan.pp, plan.zero == 3, plan.offload, id(device))
    if key not in state.weights:
        zero = max(_zero_stages(problem, plan), default=plan.zero)
        single = replace(plan, zero=zero, schedule="1f1b", interleave=1)
        state.weights[key] = {}
        for kind, _ in problem.config.runs:
            layout = PartLayout((((kind, 1),),), (0,))
            m = stage_memory(problem.config, single, layout, 0, 0.0, 0.0, device, problem.software)
            state.weights[key][kind] = (m.parameters + m.gradients + m.optimizer, m.working + m.reserved)
    return state.weights[key]


def _bubble_bound(problem: Problem, plan: Plan, state: _State) -> float:
    """Seconds that no split of this schedule can beat, with one part per rank: rank r works m times its share l_r, after the ranks
    before it have sent one micro-batch down, and (unless backward is split) before they have finished one. Of all shares
    with m * l_r + c * (l_0 + ... + l_r-1) <= T the sum is at most T / c * (1 - (1 - c / m) ** p), which gives T.
    """
    m, p = plan.micro_batches(problem.global_batch), plan.pp
    traits = SCHEDULES[plan.schedule]
    if p == 1 or traits.parts_per_rank != 1 or traits.copies != 1:
        return 0.0
    costs = _costs_by_kind(problem, plan, _fastest(problem.cluster), state)
    work = sum(n * costs[kind].total for kind, n in problem.config.runs)
    ahead = min(cost.forward / cost.total for cost in costs.values() if cost.total) if traits.splits_backward else 1.0
    return work * ahead / (1 - (1 - ahead / m) ** p)


def _cut(problem: Problem, plan: Plan, _bound: float, state: _State) -> None:
    """Push every split of a schedule with a bound that knows it."""
    for split in _splits(problem, plan, state):
        candidate = replace(plan, split=split)
        _, _, costs = _prepare(problem, candidate, state)
        state.push(_schedule_bound(candidate, costs, candidate.micro_batches(problem.global_batch)), candidate, _simulate)


def _splits(problem: Problem, plan: Plan, state: _State) -> list[tuple[int, ...]]:
    """Splits worth trying: even, the fastest slowest part, and the same under the memory limit when those do not fit."""
    pinned = dict(problem.space.pins).get("split")
    if pinned:
        return [pinned]
    config, parts = problem.config, plan.parts
    even = even_split(config.layers, parts)
    if parts == 1:
        return [even]
    devices = rank_devices(plan, problem.cluster)
    ranks = part_ranks(plan.schedule, plan.pp, parts)
    by_rank = [_costs_by_kind(problem, plan, d, state) for d in devices]
    blocks = config.blocks[1:-1]
    rows = {}
    for costs in by_rank:
        if id(costs) not in rows:
            rows[id(costs)] = tuple(map({k: c.total for k, c in costs.items()}.__getitem__, blocks))
    times = tuple(rows[id(by_rank[r])] for r in ranks)
    first, last = by_rank[ranks[0]]["embedding"].total, by_rank[ranks[-1]]["head"].total
    splits = [even]
    fastest = best_split(times, first, last)
    if fastest and fastest not in splits:
        splits.insert(0, fastest)
    if parts == plan.pp and not any(_fitting_zeros(problem, cut, *_prepare(problem, cut, state)) for cut in (replace(plan, split=s) for s in splits)):
        lean = best_split(times, first, last, _memory_limit(problem, plan, devices, by_rank, state))
        if lean:
            splits = [lean]
    return splits


def _memory_limit(problem: Problem, plan: Plan, devices: list[Device], by_rank: list[dict[str, BlockCost]],
                  state: _State) -> MemoryLimit:
    """What a block takes on each rank (weights under the leanest ZeRO stage allowed, activations in flight), and what
    there is.
    """
    config = problem.config
    one = (1.0,) * plan.pp
    alone = PipelineCosts(one, one, one, one)
    alive = peak_activations(plan.schedule, plan.pp, plan.micro_batches(problem.global_batch), plan.interleave, alone)
    rows, capacity = [], []
    for rank, device in enumerate(devices):
        held, costs = _block_weights(problem, plan, device, state), by_rank[rank]
        each = {k: static + alive[rank] * costs[k].saved for k, (static, _) in held.items()}
        rows.append(tuple(map(each.__getitem__, config.blocks[1:-1])))
        ends = (each["embedding"] if rank == 0 else 0.0) + (each["head"] if rank == plan.pp - 1 else 0.0)
        fixed = held["head"][1] + max(c.working for c in costs.values())
        capacity.append(problem.capacity(device) - fixed - ends)
    return MemoryLimit(tuple(rows), tuple(capacity))


def _prepare(problem: Problem, plan: Plan, state: _State) -> tuple[PartLayout, PartCosts, PipelineCosts]:
    layout = part_blocks(problem.config, plan, plan.split)
    parts = part_costs(problem.config, plan, problem.cluster, problem.software, layout,
                       lambda device: _costs_by_kind(problem, plan, device, state))
    return layout, parts, pipeline_costs(parts, problem.software)


def _schedule_bound(plan: Plan, costs: PipelineCosts, m: int) -> float:
    """Seconds that this schedule and split cannot beat: a rank waits for its first input, works, and (unless backward is
    split) waits for the stages before it to finish the last micro-batch.
    """
    traits = SCHEDULES[plan.schedule]
    hidden = plan.schedule.startswith("dualpipe")
    parts, p = len(costs.forward), plan.pp
    work = [costs.forward[i] + costs.backward_input[i] + costs.backward_weight[i]
            - (costs.hidden_forward[i] + costs.hidden_backward[i] if hidden else 0.0) for i in range(parts)]
    ranks = part_ranks(plan.schedule, p, parts)
    load = [0.0] * p
    for i, r in enumerate(ranks):
        load[r] += work[i]
    if traits.placement == "both":
        load = [(load[r] + load[p - 1 - r]) / 2 for r in range(p)]
        return m * max(load)
    worst, lead, tail = 0.0, 0.0, 0.0
    for r in range(p):
        worst = max(worst, m * load[r] + lead + tail)
        hop = costs.p2p[r] if r < len(costs.p2p) else 0.0
        lead += costs.forward[r] - (costs.hidden_forward[r] if hidden else 0.0) + hop
        if not traits.splits_backward:
            tail += costs.backward_input[r] + costs.backward_weight[r] + hop
    return worst


def _fitting_zeros(problem: Problem, plan: Plan, layout: PartLayout, parts: PartCosts, costs: PipelineCosts) -> list[int]:
    """ZeRO stages of this plan that fit."""
    m = plan.micro_batches(problem.global_batch)
    activations = peak_activations(plan.schedule, plan.pp, m, plan.interleave, costs)
    stages = [replace(plan, zero=zero) for zero in _zero_stages(problem, plan)]
    return [staged.zero for staged in stages if _fits(problem, staged, layout, parts, activations)]


def _zero_stages(problem: Problem, plan: Plan) -> tuple[int, ...]:
    allowed = problem.space.values("zero", problem.space.zero)
    if plan.devices == plan.pp:
        allowed = tuple(z for z in allowed if z == 0) or allowed
    return tuple(z for z in allowed if (z == 3) == (plan.zero == 3))


def _fits(problem: Problem, plan: Plan, layout: PartLayout, parts: PartCosts, activations: Sequence[float]) -> bool:
    known: dict[tuple[int, ...], float] = {}
    held: list[list[BlockCost]] = [[] for _ in range(plan.pp)]
    for cost, holder in zip(parts.parts, layout.ranks, strict=True):
        held[holder].append(cost)
    for rank, device in enumerate(rank_devices(plan, problem.cluster)):
        key = (id(device), *map(id, held[rank]), *map(id, held[-1 - rank]))
        if key not in known:
            working = max(c.working for c in held[rank])
            known[key] = stage_memory(problem.config, plan, layout, rank, 0.0, working, device, problem.software).total
        if known[key] + activations[rank] > problem.capacity(device):
            return False
    return True


def _simulate(problem: Problem, plan: Plan, _bound: float, state: _State) -> None:
    """Run one schedule and split, and offer it under every ZeRO stage that fits."""
    layout, parts, costs = _prepare(problem, plan, state)
    zeros = _fitting_zeros(problem, plan, layout, parts, costs)
    if not zeros:
        return
    m = plan.micro_batches(problem.global_batch)
    timing = pipeline_time(plan.schedule, plan.pp, m, plan.interleave, costs)
    state.simulated += 1
    for zero in zeros:
        report = assemble(problem.config, replace(plan, zero=zero), problem.cluster, problem.global_batch, problem.software,
                          layout, parts, timing)
        limits = [problem.capacity(d) for d in rank_devices(plan, problem.cluster)]
        if all(mem.total <= limit for mem, limit in zip(report.memory, limits, strict=True)):
            state.offer(report)


def _no_plan(problem: Problem) -> str:
    """That no combination exists, and what the pins alone, with all else at one, make impossible."""
    pins, size = dict(problem.space.pins), problem.cluster.size
    text = f"no plan exists for {size} devices and global batch {problem.global_batch}"
    if not pins:
        return text
    named = Plan(**{"micro_batch": 1, **pins})
    open_still = ("the mesh has", "the stage's")  # other degrees may fill the mesh, or give experts their devices
    wrong = [f"{named.devices} devices do not divide the mesh of {size}"] if size % named.devices else []
    wrong += [w for w in plan_problems(named, problem.config, problem.cluster, problem.global_batch)
              if not any(part in w for part in open_still)]
    return f"{text} with {', '.join(f'{k}={v}' for k, v in pins.items())}" + (f": {'; '.join(wrong)}" if wrong else "")


def _infeasible(problem: Problem, state: _State) -> Infeasible:
    """Look for the smallest memory: every skeleton's static bytes and one micro-batch of activations give the order to
    try.
    """
    lean = replace(problem, memory_limit=None, space=replace(problem.space, recompute=("full",)))

    def size(plan: Plan) -> tuple[float, int]:
        costs = _costs_by_kind(lean, plan, lean.cluster.device, state)
        return _static_bytes(lean, plan, state) + costs[lean.config.blocks[1]].working, plan.micro_batch

    plans = sorted(skeletons(lean.config, lean.cluster, lean.global_batch, lean.space), key=size)[:40]
    smallest: StepReport | None = None
    for plan in plans:
        for choice in schedule_choices(lean.config, plan, lean.global_batch, lean.space):
            for zero in _zero_stages(lean, choice):
                trial = replace(choice, zero=zero)
                report = predict_step(lean.config, trial, lean.cluster, lean.global_batch, lean.software, exact=False)
                if smallest is None or report.peak_memory < smallest.peak_memory:
                    smallest = report
    if smallest is None:
        return Infeasible(_no_plan(problem))
    worst = max(smallest.memory, key=lambda m: m.total)
    binding = max(("parameters", "gradients", "optimizer", "activations", "working"), key=lambda f: getattr(worst, f))
    limit = problem.capacity(problem.cluster.device)
    return Infeasible(
        f"{problem.config.name} does not fit on {problem.cluster.size} x {problem.cluster.device.name} under any plan: "
        f"the smallest found needs {worst.total / 1e9:.1f} GB per device, {limit / 1e9:.1f} GB are there "
        f"({smallest.plan.label}); most of it is {binding} ({getattr(worst, binding) / 1e9:.1f} GB)", smallest)


def pareto(problem: Problem, points: int = 6) -> tuple[StepReport, ...]:
    """The front of step time against peak memory: the fastest plan under falling memory limits, slowest and smallest
    last.
    """
    front: list[StepReport] = []
    limit = problem.capacity(problem.cluster.device)
    for _ in range(points):
        try:
            best = search(replace(problem, memory_limit=limit)).best
        except Infeasible:
            break
        front.append(best)
        limit = best.peak_memory * 0.85
    return tuple(front)
