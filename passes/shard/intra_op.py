"""Intra-op parallelism: how one mesh axis cuts every op of a block, as an integer linear program (HiGHS through scipy).

Entry points: `IntraProblem`, `solve(problem)` -> `IntraResult`, `enumerate_all(problem)` (brute force, for small graphs).

Variables. One binary per op and strategy (a strategy is a way to cut and, for ops with parameters, a ZeRO stage of their state over the
data axis). Per value and layout that some consumer may need, one that says whether it is needed: a conversion is paid once per value and
layout, however many consumers share it (query, key and value projections share one all-gather). Per value, layout and strategy of its
producer, one that says that this conversion takes place. Objective: seconds of kernels, conversions forward and backward, and of the
data axis. Constraint: bytes of parameters, gradients, optimizer state and saved activations. The residual stream leaves a block as it came
in, so that the solution of one block holds for all equal ones.

This extends Zheng et al. 2022 (Alpa, section 4) by conversions shared between consumers, ZeRO as strategies, and the memory bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import inf, prod
from time import monotonic
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import coo_matrix  # type: ignore[import-untyped]

from .cluster import Device
from .collectives import Group, collective_time
from .kernels import attention_time, gemm_time, memory_time
from .op_graph import Layout, Need, OpGraph, OpNode, Strategy, Tensor, fused_values, strategies

__all__ = ["Choice", "IntraProblem", "IntraResult", "conversion", "enumerate_all", "gemm_sizes", "moved_bytes", "node_seconds", "solve"]


ALONE = Group(())


@dataclass(frozen=True)
class IntraProblem:
    """A block on `group` (the tensor axis), its parameters replicated over `data`.

    micro_batches: per step, over which gradient exchange is spread. in_flight: micro-batches whose activations are alive. zero: stages
    that may be chosen per op. memory: bytes for this block. residual: the layout at the block's ends, None: free (but
    the same at both). end: the layout of the last output of a block whose ends differ. train: backward too.
    """

    graph: OpGraph
    device: Device
    group: Group
    data: Group = ALONE
    dtype: str = "bf16"
    micro_batches: int = 1
    in_flight: float = 1.0
    zero: tuple[int, ...] = (0,)
    memory: float = inf
    residual: Layout | None = None
    end: Layout | None = None
    train: bool = True
    gradient_bytes: int = 4
    optimizer_bytes: int = 12

    @property
    def ways(self) -> int:
        return self.group.size


@dataclass(frozen=True)
class Choice:
    """An op's strategy with its ZeRO stage, and its own seconds and state bytes."""

    strategy: Strategy
    zero: int
    seconds: float
    nbytes: float


@dataclass(frozen=True)
class IntraResult:
    """choices per node. conversions: (value, producer layouts, consumer layouts, seconds). bound: of the linear relaxation; gap: what the
    solver leaves open (0 when proved). residual: layouts at the block's ends.
    """

    choices: tuple[Choice, ...]
    conversions: tuple[tuple[int, Need, Need, float], ...]
    seconds: float
    nbytes: float
    bound: float
    gap: float
    variables: int
    solve_s: float
    residual: Layout


def conversion(source: Layout, target: Layout) -> str | None:
    """The collective that turns one layout into another: "" for none, None when there is no way."""
    if source == target or (source == "R" and target != "P"):
        return ""
    if target == "P":
        return None
    if source == "P":
        return "all_reduce" if target == "R" else "reduce_scatter"
    return "all_gather" if target == "R" else "all_to_all"


@lru_cache(maxsize=1 << 14)
def _edge_seconds(tensor: Tensor, source: Need, target: Need, group: Group, train: bool) -> float:
    """Seconds of a value's way from producer to consumer, and of its gradient's way back."""
    pairs = [(source.value, target.value)]
    if train and tensor.grad:
        pairs.append((target.gradient, source.gradient))
    total = 0.0
    for start, end in pairs:
        kind = conversion(start, end)
        if kind is None:
            return inf
        if kind:
            total += collective_time(kind, tensor.nbytes / (group.size if kind == "all_to_all" else 1), group)
    return total


def node_seconds(node: OpNode, graph: OpGraph, loop: int, ways: int, device: Device, dtype: str, train: bool) -> float:
    """Kernel seconds of `node` with `loop` cut in `ways`, forward and, for training, backward."""
    if node.free:
        return 0.0
    extents = [v.extent / (ways if i == loop else 1) for i, v in enumerate(node.loops)]
    if node.kind in ("gemm", "convolution"):
        batch, m, n, k = gemm_sizes(node, extents)
        seconds = gemm_time(device, dtype, batch, m, n, k)
        if train:
            seconds += gemm_time(device, dtype, batch, m, k, n) + gemm_time(device, dtype, batch, k, n, m)
        return seconds
    if node.kind == "attention":
        flops = 2 * prod(extents)
        return attention_time(device, dtype, flops) + (attention_time(device, dtype, flops, backward=True) if train else 0.0)
    moved = moved_bytes(node, graph, loop, ways)
    return memory_time(device, moved) + (memory_time(device, 1.5 * moved) if train else 0.0)


def moved_bytes(node: OpNode, graph: OpGraph, loop: int, ways: int) -> float:
    """Bytes that a memory-bound node reads and writes on one rank; what stays inside a fused kernel does not count."""
    inside = fused_values(graph)

    def share(dims: tuple[int, ...]) -> int:
        return ways if loop >= 0 and loop in dims else 1

    written = sum(graph.values[r].nbytes for r in node.results if r not in inside) / share(node.result_dims)
    if node.kind == "lookup":
        return 2 * written
    read = sum((o.parameter or graph.values[o.value]).nbytes / share(o.dims) for o in node.operands if o.value not in inside)
    return written + read


def gemm_sizes(node: OpNode, extents: list[float]) -> tuple[float, float, float, float]:
    """(batch, m, n, k) of a GEMM node: loops in both operands and the result, in the first and the result, in the second, summed over."""
    if node.kind == "convolution":
        batch, outputs, inputs, rows, taps = extents
        return 1.0, batch * rows, outputs, inputs * taps
    left, right = (set(o.dims) for o in node.operands[:2])
    sizes = [1.0, 1.0, 1.0, 1.0]
    for i, loop in enumerate(node.loops):
        where = 3 if loop.kind == "reduction" else 0 if i in left and i in right else 1 if i in left else 2
        sizes[where] *= extents[i]
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _choices(problem: IntraProblem, node: OpNode) -> list[Choice]:
    found = []
    ways, data = problem.ways, problem.data
    for strategy in strategies(node, ways):
        seconds = node_seconds(node, problem.graph, strategy.loop, ways, problem.device, problem.dtype, problem.train)
        parameters = exchanged = 0.0
        for operand, need in zip(node.operands, strategy.operands, strict=True):
            if operand.parameter is None:
                continue
            cut = ways if need.value != "R" else 1
            parameters += operand.parameter.elements / cut
            if need.gradient == "P":  # a parameter held whole, whose ranks see different tokens
                exchanged += operand.parameter.elements
        if problem.train and exchanged:
            seconds += collective_time("all_reduce", problem.gradient_bytes * exchanged, problem.group) / problem.micro_batches
        for zero in problem.zero if parameters and problem.train and data.size > 1 else (0,):
            extra, nbytes = _state(problem, parameters, zero)
            found.append(Choice(strategy, zero, seconds + extra, nbytes))
    return found


def _state(problem: IntraProblem, parameters: float, zero: int) -> tuple[float, float]:
    """(seconds per micro-batch on the data axis, bytes) of `parameters` elements under a ZeRO stage."""
    if not parameters:
        return 0.0, 0.0
    unit, data, m = 2, problem.data, problem.micro_batches
    if not problem.train:
        return 0.0, parameters * unit
    bytes_of = (unit, problem.gradient_bytes, problem.optimizer_bytes)
    shards = tuple(data.size if zero >= since else 1 for since in (3, 2, 1))
    nbytes = parameters * sum(b / s for b, s in zip(bytes_of, shards, strict=True))
    reduce_kind = "all_reduce" if zero == 0 else "reduce_scatter"
    reduce = collective_time(reduce_kind, problem.gradient_bytes * parameters, data)
    gather = collective_time("all_gather", unit * parameters, data) if zero else 0.0
    if zero == 3:
        return 2 * gather + reduce, nbytes
    return (reduce + gather) / m if zero < 2 else reduce + gather / m, nbytes


@dataclass(frozen=True)
class _Program:
    """The tables of one problem. choices[i]: of node i, then of the inputs (a source node each). consumers[v]: (choice row, operand
    index or -1 for the end of the block) of value v. producer[v]: the row that makes it.
    """

    choices: list[list[Choice]]
    producer: dict[int, int]
    consumers: dict[int, list[tuple[int, int]]]
    saved: dict[int, list[tuple[int, int]]]


def _tables(problem: IntraProblem) -> _Program:
    graph = problem.graph
    choices = [_choices(problem, node) for node in graph.nodes]
    producer: dict[int, int] = {}
    consumers: dict[int, list[tuple[int, int]]] = {}
    saved: dict[int, list[tuple[int, int]]] = {}
    for row, node in enumerate(graph.nodes):
        producer.update(dict.fromkeys(node.results, row))
        for index, operand in enumerate(node.operands):
            if operand.value >= 0:
                consumers.setdefault(operand.value, []).append((row, index))
                if operand.saved and problem.train:
                    saved.setdefault(operand.value, []).append((row, index))
    for position, value in enumerate(graph.inputs):
        producer[value] = len(choices)
        choices.append(_source(problem, graph.values[value], position == 0))
    return _Program(choices, producer, consumers, saved)


def _source(problem: IntraProblem, tensor: Tensor, stream: bool) -> list[Choice]:
    """How a value may come in: whole, or, the residual stream, cut along any dimension."""
    layouts: list[Layout] = ["R"]
    if stream:
        layouts += [d for d, extent in enumerate(tensor.shape) if extent % problem.ways == 0 and problem.ways > 1]
        if problem.residual is not None:
            layouts = [v for v in layouts if v == problem.residual]
            if not layouts:
                raise ValueError(f"the residual stream of shape {tensor.shape} cannot be cut along {problem.residual} in {problem.ways}")
    return [Choice(Strategy(-1, (), Need(v, v)), 0, 0.0, 0.0) for v in layouts]


def _end(graph: OpGraph) -> tuple[int, int] | None:
    """(first input, last output): the residual stream's two ends, when they have the same shape."""
    if graph.inputs and graph.outputs and graph.values[graph.inputs[0]].shape == graph.values[graph.outputs[-1]].shape:
        return graph.inputs[0], graph.outputs[-1]
    return None


def solve(problem: IntraProblem, time_limit: float = 60.0) -> IntraResult:
    """The best assignment. Raises ValueError when none keeps the memory bound."""
    began = monotonic()
    if not problem.graph.nodes:
        return IntraResult((), (), 0.0, 0.0, 0.0, 0.0, 0, 0.0, "R")
    model = _Model(problem)
    answer = model.run(time_limit, integer=True)
    if answer.x is None:
        raise ValueError(f"no assignment keeps {problem.memory / 1e9:.3f} GB")
    relaxed = model.run(time_limit, integer=False)
    picked = [max(range(len(row)), key=lambda c: answer.x[first + c]) for first, row in zip(model.first, model.table.choices, strict=True)]
    seconds, nbytes, conversions = evaluate(problem, model.table, picked)
    chosen = [row[c] for row, c in zip(model.table.choices, picked, strict=True)]
    nodes = len(problem.graph.nodes)
    gap = max(0.0, 1 - answer.mip_dual_bound / model.scale / seconds) if seconds and answer.mip_dual_bound is not None else 0.0
    residual = chosen[nodes].strategy.result.value if problem.graph.inputs else "R"
    return IntraResult(tuple(chosen[:nodes]), conversions, seconds, nbytes, relaxed.fun / model.scale if relaxed.x is not None else 0.0,
                       gap if gap > 1e-6 else 0.0, model.count, monotonic() - began, residual)


def evaluate(problem: IntraProblem, table: _Program, picked: list[int]) -> tuple[float, float, tuple[tuple[int, Need, Need, float], ...]]:
    """(seconds, bytes, conversions) of one choice per row; infinite seconds when it is not allowed."""
    graph = problem.graph
    chosen = [row[c] for row, c in zip(table.choices, picked, strict=True)]
    seconds, nbytes = sum(c.seconds for c in chosen), sum(c.nbytes for c in chosen)
    conversions = []
    ends = _end(graph)
    for value, row in table.producer.items():
        source = chosen[row].strategy.result
        needs = {chosen[r].strategy.operands[i] for r, i in table.consumers.get(value, ())}
        if ends and value == ends[1]:
            needs.add(chosen[table.producer[ends[0]]].strategy.result)
        elif problem.end is not None and value == graph.outputs[-1]:
            needs.add(Need(problem.end, problem.end))
        for need in needs:
            cost = _edge_seconds(graph.values[value], source, need, problem.group, problem.train)
            seconds += cost
            if source != need and cost > 0:
                conversions.append((value, source, need, cost))
        kept = {chosen[r].strategy.operands[i].value for r, i in table.saved.get(value, ())}
        nbytes += sum(graph.values[value].nbytes / (1 if v == "R" else problem.ways) for v in kept) * problem.in_flight
    return seconds, nbytes, tuple(conversions)


class _Model:
    """The integer program as sparse rows."""

    def __init__(self, problem: IntraProblem) -> None:
        self.problem, self.table = problem, _tables(problem)
        self.costs: list[float] = []
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.binary: list[int] = []
        self.first: list[int] = []
        self.memory: list[tuple[int, float]] = []
        self.scale = 1e6  # seconds to microseconds
        for row in self.table.choices:
            self.first.append(len(self.costs))
            columns = [self._column(c.seconds, True) for c in row]
            self.memory += [(column, c.nbytes) for column, c in zip(columns, row, strict=True) if c.nbytes]
            self._row([(column, 1.0) for column in columns], 1.0, 1.0)
        for value in self.table.producer:
            self._value(value)
        if problem.memory < inf:
            self._row([(c, b / 1e9) for c, b in self.memory], -np.inf, problem.memory / 1e9)

    @property
    def count(self) -> int:
        return len(self.costs)

    def _column(self, seconds: float, binary: bool) -> int:
        self.costs.append(seconds * self.scale)
        self.binary.append(int(binary))
        return len(self.costs) - 1

    def _row(self, terms: list[tuple[int, float]], low: float, high: float) -> None:
        self.entries += [(len(self.low), column, factor) for column, factor in terms]
        self.low.append(low)
        self.high.append(high)

    def _value(self, value: int) -> None:
        """Which layouts of a value are needed, and what it takes to make them from what its producer makes."""
        problem, table, tensor = self.problem, self.table, self.problem.graph.values[value]
        wanted: dict[Need, list[list[int]]] = {}
        for row, operand in table.consumers.get(value, ()):
            here: dict[Need, list[int]] = {}
            for c, choice in enumerate(table.choices[row]):
                here.setdefault(choice.strategy.operands[operand], []).append(self.first[row] + c)
            for need, columns in here.items():
                wanted.setdefault(need, []).append(columns)
        ends = _end(problem.graph)
        if ends and value == ends[1]:
            row = table.producer[ends[0]]
            for c, choice in enumerate(table.choices[row]):
                wanted.setdefault(choice.strategy.result, []).append([self.first[row] + c])
        elif problem.end is not None and value == problem.graph.outputs[-1]:
            wanted.setdefault(Need(problem.end, problem.end), []).append([])  # wanted whatever is chosen
        source = table.producer[value]
        made: dict[Need, list[int]] = {}
        for c, choice in enumerate(table.choices[source]):
            made.setdefault(choice.strategy.result, []).append(self.first[source] + c)
        costs = {need: {have: _edge_seconds(tensor, have, need, problem.group, problem.train) for have in made} for need in wanted}
        by_source: dict[Need, list[int]] = {}
        for need, groups in wanted.items():
            if all(v == 0.0 for v in costs[need].values()):
                continue
            edges = {have: self._column(0.0 if cost == inf else cost, False) for have, cost in costs[need].items()}
            for have, edge in edges.items():
                if costs[need][have] == inf:
                    self._row([(edge, 1.0)], 0.0, 0.0)
                self._row([(edge, 1.0), *((column, -1.0) for column in made[have])], -np.inf, 0.0)
                by_source.setdefault(have, []).append(edge)
            for columns in groups:
                least = 0.0 if columns else 1.0
                self._row([*((edge, 1.0) for edge in edges.values()), *((column, -1.0) for column in columns)], least, np.inf)
        keeps: dict[Layout, list[list[int]]] = {}
        for row, operand in table.saved.get(value, ()):
            kept: dict[Layout, list[int]] = {}
            for c, choice in enumerate(table.choices[row]):
                kept.setdefault(choice.strategy.operands[operand].value, []).append(self.first[row] + c)
            for layout, columns in kept.items():
                keeps.setdefault(layout, []).append(columns)
        for layout, groups in keeps.items():
            column = self._column(0.0, False)
            self.memory.append((column, tensor.nbytes / (1 if layout == "R" else problem.ways) * problem.in_flight))
            for columns in groups:
                self._row([(column, 1.0), *((c, -1.0) for c in columns)], 0.0, np.inf)

    def run(self, time_limit: float, integer: bool) -> Any:
        rows, columns, factors = zip(*self.entries, strict=True)
        matrix = coo_matrix((factors, (rows, columns)), shape=(len(self.low), self.count)).tocsr()
        return milp(np.array(self.costs), constraints=LinearConstraint(matrix, self.low, self.high), bounds=Bounds(0, 1),
                    integrality=np.array(self.binary) if integer else None, options={"time_limit": time_limit, "mip_rel_gap": 0.0})


def enumerate_all(problem: IntraProblem) -> Iterator[tuple[float, float]]:
    """(seconds, bytes) of every combination of choices, allowed or not: for small graphs only."""
    table = _tables(problem)
    for picked in product(*(range(len(row)) for row in table.choices)):
        seconds, nbytes, _ = evaluate(problem, table, list(picked))
        yield seconds, nbytes
