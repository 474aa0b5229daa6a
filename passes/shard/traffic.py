"""What a plan sends over which links in one step.

Entry point: `traffic(config, plan, cluster, global_batch)` -> a `Flow` per axis and collective, for the device that sends most.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import Cluster
from .collectives import Group, collective_time
from .layer_cost import SOFTWARE, Placement, Software
from .model import ELEMENT, ModelConfig, block_params
from .partition import even_split, part_blocks
from .plan import Plan
from .workload import block_work

__all__ = ["Flow", "traffic", "wire_bytes"]


@dataclass(frozen=True)
class Flow:
    """axis: tp, cp, ep, pp or dp. levels: names of the links it crosses, innermost first. nbytes: sent per device and step. seconds: that
    the collectives take per step if nothing hides them.
    """

    axis: str
    kind: str
    levels: tuple[str, ...]
    nbytes: float
    seconds: float


def wire_bytes(kind: str, nbytes: float, n: int) -> float:
    """Bytes that one of n ranks sends for a collective of `nbytes` (in `collectives.py`'s sense), by a bandwidth-optimal algorithm."""
    if n <= 1:
        return 0.0
    share = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0, "broadcast": 1.0}.get(kind)
    return nbytes if share is None else share * (n - 1) / n * nbytes


def _levels(cluster: Cluster, stride: int, size: int) -> tuple[str, ...]:
    """Names of the levels that a group of `size` ranks `stride` apart crosses."""
    names, span = [], 1
    for level, children in zip(cluster.levels, cluster.level_sizes(), strict=True):
        inside, span = span, span * children
        if size > 1 and stride * size > inside and stride < span:
            names.append(level.name)
    return tuple(names)


def traffic(config: ModelConfig, plan: Plan, cluster: Cluster, global_batch: int, software: Software | str = "aicc") -> tuple[Flow, ...]:
    """Flows of the pipeline rank that sends most."""
    if isinstance(software, str):
        software = SOFTWARE[software]
    place, m, stage = Placement.of(plan, cluster, software), plan.micro_batches(global_batch), plan.devices // plan.pp
    groups: dict[str, tuple[Group, int, int]] = {
        "tp": (place.tensor, 1, plan.tp), "cp": (place.context, plan.tp, plan.cp), "ep": (place.expert, 1, plan.ep),
        "dp": (place.data, plan.tp, plan.cp * plan.dp), "edp": (place.expert_data, plan.ep, stage // plan.ep),
        "pp": (place.pipeline, stage, plan.pp)}
    layout = part_blocks(config, plan, plan.split or even_split(config.layers, plan.parts))
    by_rank: list[dict[tuple[str, str], list[float]]] = [{} for _ in range(plan.pp)]

    def add(rank: int, axis: str, kind: str, nbytes: float, times: float) -> None:
        group, _, size = groups[axis]
        if size > 1 and nbytes:
            row = by_rank[rank].setdefault((axis, kind), [0.0, 0.0])
            row[0] += times * wire_bytes(kind, nbytes, size)
            row[1] += times * collective_time(kind, nbytes, group)

    for runs, rank in zip(layout.runs, layout.ranks, strict=True):
        for kind, count in runs:
            again = plan.recompute == "full" and kind not in ("embedding", "head")
            for comm in block_work(config, kind, plan.micro_batch, plan.shard).comms:
                add(rank, comm.axis, comm.kind, comm.nbytes, m * count * (2 if again and comm.phase == "forward" else 1))
            dense, expert = block_params(config, kind).local(plan.shard)
            for axis, params in (("dp", dense), ("edp", expert)):
                grads, weights = software.gradient_bytes * params, ELEMENT[config.dtype] * params
                if plan.zero == 0:
                    add(rank, axis, "all_reduce", grads, count)
                else:
                    add(rank, axis, "reduce_scatter", grads, count * (m if plan.zero >= 2 else 1))
                    add(rank, axis, "all_gather", weights, count * (2 * m if plan.zero == 3 else 1))
        if plan.pp > 1:
            size = ELEMENT[config.dtype] * plan.micro_batch * config.seq / plan.cp * config.hidden / plan.tp
            add(rank, "pp", "p2p", size, 2 * m)
    busiest = max(by_rank, key=lambda rows: sum(seconds for _, seconds in rows.values()))
    return tuple(Flow("dp (experts)" if axis == "edp" else axis, kind, _levels(cluster, groups[axis][1], groups[axis][2]), nbytes, seconds)
                 for (axis, kind), (nbytes, seconds) in sorted(busiest.items()))
