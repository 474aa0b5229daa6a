"""One training step of a plan on a cluster: time, where it goes, and memory per device.

Entry point: `predict_step(config, plan, cluster, global_batch)` -> `StepReport`. Stage costs come from `layer_cost.py`,
bubbles and peak activations from running the schedule (`simulator.py`), then gradient reduction, optimizer and parameter
gathers are added.

Memory per device is: parameters, gradients and optimizer state (divided by ZeRO), activations alive at the schedule's
peak, the working set of the block that runs backward, and what the device reserves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from .cluster import Cluster, Device
from .collectives import Group, collective_time
from .kernels import memory_time
from .layer_cost import SOFTWARE, BlockCost, Placement, Software, block_cost
from .model import ELEMENT, ModelConfig, Shard, block_params
from .partition import PartLayout, even_split, part_blocks
from .plan import Plan, plan_problems
from .schedules import SCHEDULES, Schedule, build_schedule
from .simulator import PipelineCosts, PipelineRun, PipelineTime, pipeline_time, simulate
from .tables import ConfigError
from .workload import model_flops

__all__ = ["MemoryReport", "StepReport", "data_parallel_seconds", "pipeline_costs", "pipeline_inputs", "pipeline_run", "predict_step", "stage_memory",
           "tail_seconds"]

OFFLOAD_TRAFFIC = 6  # bytes per parameter over the host link: gradients down, parameters up


@dataclass(frozen=True)
class MemoryReport:
    """Bytes on the fullest device of one pipeline rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    reserved: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working + self.reserved


@dataclass(frozen=True)
class StepReport:
    """A predicted step. Seconds unless named otherwise.

    pipeline: the schedule's makespan, of which bubble is idle time of the average rank. exposed_comm: communication in
    the busiest rank's makespan that no compute hides. gradient_reduce, optimizer, parameter_gather: what follows the
    pipeline. memory is per rank. mfu counts model FLOPs, hfu also recomputation, both over the mesh's peak.
    """

    plan: Plan
    seconds: float
    pipeline: float
    bubble: float
    exposed_comm: float
    recompute: float
    gradient_reduce: float
    optimizer: float
    parameter_gather: float
    memory: tuple[MemoryReport, ...]
    capacity: tuple[float, ...]
    tokens_per_second: float
    mfu: float
    hfu: float

    @property
    def peak_memory(self) -> float:
        """Bytes on the fullest device."""
        return max(m.total for m in self.memory)

    @property
    def fits(self) -> bool:
        return all(m.total <= c for m, c in zip(self.memory, self.capacity, strict=True))

    def breakdown(self) -> dict[str, float]:
        """Seconds by cause; they add up to the step."""
        compute = self.pipeline - self.bubble - self.exposed_comm - self.recompute
        return {"compute": compute, "recompute": self.recompute, "exposed communication": self.exposed_comm,
                "bubble": self.bubble, "gradient reduction": self.gradient_reduce, "optimizer": self.optimizer,
                "parameter gather": self.parameter_gather}


def rank_devices(plan: Plan, cluster: Cluster) -> list[Device]:
    """The slowest device of every pipeline rank."""
    if cluster.uniform:
        return [cluster.groups[0].device] * plan.pp
    stage = plan.devices // plan.pp
    return [cluster.device_of_range(r * stage, stage) for r in range(plan.pp)]


CostsOf = Callable[[Device], Mapping[str, BlockCost]]


@dataclass(frozen=True)
class PartCosts:
    """Summed block costs of every model part, and seconds of a message between parts on different ranks."""

    parts: tuple[BlockCost, ...]
    p2p: float

    def row(self, name: str) -> tuple[float, ...]:
        return tuple(getattr(part, name) for part in self.parts)


def costs_of(config: ModelConfig, plan: Plan, cluster: Cluster, software: Software, device: Device) -> dict[str, BlockCost]:
    """Block costs by kind on `device`."""
    place = Placement.of(plan, cluster, software, device)
    return {kind: block_cost(config, kind, plan.micro_batch, plan.recompute, place, plan.zero == 3) for kind, _ in config.runs}


def part_costs(config: ModelConfig, plan: Plan, cluster: Cluster, software: Software, layout: PartLayout,
               lookup: CostsOf | None = None) -> PartCosts:
    """Costs per part, on the device that holds it. `lookup` gives block costs by kind on a device (default: computed
    here).
    """
    devices = rank_devices(plan, cluster)
    kinds = [d for i, d in enumerate(devices) if d is not devices[i - 1] or i == 0]  # runs of one device object
    by_device = {id(d): (lookup(d) if lookup else costs_of(config, plan, cluster, software, d)) for d in kinds}
    known: dict[tuple[int, tuple[tuple[str, int], ...]], BlockCost] = {}
    parts = []
    for runs, rank in zip(layout.runs, layout.ranks, strict=True):
        key = (id(devices[rank]), runs)
        if key not in known:
            costs = by_device[id(devices[rank])]
            known[key] = BlockCost.sum((n, costs[kind]) for kind, n in runs)
        parts.append(known[key])
    return PartCosts(tuple(parts), _message_seconds(config, plan, Placement.of(plan, cluster, software, devices[0])))


def _message_seconds(config: ModelConfig, plan: Plan, place: Placement) -> float:
    """Activations between stages: every tensor rank sends its slice (scatter/gather), whether or not sp is on."""
    if plan.pp == 1:
        return 0.0
    size = ELEMENT[config.dtype] * plan.micro_batch * config.seq / plan.cp * config.hidden / plan.tp
    seconds = collective_time("p2p", size, place.pipeline)
    if plan.tp > 1 and not plan.sp:
        seconds += collective_time("all_gather", size * plan.tp, place.tensor)
    return seconds


def pipeline_costs(parts: PartCosts, software: Software) -> PipelineCosts:
    """What the simulator needs, per part."""
    return PipelineCosts(
        forward=parts.row("forward"), backward_input=parts.row("backward_input"), backward_weight=parts.row("backward_weight"),
        activation=parts.row("saved"), p2p=(parts.p2p,) * (len(parts.parts) - 1),
        hidden_forward=tuple(c.hideable(software)[0] for c in parts.parts),
        hidden_backward=tuple(c.hideable(software)[1] for c in parts.parts), blocking=not software.overlap_p2p)


def _parameters(config: ModelConfig, plan: Plan, layout: PartLayout, rank: int) -> tuple[float, float]:
    """(dense, expert) parameters on one device of `rank`, before ZeRO."""
    holders = [rank]
    if plan.pp > 1 and SCHEDULES[plan.schedule].copies == 2:
        holders.append(plan.pp - 1 - rank)  # the mirrored rank's part lives here too
    dense = expert = 0.0
    for runs, holder in zip(layout.runs, layout.ranks, strict=True):
        for kind, count in runs if holder in holders else ():
            d, e = _local_params(config, kind, plan.tp, plan.ep)
            dense, expert = dense + count * holders.count(holder) * d, expert + count * holders.count(holder) * e
    if config.tied and plan.pp == 1:
        dense -= config.vocab * config.hidden / plan.tp
    return dense, expert


@lru_cache(maxsize=4096)
def _local_params(config: ModelConfig, kind: str, tp: int, ep: int) -> tuple[float, float]:
    return block_params(config, kind).local(Shard(tp=tp, ep=ep))


def stage_memory(config: ModelConfig, plan: Plan, layout: PartLayout, rank: int, activations: float, working: float,
                 device: Device, software: Software, micro_batches: int = 0) -> MemoryReport:
    """Memory of one pipeline rank's fullest device; `activations` at the schedule's peak, `working` of the running
    block. micro_batches of a step, where they are known.
    """
    dense, expert = _parameters(config, plan, layout, rank)
    dp, edp = plan.dp * plan.cp, plan.devices // plan.pp // plan.ep
    unit = ELEMENT[config.dtype]

    def sharded(per_param: float, since: int) -> float:
        return per_param * (dense / dp + expert / edp if plan.zero >= since else dense + expert)

    bucket = 0.0
    if software.working is not None:
        bucket = _program_working(config, plan, software, dense + expert, micro_batches)
    elif plan.zero >= 2:
        # Two blocks' parameters (gathered ahead) and one block's gradients are whole at a time.
        biggest = max(sum(_local_params(config, kind, plan.tp, plan.ep)) for kind, _ in config.runs)
        bucket = biggest * (software.gradient_bytes + (2 * unit if plan.zero == 3 else 0))
    optimizer = 0.0 if plan.offload else sharded(software.optimizer_bytes if unit < 4 else min(8, software.optimizer_bytes), 1)
    return MemoryReport(sharded(unit, 3), sharded(software.gradient_bytes, 2), optimizer, activations, working + bucket,
                        device.reserved_bytes)


def _program_working(config: ModelConfig, plan: Plan, software: Software, parameters: float, micro_batches: int) -> float:
    """What `Working` says, of a rank with so many parameters (before ZeRO); all ranks of a pipeline are taken for the one with the loss."""
    assert software.working is not None
    w, unit, rows = software.working, ELEMENT[config.dtype], plan.micro_batch * config.seq / plan.cp
    gated, plain = (0.0, 0.0) if plan.tp == 1 else w.sequence if plan.sp else w.tensor
    streams = w.streams + gated + (0.0 if config.gated else plain) + (w.pipeline if plan.pp > 1 else 0.0)
    total = w.loss * rows * config.vocab / plan.tp + streams * rows * config.hidden * unit
    if plan.dp * plan.cp > 1:
        flying = parameters * (software.gradient_bytes + (unit if plan.zero == 3 else 0))
        total += max(w.in_flight * flying, config.vocab * config.hidden / plan.tp * unit)
    if plan.pp > 1 or micro_batches > 1:  # a micro-batch's gradients beside their sum
        total += parameters * software.gradient_bytes
    return total


def data_parallel_seconds(config: ModelConfig, plan: Plan, layout: PartLayout, rank: int, place: Placement,
                          micro_batches: int) -> tuple[float, float, float]:
    """(gradient reduction, optimizer, parameter gather) seconds of a rank after its pipeline, before any overlap."""
    dense, expert = _parameters(config, plan, layout, rank)
    software, unit = place.software, ELEMENT[config.dtype]
    reduce = gather = 0.0
    pairs: tuple[tuple[float, Group], ...] = ((dense, place.data), (expert, place.expert_data))
    shards = 0.0
    for count, group in pairs:
        shards += count / group.size if plan.zero else count
        if group.size == 1 or not count:
            continue
        size = software.gradient_bytes * count
        if plan.zero == 0:
            reduce += collective_time("all_reduce", size, group)
        elif plan.zero < 3:
            reduce += collective_time("reduce_scatter", size, group) * (micro_batches if plan.zero == 2 else 1)
            gather += collective_time("all_gather", unit * count, group)
    if plan.offload:
        return reduce, OFFLOAD_TRAFFIC * shards / place.device.host_bandwidth, gather
    return reduce, memory_time(place.device, software.optimizer_traffic * shards), gather


def predict_step(config: ModelConfig, plan: Plan, cluster: Cluster, global_batch: int, software: Software | str = "aicc",
                 exact: bool = True, slowdown: tuple[float, ...] = ()) -> StepReport:
    """Simulate one step. `exact=False` extrapolates many micro-batches from the steady state (for the search). slowdown: per pipeline
    rank, 1.0 is nominal speed.

    Raises ConfigError listing everything that is wrong with the plan.
    """
    if isinstance(software, str):
        software = SOFTWARE[software]
    problems = plan_problems(plan, config, cluster, global_batch)
    if problems:
        raise ConfigError(f"plan {plan.label}: " + "; ".join(problems))
    micro_batches = plan.micro_batches(global_batch)
    layout = part_blocks(config, plan, plan.split or even_split(config.layers, plan.parts))
    parts = part_costs(config, plan, cluster, software, layout)
    costs = replace(pipeline_costs(parts, software), slowdown=slowdown)
    if exact:
        run = simulate(build_schedule(plan.schedule, plan.pp, micro_batches, plan.interleave), costs, timeline=False)
        timing = PipelineTime(run.seconds, sum(run.busy) / plan.pp, run.peak_bytes)
    else:
        timing = pipeline_time(plan.schedule, plan.pp, micro_batches, plan.interleave, costs)
    return assemble(config, plan, cluster, global_batch, software, layout, parts, timing)


def pipeline_inputs(config: ModelConfig, plan: Plan, cluster: Cluster, software: Software | str = "aicc") -> PipelineCosts:
    """What the plan's pipeline is simulated with."""
    if isinstance(software, str):
        software = SOFTWARE[software]
    layout = part_blocks(config, plan, plan.split or even_split(config.layers, plan.parts))
    return pipeline_costs(part_costs(config, plan, cluster, software, layout), software)


def pipeline_run(config: ModelConfig, plan: Plan, cluster: Cluster, global_batch: int, software: Software | str = "aicc",
                 most: int = 0) -> tuple[Schedule, PipelineRun]:
    """The plan's schedule and its run with a timeline, of at most `most` micro-batches (rounded up to whole pipelines; 0: all)."""
    m = plan.micro_batches(global_batch)
    few = min(m, -(-most // plan.pp) * plan.pp) if most else m
    schedule = build_schedule(plan.schedule, plan.pp, few, plan.interleave)
    return schedule, simulate(schedule, pipeline_inputs(config, plan, cluster, software))


def assemble(config: ModelConfig, plan: Plan, cluster: Cluster, global_batch: int, software: Software, layout: PartLayout,
             parts: PartCosts, timing: PipelineTime) -> StepReport:
    """The report of a step whose pipeline has been run."""
    micro_batches = plan.micro_batches(global_batch)
    devices = rank_devices(plan, cluster)
    held: list[list[BlockCost]] = [[] for _ in devices]
    for cost, holder in zip(parts.parts, layout.ranks, strict=True):
        held[holder].append(cost)
    places = {id(d): Placement.of(plan, cluster, software, d) for d in dict.fromkeys(devices)}
    memory, tail = [], (0.0, 0.0, 0.0)
    known: dict[tuple[int, ...], tuple[float, float, float]] = {}
    for rank, device in enumerate(devices):
        working = max(c.working for c in held[rank])
        memory.append(stage_memory(config, plan, layout, rank, timing.peak_bytes[rank], working, device, software, micro_batches))
        key = (id(device), *map(id, held[rank]), *map(id, held[-1 - rank]))
        if key not in known:
            known[key] = tail_seconds(config, plan, layout, rank, places[id(device)], micro_batches, held[rank])
        tail = max(tail, known[key], key=sum)
    reduce, optimizer, gather = tail

    def mean(*names: str) -> float:
        """Seconds of the average rank."""
        return micro_batches * sum(sum(parts.row(name)) for name in names) / plan.pp

    stage = plan.devices // plan.pp
    seconds = timing.seconds + reduce + optimizer + gather
    # What overlapped operations hid is the difference between their nominal and their busy seconds.
    hidden = max(0.0, mean("forward", "backward_input", "backward_weight") - timing.busy)  # slow ranks are busy for longer
    peak = sum(d.flops(config.dtype) for d in devices) * stage
    tokens = global_batch * config.seq
    return StepReport(
        plan=plan, seconds=seconds, pipeline=timing.seconds, bubble=timing.seconds - timing.busy,
        exposed_comm=mean("forward_comm", "backward_comm") - hidden, recompute=mean("recompute"), gradient_reduce=reduce,
        optimizer=optimizer, parameter_gather=gather, memory=tuple(memory), capacity=tuple(d.memory_bytes for d in devices),
        tokens_per_second=tokens / seconds, mfu=model_flops(config, tokens) / seconds / peak,
        hfu=mean("hfu_flops") * plan.pp * stage / seconds / peak)


def tail_seconds(config: ModelConfig, plan: Plan, layout: PartLayout, rank: int, place: Placement, micro_batches: int,
          held: list[BlockCost]) -> tuple[float, float, float]:
    """(gradient reduction, optimizer, parameter gather) seconds that a rank adds after its pipeline, overlap counted."""
    software, buckets = place.software, len(layout.ranks)
    reduce, optimizer, gather = data_parallel_seconds(config, plan, layout, rank, place, micro_batches)
    if software.overlap_gradients:
        # All but the last bucket hides behind the last micro-batch's backward (every micro-batch's under ZeRO-2).
        backward = sum(c.backward_input + c.backward_weight for c in held)
        reduce = _exposed(reduce, backward * (micro_batches if plan.zero == 2 else 1), software, buckets)
    if software.overlap_parameters:
        gather = _exposed(gather, sum(c.forward for c in held), software, buckets)
    return reduce, optimizer, gather


def _exposed(seconds: float, cover: float, software: Software, buckets: int) -> float:
    """What `cover` seconds of compute do not hide; the last of `buckets` buckets never hides."""
    last = seconds / max(8, buckets)
    hidden = min(seconds - last, cover)
    return seconds - hidden * (1 - software.overlap_loss)
