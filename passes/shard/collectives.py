"""Alpha-beta cost of collectives on a cluster: the algorithms, and the best one for a group.

Entry points: `collective_time(kind, nbytes, group)` and `axis_group(cluster, stride, size)`, which says how the ranks of
one mesh axis lie on the cluster's levels and how many groups of that axis share a node's ports.

`nbytes` is always the size of the *full* buffer on one rank: the tensor that is all-reduced or broadcast, the gathered
result of an all-gather, the input of a reduce-scatter, what one rank sends in all to an all-to-all (its own part
included), the message of a p2p.

A group is a tower like the cluster's: `extents[i]` members (or sub-groups) along level i. Per level the cost needs two
numbers: alpha, seconds per step, and the rate at which one member moves bytes through that level, one way, while every
parallel group does the same. Sources: Thakur et al. 2005 (ring, tree), Sanders et al. 2009 (two-tree), NCCL's
hierarchical variants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2, prod

from .cluster import Cluster, Level
from .curves import Curve, curve_seconds
from .hashing import hash_once

__all__ = ["ALGORITHMS", "CollectiveCost", "Group", "all_times", "axis_group", "collective_cost", "collective_time"]


@dataclass(frozen=True)
class Stage:
    """One level as a group sees it: `extent` members, alpha, bytes/s per member, the level's topology; measured curves if it has all children."""

    extent: int
    alpha: float
    rate: float
    topology: str = "switch"
    curves: tuple[tuple[str, Curve], ...] = ()


@hash_once
@dataclass(frozen=True)
class Group:
    """The levels that a group spans, innermost first, extents above one only. An empty tower is a group of one rank.

    The rate of an upper stage is what one sub-group (all its members of a node together) moves: `members` ranks drive
    their ports at the same time, so a ring that crosses nodes splits into as many parallel rings (rails).
    """

    stages: tuple[Stage, ...]

    @property
    def size(self) -> int:
        return prod(s.extent for s in self.stages)


@dataclass(frozen=True)
class CollectiveCost:
    """The best algorithm's name and its time in seconds."""

    algorithm: str
    seconds: float


@lru_cache(maxsize=4096)
def axis_group(cluster: Cluster, stride: int, size: int, concurrent: bool = True) -> Group:
    """The group of `size` ranks spaced `stride` apart (a mesh axis with `stride` ranks inside it).

    `concurrent=True` (SPMD: every parallel group of the axis communicates at once) shares ports among the groups; otherwise
    one group has the node to itself. Ranks beyond a level's size go on at the next level; a stride that does not divide a
    level is rounded to the placement with fewest members together, which never flatters.
    """
    stages: list[Stage] = []
    remaining, step = size, stride
    below = 1  # members of this group inside one child of the current level
    for index, (level, children) in enumerate(zip(cluster.levels, cluster.level_sizes(), strict=True)):
        outermost = index == len(cluster.levels) - 1
        together = 1 if step >= children else children // step
        extent = remaining if outermost else _fit(remaining, together)
        if extent > 1:
            stages.append(Stage(extent, level.alpha, _rate(level, index, below, concurrent, cluster, extent), level.topology,
                                level.curves if extent == children else ()))
        below *= extent
        remaining = -(-remaining // extent)
        step = max(1, -(-step // children))
    return Group(tuple(stages))


def _fit(remaining: int, together: int) -> int:
    """The largest divisor of `remaining` that is at most `together`."""
    return next(d for d in range(min(remaining, together), 0, -1) if remaining % d == 0)


def _rate(level: Level, index: int, below: int, concurrent: bool, cluster: Cluster, extent: int) -> float:
    """Bytes/s, one way, of one child of `level` as one group may use it; `below` members of the group live in
    that child.
    """
    if index == 0:
        sharers = level.size if concurrent else extent
        return level.port_rate / (sharers if level.topology == "bus" else 1) * level.ports
    peers = cluster.node_size if index == 1 else prod(cluster.level_sizes()[:index])
    groups = max(1, peers // below) if concurrent else 1
    ports = min(level.ports / groups, max(1, below))
    return level.port_rate * ports / level.oversubscription


# Algorithms on one level. n members, s bytes (full buffer), a = alpha, r = bytes/s.
#

def _ring_pass(n: int, s: float, a: float, r: float) -> float:
    return (n - 1) * (a + s / n / r)


def _ring_all_reduce(n: int, s: float, a: float, r: float) -> float:
    return 2 * _ring_pass(n, s, a, r)


def _tree_all_reduce(n: int, s: float, a: float, r: float) -> float:
    """Pipelined binary tree: an inner node takes 2s in and s out to reduce, s in and 2s out to broadcast: 3s
    through its port.
    """
    return 2 * ceil(log2(n)) * a + 3 * s / r if n > 2 else 2 * a + 2 * s / r


def _double_tree_all_reduce(n: int, s: float, a: float, r: float) -> float:
    """Two trees of half the data each; a rank is an inner node of one only, so 2s goes through every port."""
    return 2 * ceil(log2(n)) * a + 2 * s / r


def _doubling_pass(n: int, s: float, a: float, r: float) -> float:
    """Recursive doubling (all-gather) or halving (reduce-scatter): log2(n) steps. A power of two only."""
    return ceil(log2(n)) * a + (n - 1) / n * s / r if n & (n - 1) == 0 else float("inf")


def _ring_broadcast(n: int, s: float, a: float, r: float) -> float:
    return (n - 1) * a + s / r


def _tree_broadcast(n: int, s: float, a: float, r: float) -> float:
    return ceil(log2(n)) * a + (2 if n > 2 else 1) * s / r


def _double_tree_broadcast(n: int, s: float, a: float, r: float) -> float:
    return ceil(log2(n)) * a + s / r


def _pairwise_all_to_all(n: int, s: float, a: float, r: float) -> float:
    return (n - 1) * (a + s / n / r)


Formula = Callable[[int, float, float, float], float]

# Per collective: the algorithm's name and its single-level formula.
ALGORITHMS: dict[str, dict[str, Formula]] = {
    "all_reduce": {"ring": _ring_all_reduce, "tree": _tree_all_reduce, "double_tree": _double_tree_all_reduce},
    "all_gather": {"ring": _ring_pass, "doubling": _doubling_pass},
    "reduce_scatter": {"ring": _ring_pass, "halving": _doubling_pass},
    "broadcast": {"ring": _ring_broadcast, "tree": _tree_broadcast, "double_tree": _double_tree_broadcast},
    "all_to_all": {"pairwise": _pairwise_all_to_all},
    "p2p": {"direct": lambda n, s, a, r: a + s / r},
}
RING_ONLY = frozenset({"ring", "pairwise", "direct"})


def all_times(kind: str, nbytes: float, group: Group) -> dict[str, float]:
    """Seconds of every algorithm that fits `group`. Keys: flat ones by name, `hierarchical` when the group spans levels, and only
    `measured` where the cluster has a curve.

    Raises KeyError for an unknown collective and ValueError for negative bytes.
    """
    formulas = ALGORITHMS[kind]
    if nbytes < 0:
        raise ValueError(f"{kind} of {nbytes} bytes: must not be negative")
    if group.size <= 1:
        return {"none": 0.0}
    if len(group.stages) == 1 and kind in (curves := dict(group.stages[0].curves)):
        return {"measured": curve_seconds(curves[kind], nbytes)}
    if kind == "p2p":
        top = group.stages[-1]
        return {"direct": top.alpha + nbytes / _p2p_rate(group)}
    if len(group.stages) == 1:
        return _level_times(formulas, nbytes, group.stages[0])
    times = {name: f for name in formulas if (f := _flat(kind, name, nbytes, group)) is not None}
    times["hierarchical"] = _hierarchical(kind, nbytes, group.stages)
    return times


def _p2p_rate(group: Group) -> float:
    """A message between two ranks of a group crosses the outermost level; it has only its own share of the node's ports."""
    inner = prod(s.extent for s in group.stages[:-1])
    return group.stages[-1].rate / inner


def _level_times(formulas: dict[str, Formula], nbytes: float, stage: Stage) -> dict[str, float]:
    n, rate = stage.extent, stage.rate
    times = {}
    for name, formula in formulas.items():
        if stage.topology == "ring" and n > 2 and name not in RING_ONLY:
            continue  # a tree over neighbour links is a ring with worse luck
        bisection = max(1.0, n / 4) if stage.topology == "ring" and name == "pairwise" else 1.0
        times[name] = formula(n, nbytes * bisection, stage.alpha, rate)
    return times


def _flat(kind: str, name: str, nbytes: float, group: Group) -> float | None:
    """One ring or tree over all ranks, laid node by node.

    The slowest level sets the rate; crossings pay their own alpha.
    """
    n, stages = group.size, group.stages
    if kind == "all_to_all":
        return _flat_all_to_all(nbytes, stages)
    slowest = min(s.rate for s in stages)
    if name == "ring":
        units = prod(s.extent for s in stages[1:])  # sub-groups of level 0: the ring crosses as many times
        mean_alpha = ((n - units) * stages[0].alpha + units * max(s.alpha for s in stages[1:])) / n
        return ALGORITHMS[kind]["ring"](n, nbytes, mean_alpha, slowest)
    if name in ("tree", "double_tree"):
        # Chains inside the node, a tree between nodes: log2 of the nodes in steps (NCCL).
        deep = 2 if kind == "all_reduce" else 1
        steps = deep * sum((ceil(log2(s.extent)) if i else s.extent - 1) * s.alpha for i, s in enumerate(stages))
        factor = {"all_reduce": {"tree": 3, "double_tree": 2}, "broadcast": {"tree": 2, "double_tree": 1}}[kind][name]
        return steps + factor * nbytes / slowest
    return None


def _flat_all_to_all(nbytes: float, stages: tuple[Stage, ...]) -> float:
    """Every rank sends straight to every other; a level carries what leaves the units below it, all levels at once."""
    n = prod(s.extent for s in stages)
    below, slowest, alpha = 1, 0.0, 0.0
    for stage in stages:
        inside = below * stage.extent
        leaving = nbytes * (inside - below) / n * below  # of the `below` ranks that share this stage's rate
        slowest = max(slowest, leaving / stage.rate)
        alpha += (inside - below) * stage.alpha
        below = inside
    return alpha + slowest


def _hierarchical(kind: str, nbytes: float, stages: tuple[Stage, ...]) -> float:
    """Level by level: the inner level shards (or aggregates) what the outer levels move, all members driving
    their ports.
    """
    if len(stages) == 1:
        return min(_level_times(ALGORITHMS[kind], nbytes, stages[0]).values())
    inner, outer = stages[0], stages[1:]
    best_inner = min
    if kind == "all_reduce":
        scatter = best_inner(_level_times(ALGORITHMS["reduce_scatter"], nbytes, inner).values())
        gather = best_inner(_level_times(ALGORITHMS["all_gather"], nbytes, inner).values())
        # Each member all-reduces its shard; together the members move the whole buffer at the sub-group's rate.
        return scatter + _hierarchical(kind, nbytes, outer) + gather
    if kind in ("all_gather", "reduce_scatter"):
        outer_size = prod(s.extent for s in outer)
        # Outer level first (reduce-scatter: last): shards of size nbytes / inner.extent, all members in parallel.
        local = best_inner(_level_times(ALGORITHMS[kind], nbytes, inner).values())
        return _hierarchical(kind, nbytes, outer) + local if outer_size > 1 else local
    if kind == "broadcast":
        local = best_inner(_level_times(ALGORITHMS[kind], nbytes, inner).values())
        return _hierarchical(kind, nbytes, outer) + local
    # all_to_all in two steps: exchange inside the node so that every member talks to its rail's peers only.
    local = best_inner(_level_times(ALGORITHMS[kind], nbytes, inner).values())
    return local + _hierarchical(kind, nbytes * inner.extent, outer)


def collective_cost(kind: str, nbytes: float, group: Group) -> CollectiveCost:
    """The cheapest algorithm for `kind` on `group`. A group of one rank costs nothing."""
    times = all_times(kind, nbytes, group)
    name = min(times, key=lambda k: times[k])
    return CollectiveCost(name, times[name])


@lru_cache(maxsize=1 << 16)
def collective_time(kind: str, nbytes: float, group: Group) -> float:
    """Seconds of the cheapest algorithm (see `collective_cost`)."""
    return collective_cost(kind, nbytes, group).seconds
